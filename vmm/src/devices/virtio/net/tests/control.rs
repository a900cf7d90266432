//! Commands on the control queue.

use super::*;

const ANSWER: u64 = 0x6_0000;
const OK: u8 = 0;
const ERR: u8 = 1;

impl Guest {
    /// Gives the device on control queue `queue` a command. Returns its answer.
    pub(super) fn command(&mut self, queue: u16, command: &[u8]) -> u8 {
        self.put(DATA, command);
        self.put(ANSWER, &[0xee]);
        self.offer(queue, &[(DATA, command.len() as u32, 0), (ANSWER, 1, WRITE)]);
        self.get(ANSWER, 1)[0]
    }

    /// Whether the guest receives frames to these addresses.
    fn receives(&mut self, to: &[Mac]) -> Vec<bool> {
        let mut receives = |mac: &Mac| {
            let before = self.ring(0).used_index();
            self.offer(0, &[(DATA + 0x1000, 1600, WRITE)]);
            self.arrives(&frame(*mac, 60));
            self.ring(0).used_index() != before
        };
        to.iter().map(&mut receives).collect()
    }
}

const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 1]);
const ALL: [Mac; 4] = [MAC, Mac::BROADCAST, OTHER, GROUP];

/// The command that sets the tables of addresses.
fn tables(unicast: &[Mac], multicast: &[Mac]) -> Vec<u8> {
    let mut command = vec![1, 0];
    for table in [unicast, multicast] {
        command.extend((table.len() as u32).to_le_bytes());
        command.extend(table.iter().flat_map(|mac| mac.0));
    }
    command
}

#[test]
fn the_driver_chooses_which_frames_it_receives() {
    let mut guest = Guest::started(LINUX);
    assert_eq!(guest.receives(&ALL), [true; 4], "everything, until it chooses");
    assert_eq!(guest.command(2, &[0, 0, 0]), OK);
    assert_eq!(guest.receives(&ALL), [true, true, false, false]);
    assert_eq!(guest.command(2, &[0, 1, 1]), OK);
    assert_eq!(guest.receives(&ALL), [true, true, false, true]);
    assert_eq!(guest.command(2, &[0, 1, 0]), OK);
    assert_eq!(guest.command(2, &tables(&[OTHER], &[GROUP])), OK);
    assert_eq!(guest.receives(&ALL), [true; 4]);
    assert_eq!(guest.command(2, &tables(&[], &[])), OK);
    assert_eq!(guest.receives(&ALL), [true, true, false, false]);
    assert_eq!(guest.command(2, &tables(&[], &[GROUP; 100])), OK, "more than the device keeps");
    assert_eq!(guest.receives(&ALL), [true, true, false, true]);
    assert_eq!(guest.command(2, &[0, 0, 1]), OK);
    assert_eq!(guest.receives(&ALL), [true; 4]);
}

#[test]
fn the_driver_may_take_another_address_and_has_its_own_again_after_a_reset() {
    let mut guest = Guest::started(LINUX);
    let set = |mac: Mac| [&[1, 1][..], &mac.0].concat();
    assert_eq!(guest.command(2, &set(OTHER)), OK);
    assert_eq!(guest.command(2, &[0, 0, 0]), OK);
    assert_eq!(Mac(guest.read(DEVICE)), OTHER);
    assert_eq!(guest.receives(&ALL), [false, true, true, false]);
    assert_eq!(guest.command(2, &set(GROUP)), ERR);
    assert_eq!(guest.command(2, &set(Mac([0; 6]))), ERR);
    assert_eq!(Mac(guest.read(DEVICE)), OTHER);
    guest.start(LINUX, &[0, 1, 2]);
    assert_eq!(Mac(guest.read(DEVICE)), MAC);
    assert_eq!(guest.receives(&ALL), [true; 4], "and no filter");
}

