//! Frames on their way from the guest.

use super::*;
use crate::devices::virtio::driver::INDIRECT;

/// Puts a header and a frame into guest memory, one behind the other.
fn put(guest: &Guest, header: &[u8; header::LEN], frame: &[u8]) {
    guest.put(DATA, &[&header[..], frame].concat());
}

const PLAIN: [u8; header::LEN] = [0; header::LEN];
/// Segments of 1448 bytes of TCP over IPv4.
const SEGMENTS: [u8; header::LEN] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

#[test]
fn a_frame_is_sent_as_it_is_however_it_is_cut() {
    let frame = frame(OTHER, 100);
    let cuts: [&[Part]; 4] = [
        &[(DATA, 112, 0)],
        &[(DATA, 12, 0), (DATA + 12, 100, 0)],
        &[(DATA, 5, 0), (DATA + 5, 0, 0), (DATA + 5, 20, 0), (DATA + 25, 87, 0)],
        &[(DATA, 111, 0), (DATA + 111, 1, 0)],
    ];
    let mut guest = Guest::started(LINUX);
    put(&guest, &PLAIN, &frame);
    for (number, parts) in (0..).zip(cuts) {
        guest.offer(1, parts);
        assert_eq!(guest.sent(), Some([&PLAIN[..], &frame].concat()), "{parts:x?}");
        assert_eq!(
            (guest.ring(1).used_index(), guest.ring(1).used_element(number).1),
            (number + 1, 0)
        );
    }
}

#[test]
fn what_the_kernel_is_to_do_goes_with_the_frame() {
    let mut guest = Guest::started(LINUX);
    let frame = frame(OTHER, 20_000);
    put(&guest, &SEGMENTS, &frame);
    guest.offer(1, &[(DATA, 20_012, 0)]);
    assert_eq!(guest.sent(), Some([&SEGMENTS[..], &frame].concat()));
}

#[test]
fn behind_a_large_frame_the_device_looks_for_the_next_one_without_a_doorbell() {
    for (len, sent) in [(20_000, 2), (100, 1)] {
        let mut guest = Guest::started(LINUX);
        put(&guest, &SEGMENTS, &frame(OTHER, len));
        let part = (DATA, 12 + len as u32, 0);
        guest.ring(1).offer(&[part]);
        let doorbell = u64::from(BAR) + 0x3000 + 4;
        pull(&guest.wires.doorbells.lock().unwrap()[&doorbell]);
        guest.thread.run_with_timeout(0).unwrap();
        guest.ring(1).offer(&[part]);
        guest.run();
        assert_eq!(guest.ring(1).used_index(), sent, "{len}");
    }
}

#[test]
fn frames_that_cannot_be_are_dropped_and_the_next_one_is_sent() {
    let mut guest = Guest::started(LINUX);
    let frame = frame(OTHER, 100);
    let many = vec![(DATA, 1, 0); 200];
    let chains: [(&[u8; 12], &[Part]); 14] = [
        (&PLAIN, &[(DATA, 0, 0)]),
        (&PLAIN, &[(DATA, 11, 0)]),
        (&PLAIN, &[(DATA, 12, 0)]),
        (&PLAIN, &[(DATA, 25, 0)]),
        (&PLAIN, &[(DATA, 112, WRITE)]),
        (&PLAIN, &[(DATA, 12, 0), (DATA, 100, WRITE)]),
        (&PLAIN, &[(DATA, 12, 0), (0x9_0000, 100, 0)]),
        (&PLAIN, &[(u64::MAX - 3, 112, 0)]),
        (&PLAIN, &[(0x7_fff0, 112, 0)]),
        (&PLAIN, &[(DATA, u32::MAX, 0)]),
        (&PLAIN, &[(0x1_0000, 0x1_0800, 0)]),
        (&SEGMENTS, &[(DATA, 40, 0)]),
        (&[1, 1, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0], &[(DATA, 112, 0)]),
        (&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], &[(DATA, 112, 0)]),
    ];
    for (number, (header, parts)) in (0..).zip(chains) {
        put(&guest, header, &frame);
        guest.offer(1, parts);
        assert_eq!(guest.sent(), None, "{header:x?} {parts:x?}");
        assert_eq!(guest.ring(1).used_element(number).1, 0);
        assert_eq!(guest.ring(1).used_index(), number + 1);
    }
    put(&guest, &PLAIN, &frame);
    guest.offer(1, &[(DATA, 112, 0)]);
    assert_eq!(guest.sent(), Some([&PLAIN[..], &frame].concat()));
    // As many parts as the ring has, and all of one byte: it is a frame.
    guest.offer(1, &many);
    assert_eq!(guest.sent().map(|sent| sent.len()), Some(200));
}

#[test]
fn a_chain_without_end_is_cut() {
    let mut guest = Guest::started(LINUX | RING_INDIRECT_DESC);
    put(&guest, &PLAIN, &frame(OTHER, 100));
    let table = 0x6_0000;
    let ring = guest.ring(1);
    // A table of 512 descriptors of one byte each.
    for index in 0..512 {
        ring.describe(table, index, (DATA, 1, crate::devices::virtio::driver::NEXT), index + 1);
    }
    guest.offer(1, &[(table, 512 * 16, INDIRECT)]);
    assert_eq!((guest.sent(), guest.ring(1).used_index()), (None, 1));
}

#[test]
fn a_driver_that_did_not_agree_to_offloads_has_none() {
    let mut guest = Guest::started(0);
    let frame = frame(OTHER, 100);
    for header in [SEGMENTS, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]] {
        put(&guest, &header, &frame);
        guest.offer(1, &[(DATA, 112, 0)]);
        assert_eq!(guest.sent(), None);
    }
    put(&guest, &PLAIN, &frame);
    guest.offer(1, &[(DATA, 112, 0)]);
    assert!(guest.sent().is_some());
}

#[test]
fn a_wire_that_takes_nothing_holds_up_nobody() {
    let mut guest = Guest::started(LINUX);
    put(&guest, &PLAIN, &frame(OTHER, 100));
    guest.wire.clear();
    for _ in 0..300 {
        guest.offer(1, &[(DATA, 112, 0)]);
    }
    assert_eq!(guest.ring(1).used_index(), 300);
}
