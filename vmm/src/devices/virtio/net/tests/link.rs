//! The link: taken down and up by the operator, and lost with its tap.

use super::*;

impl Guest {
    fn port(&self) -> Arc<dyn NetworkPort> {
        self.function.network_port().unwrap()
    }

    fn generation(&mut self) -> u8 {
        let [generation] = self.read(0x15);
        generation
    }
}

#[test]
fn a_link_that_is_down_takes_the_guests_frames_and_carries_none() {
    let mut guest = Guest::started(LINUX);
    let (port, generation) = (guest.port(), guest.generation());
    assert_eq!((port.link(), guest.link_status()), (Link::Up, S_LINK_UP));
    guest.put(DATA, &[&[0; header::LEN][..], &frame(OTHER, 100)].concat());
    for number in 0..4 {
        guest.ring(0).offer(&[(DATA + 0x1000 * (number + 1), 1600, WRITE)]);
    }
    guest.ring_doorbell(0);
    port.set_link(false);
    guest.run();
    assert_eq!((port.link(), guest.link_status()), (Link::Down, 0));
    assert_eq!(guest.generation(), generation + 1);
    assert_eq!(guest.read::<1>(0x1000)[0] & 2, 2, "the configuration has changed");
    guest.offer(1, &[(DATA, 112, 0)]);
    assert_eq!((guest.ring(1).used_index(), guest.sent()), (1, None));
    // More frames than the thread looks at in one go.
    for _ in 0..100 {
        guest.arrives(&frame(MAC, 60));
    }
    assert_eq!(guest.ring(0).used_index(), 0);
    port.set_link(true);
    guest.run();
    assert_eq!((port.link(), guest.link_status()), (Link::Up, S_LINK_UP));
    assert_eq!(guest.ring(0).used_index(), 0, "frames from before are gone");
    guest.arrives(&frame(MAC, 80));
    assert_eq!(guest.ring(0).used_element(0), (0, 92));
    guest.offer(1, &[(DATA, 112, 0)]);
    assert!(guest.sent().is_some());
}

#[test]
fn a_frame_that_was_held_when_the_link_went_down_is_not_delivered_later() {
    let mut guest = Guest::started(LINUX);
    guest.offer(0, &[(DATA, 100, WRITE)]);
    guest.arrives(&frame(MAC, 400));
    let port = guest.port();
    port.set_link(false);
    guest.run();
    port.set_link(true);
    guest.run();
    guest.offer(0, &[(DATA + 0x1000, 1600, WRITE)]);
    assert_eq!(guest.ring(0).used_index(), 0);
}

#[test]
fn the_guests_driver_does_not_change_the_operators_setting_and_an_update_keeps_it() {
    let mut guest = Guest::started(LINUX);
    guest.port().set_link(false);
    guest.start(LINUX, &[0, 1, 2]);
    assert_eq!(guest.link_status(), 0);
    let mut guest = guest.switch();
    guest.resume();
    assert_eq!(guest.link_status() & S_LINK_UP, 0);
    assert_eq!((guest.port().link(), announced(&guest)), (Link::Down, None));
    guest.port().set_link(true);
    guest.run();
    assert_eq!(guest.link_status() & S_LINK_UP, S_LINK_UP);
}

#[test]
fn every_queue_has_exactly_one_worker() {
    for pairs in 1..=PAIRS_MAX {
        let (wire, _ends) = wire(pairs);
        let net = Net::new(wire, MAC, None).unwrap();
        let workers: Vec<NetWorker> =
            std::iter::once(net.worker()).chain(net.more_workers()).collect();
        assert_eq!(workers.len(), pairs);
        for queue in 0..net.queue_sizes().len() {
            let serving = workers.iter().filter(|worker| worker.serves(queue)).count();
            assert_eq!(serving, 1, "queue {queue} of {pairs} pairs");
        }
    }
}

#[test]
fn a_pair_whose_thread_is_stuck_does_not_delay_another() {
    // Only the threads of the other pairs run.
    let mut guest = Guest::new(4);
    guest.start(LINUX, &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    guest.shared.use_pairs(4).unwrap();
    let mut others = EventManager::new().unwrap();
    for worker in guest.function.more_workers() {
        others.add_subscriber(worker);
    }
    guest.thread = others;
    guest.put(DATA, &[&[0; header::LEN][..], &frame(OTHER, 100)].concat());
    for queue in [1, 3, 7] {
        guest.offer(queue, &[(DATA, 112, 0)]);
    }
    let sent: Vec<bool> = (0..4).map(|pair| guest.sent_by(pair).is_some()).collect();
    assert_eq!(sent, [false, true, false, true]);
    // The device can say so to a pause, and a reset waits.
    assert_eq!(guest.ring(1).used_index(), 0);
    guest.function.pause();
    guest.function.drain(std::time::Instant::now()).unwrap();
}

#[test]
fn a_queue_that_goes_out_of_use_while_its_thread_sends_is_not_a_tap_that_is_gone() {
    let mut guest = Guest::new(2);
    guest.start(LINUX, &[0, 1, 2, 3, 4]);
    let gone = io::Error::from_raw_os_error(libc::EBADFD);
    let worker = guest.function.worker();
    let rings = worker.rings().clone();
    guest.shared.tap_failed(1, "send", &gone, &rings);
    assert_eq!(guest.port().link(), Link::Up);
    guest.shared.use_pairs(2).unwrap();
    guest.shared.tap_failed(1, "send", &gone, &rings);
    assert_eq!((guest.port().link(), guest.link_status()), (Link::Gone, 0));
    guest.port().set_link(true);
    assert_eq!(guest.port().link(), Link::Gone);
}