#[test]
fn the_driver_chooses_how_many_queues_are_used() {
    let mut guest = Guest::new(2);
    guest.start(LINUX, &[0, 1, 2, 3, 4]);
    guest.put(DATA + 0x2000, &[&[0; header::LEN][..], &frame(OTHER, 100)].concat());
    let send = |guest: &mut Guest| {
        guest.offer(3, &[(DATA + 0x2000, 112, 0)]);
        guest.sent_by(1).is_some()
    };
    assert!(!send(&mut guest), "one pair, until it chooses");
    for wrong in [0, 3, 0x8000] {
        assert_eq!(guest.command(4, &[&[4, 0][..], &u16::to_le_bytes(wrong)].concat()), ERR);
    }
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), OK);
    assert!(send(&mut guest));
    guest.ring(2).offer(&[(DATA + 0x3000, 1600, WRITE)]);
    let arrived = [&[0; header::LEN][..], &frame(MAC, 60)].concat();
    guest.wire[1].send(&arrived).unwrap();
    guest.run();
    assert_eq!(guest.ring(2).used_element(0), (0, 72));
    assert_eq!(guest.command(4, &[4, 0, 1, 0]), OK);
    assert!(!send(&mut guest));
    assert_eq!(guest.ring(3).used_index(), 3, "a buffer comes back in any case");
}

#[test]
fn without_several_queues_the_third_is_for_commands() {
    let mut guest = Guest::new(4);
    guest.start(LINUX & !F_MQ, &[0, 1, 2, 8]);
    assert_eq!(guest.command(2, &[0, 0, 0]), OK);
    assert_eq!(guest.command(2, &[4, 0, 2, 0]), ERR, "MQ is not negotiated");
    assert_eq!(guest.command(8, &[0, 0, 0]), 0xee, "no queue at all");
}

#[test]
fn commands_that_were_not_agreed_to_are_refused() {
    let mut guest = Guest::started(F_CTRL_VQ);
    for command in
        [&[0, 0, 0][..], &[0, 1, 0], &tables(&[], &[]), &[1, 1, 2, 0, 0, 0, 0, 9], &[3, 0]]
    {
        assert_eq!(guest.command(2, command), ERR, "{command:x?}");
    }
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let mut guest = Guest::started(LINUX);
    let mut long = tables(&[], &[]);
    long.push(0);
    let lies = [&[1, 0][..], &u32::MAX.to_le_bytes(), &[0; 16]].concat();
    let one_short = tables(&[OTHER], &[GROUP])[..21].to_vec();
    for command in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 2],
        &[0, 0, 0, 0],
        &[0, 2, 0],
        &[2, 0, 1, 0],
        &[9, 9, 9],
        &[0xff; 64],
        &[1, 1, 2, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0, 0, 0],
        &[1, 0],
        &[1, 0, 0, 0, 0, 0],
        &[4, 0, 1],
        &[3, 1],
        &long,
        &lies,
        &one_short,
    ] {
        assert_eq!(guest.command(2, command), ERR, "{command:x?}");
    }
    assert_eq!(guest.receives(&ALL), [true; 4]);
}

#[test]
fn chains_that_cannot_be_commands_are_answered_where_there_is_a_place_for_it() {
    let mut guest = Guest::started(LINUX);
    guest.put(DATA, &[0, 0, 0]);
    let chains: [(&[Part], u32); 6] = [
        (&[(DATA, 3, 0)], 0),
        (&[(DATA, 3, 0), (ANSWER, 0, WRITE)], 0),
        (&[(DATA, 3, 0), (0x9_0000, 1, WRITE)], 0),
        (&[(ANSWER, 1, WRITE), (DATA, 3, 0)], 1),
        (&[(0x9_0000, 3, 0), (ANSWER, 1, WRITE)], 1),
        (&[(DATA, 3, 0), (0, 0x1_0000, 0), (ANSWER, 1, WRITE)], 0),
    ];
    for (number, (parts, written)) in (0..).zip(chains) {
        guest.put(ANSWER, &[0xee]);
        guest.offer(2, parts);
        assert_eq!(guest.ring(2).used_element(number).1, written, "{parts:x?}");
        assert_eq!(guest.get(ANSWER, 1), [if written == 1 { ERR } else { 0xee }], "{parts:x?}");
    }
    assert_eq!(guest.receives(&ALL), [true; 4], "none of them was obeyed");
    // A command may be cut anywhere.
    guest.offer(2, &[(DATA, 1, 0), (DATA + 1, 1, 0), (DATA + 2, 1, 0), (ANSWER, 9, WRITE)]);
    assert_eq!(guest.get(ANSWER, 1), [OK]);
    assert_eq!(guest.receives(&ALL), [true, true, false, false]);
}
