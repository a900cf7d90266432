//! The device over a live update.

use super::*;

impl Guest {
    /// Pause, save, encode, decode, and restore in a new process with another opening of the tap.
    pub(super) fn switch(mut self) -> Self {
        self.function.pause();
        self.function.drain(std::time::Instant::now()).unwrap();
        let state = self.function.save().unwrap();
        let read = read_node(&state.to_node("virtio-net@1"), "/devices").unwrap();
        assert_eq!(state, read);
        let wires = Arc::new(FakeWires::default());
        let (wire, ends) = wire(self.wire.len());
        let resources = (resources(&self.memory, &wires), wire);
        let function = VirtioPci::restore(read, resources).unwrap();
        assert_eq!(function.save().unwrap(), state);
        let rings = self.rings;
        Self { rings, ..Self::around(function, self.memory, wires, ends) }
    }

    pub(super) fn resume(&mut self) {
        self.function.resume();
        self.run();
    }
}

#[test]
fn frames_in_the_guests_queues_are_sent_once_and_received_afterwards() {
    let mut guest = Guest::started(LINUX);
    guest.put(DATA, &[&[0; header::LEN][..], &frame(OTHER, 100)].concat());
    guest.offer(1, &[(DATA, 112, 0)]);
    assert!(guest.sent().is_some());
    guest.function.pause();
    guest.offer(1, &[(DATA, 82, 0)]);
    guest.offer(0, &[(DATA + 0x1000, 1600, WRITE)]);
    assert!(guest.sent().is_none(), "a paused device sends nothing");
    let mut guest = guest.switch();
    assert!(guest.sent().is_none(), "nor does a restored one that does not run yet");
    guest.resume();
    assert_eq!(announced(&guest), Some((Mac::BROADCAST, MAC, RARP)));
    assert_eq!(guest.sent().map(|sent| sent.len()), Some(82));
    assert_eq!(guest.sent(), None, "and what was sent before is not sent again");
    assert_eq!(guest.ring(1).used_index(), 2);
    guest.arrives(&frame(MAC, 60));
    assert_eq!(guest.ring(0).used_element(0), (0, 72));
}

#[test]
fn what_the_driver_has_set_stays_set() {
    let mut guest = Guest::new(2);
    guest.start(LINUX, &[0, 1, 2, 3, 4]);
    {
        let shared = guest.shared.clone();
        shared.use_pairs(2).unwrap();
        let mut driver = shared.driver();
        driver.mac = OTHER;
        driver.filter.promiscuous = false;
    }
    let before = guest.config();
    let mut guest = guest.switch();
    assert_eq!(guest.config(), before);
    assert_eq!(guest.shared.driver().pairs, 2);
    assert!(guest.shared.features() & F_MQ != 0);
    guest.resume();
    assert_eq!(announced(&guest), Some((Mac::BROADCAST, OTHER, RARP)));
    guest.offer(0, &[(DATA, 1600, WRITE)]);
    guest.arrives(&frame(MAC, 60));
    assert_eq!(guest.ring(0).used_index(), 0, "it has another address now");
    guest.arrives(&frame(OTHER, 60));
    assert_eq!(guest.ring(0).used_index(), 1);
    // The driver's reset gives the address that the device had in its first life.
    guest.start(LINUX, &[0, 1]);
    assert_eq!(Mac(guest.read(DEVICE)), MAC);
}

#[test]
fn a_driver_that_can_announce_itself_is_asked_until_it_says_that_it_did() {
    let mut guest = Guest::started(LINUX);
    let [generation]: [u8; 1] = guest.read(0x15);
    assert_eq!(guest.link_status(), S_LINK_UP);
    // An update that does not take place changes nothing.
    guest.function.pause();
    guest.resume();
    assert_eq!((guest.link_status(), guest.sent()), (S_LINK_UP, None));
    let mut guest = guest.switch();
    guest.resume();
    assert_eq!(guest.link_status(), S_LINK_UP | S_ANNOUNCE);
    assert_eq!(guest.read(0x15), [generation + 1]);
    assert_eq!(guest.read::<1>(0x1000)[0] & 2, 2, "the configuration has changed");
    // It had no time to do so before the next update.
    let mut guest = guest.switch();
    assert_eq!(guest.link_status(), S_LINK_UP | S_ANNOUNCE);
    guest.resume();
    guest.put(DATA, &[3, 0]);
    guest.offer(2, &[(DATA, 2, 0), (DATA + 16, 1, WRITE)]);
    assert_eq!(guest.link_status(), S_LINK_UP);
    guest.function.pause();
    guest.resume();
    assert_eq!(guest.link_status(), S_LINK_UP, "once for each update");
}

#[test]
fn the_host_announces_a_guest_that_cannot_and_none_without_a_driver() {
    for features in [LINUX & !F_GUEST_ANNOUNCE, LINUX & !F_STATUS, LINUX & !F_CTRL_VQ, 0] {
        let mut guest = Guest::started(features).switch();
        guest.resume();
        assert_eq!(guest.link_status() & S_ANNOUNCE, 0);
        assert_eq!(announced(&guest), Some((Mac::BROADCAST, MAC, RARP)), "{features:#x}");
        assert_eq!(guest.sent(), None);
    }
    let mut guest = Guest::new(1).switch();
    guest.resume();
    assert_eq!(guest.sent(), None);
}

#[test]
fn a_guest_is_announced_several_times_with_all_of_its_addresses() {
    let guest = Guest::started(LINUX);
    guest.shared.driver().filter.unicast = MacTable::new(vec![OTHER, Mac::BROADCAST]);
    let mut guest = guest.switch();
    guest.resume();
    let mut heard = Vec::new();
    while heard.len() < 2 * usize::from(announce::ROUNDS) {
        match announced(&guest) {
            Some((_, source, RARP)) => heard.push(source),
            Some(other) => panic!("{other:?}"),
            // The next round comes by a timer.
            None => drop(guest.thread.run_with_timeout(60_000).unwrap()),
        }
    }
    let expected: Vec<Mac> = [MAC, OTHER].into_iter().cycle().take(heard.len()).collect();
    assert_eq!(heard, expected);
    assert_eq!(guest.shared.driver().announcements, 0);
    guest.run();
    assert_eq!(announced(&guest), None);
}

#[test]
fn a_driver_that_resets_its_device_ends_the_announcements() {
    let mut guest = Guest::started(LINUX).switch();
    guest.resume();
    assert!(announced(&guest).is_some());
    guest.start(LINUX, &[0, 1, 2]);
    assert_eq!(guest.shared.driver().announcements, 0);
}

#[test]
fn a_frame_that_was_held_or_waited_in_the_old_tap_is_not_received_twice() {
    let mut guest = Guest::started(LINUX);
    guest.offer(0, &[(DATA, 100, WRITE)]);
    guest.arrives(&frame(MAC, 400));
    let mut guest = guest.switch();
    guest.resume();
    guest.offer(0, &[(DATA + 0x1000, 1600, WRITE)]);
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, 60));
    assert_eq!(guest.ring(0).used_index(), 1);
}

#[test]
fn a_tap_with_another_number_of_queues_is_refused_with_both_sides() {
    let mut guest = Guest::started(LINUX);
    guest.function.pause();
    let state = guest.function.save().unwrap();
    let (wire, _ends) = wire(3);
    let resources = (resources(&guest.memory, &Arc::new(FakeWires::default())), wire);
    let error = VirtioPci::<Net>::restore(state, resources).err().unwrap().to_string();
    assert_eq!(error, "the state has 1 pairs of queues, the host has opened 3 of tap vm0");
}
