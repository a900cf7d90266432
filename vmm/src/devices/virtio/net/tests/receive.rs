//! Frames on their way to the guest.

use super::*;

/// A buffer as drivers with MRG_RXBUF have them.
fn buffer(number: u64, len: u32) -> Part {
    (DATA + 0x1000 * number, len, WRITE)
}

/// The header that the guest finds in front of a frame in this many buffers.
fn plain(buffers: u8) -> Vec<u8> {
    vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, buffers, 0]
}

#[test]
fn a_frame_lands_in_a_buffer_behind_its_header() {
    let mut guest = Guest::started(LINUX);
    guest.put(DATA, &[0xee; 0x1000]);
    guest.offer(0, &[buffer(0, 1600)]);
    let frame = frame(MAC, 100);
    guest.arrives(&frame);
    assert_eq!(guest.ring(0).used_element(0), (0, 112));
    assert_eq!(guest.get(DATA, 113), [&plain(1)[..], &frame, &[0xee]].concat());
    assert_eq!(guest.ring(0).used_index(), 1);
}

#[test]
fn a_frame_that_is_longer_than_a_buffer_takes_several_and_no_more() {
    let mut guest = Guest::started(LINUX);
    // Cut as no driver would: the header is in two buffers, one of which has two parts.
    let buffers: [&[Part]; 4] =
        [&[buffer(0, 5)], &[buffer(1, 10), buffer(2, 30)], &[buffer(3, 500)], &[buffer(4, 500)]];
    for parts in buffers {
        guest.ring(0).offer(parts);
    }
    guest.ring_doorbell(0);
    let frame = frame(MAC, 100);
    guest.arrives(&frame);
    assert_eq!(guest.ring(0).used_index(), 3);
    let used: Vec<_> = (0..3).map(|number| guest.ring(0).used_element(number)).collect();
    assert_eq!(used, [(0, 5), (1, 40), (3, 67)]);
    let got = [guest.get(DATA, 5), guest.get(DATA + 0x1000, 10), guest.get(DATA + 0x2000, 30)];
    let got = [got.concat(), guest.get(DATA + 0x3000, 67)].concat();
    assert_eq!(got, [plain(3), frame].concat());
    // The buffer that was not needed gets the next frame.
    let next = frame_of(60);
    guest.arrives(&next);
    assert_eq!(guest.ring(0).used_element(3), (4, 72));
}

fn frame_of(len: usize) -> Vec<u8> {
    frame(MAC, len)
}

#[test]
fn frames_wait_in_the_tap_while_the_guest_has_no_buffer() {
    let mut guest = Guest::started(LINUX);
    guest.arrives(&frame(MAC, 60));
    guest.arrives(&frame(MAC, 70));
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.offer(0, &[buffer(0, 1600)]);
    assert_eq!((guest.ring(0).used_index(), guest.ring(0).used_element(0)), (1, (0, 72)));
    guest.offer(0, &[buffer(1, 1600)]);
    assert_eq!((guest.ring(0).used_index(), guest.ring(0).used_element(1)), (2, (1, 82)));
}

#[test]
fn a_frame_waits_for_as_many_buffers_as_it_needs_and_arrives_once() {
    let mut guest = Guest::started(LINUX);
    for number in 0..3 {
        guest.ring(0).offer(&[buffer(number, 100)]);
    }
    guest.ring_doorbell(0);
    let frame = frame(MAC, 400);
    guest.arrives(&frame);
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.offer(0, &[buffer(3, 100)]);
    assert_eq!(guest.ring(0).used_index(), 0, "400 bytes and their header are more than 400");
    guest.offer(0, &[buffer(4, 100)]);
    assert_eq!(guest.ring(0).used_index(), 5);
    assert_eq!(guest.get(DATA, 100), [plain(5), frame[..88].to_vec()].concat());
    assert_eq!(guest.get(DATA + 0x4000, 12), frame[388..]);
    guest.offer(0, &[buffer(5, 100)]);
    assert_eq!(guest.ring(0).used_index(), 5);
}

#[test]
fn a_pause_finds_nothing_in_flight_although_a_frame_is_held() {
    let mut guest = Guest::started(LINUX);
    guest.offer(0, &[buffer(0, 100)]);
    guest.arrives(&frame(MAC, 400));
    guest.function.pause();
    guest.function.drain(std::time::Instant::now()).unwrap();
    guest.offer(0, &[buffer(1, 400)]);
    assert_eq!(guest.ring(0).used_index(), 0, "a paused device touches no memory");
    guest.function.resume();
    guest.run();
    assert_eq!(guest.ring(0).used_index(), 2);
}

#[test]
fn a_driver_without_mergeable_buffers_gets_a_frame_in_one_or_not_at_all() {
    let mut guest = Guest::started(LINUX & !F_MRG_RXBUF);
    guest.ring(0).offer(&[buffer(0, 100)]);
    guest.ring(0).offer(&[buffer(1, 1600)]);
    guest.ring_doorbell(0);
    guest.arrives(&frame(MAC, 1000));
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, 80));
    assert_eq!((guest.ring(0).used_index(), guest.ring(0).used_element(0)), (1, (0, 92)));
    assert_eq!(guest.get(DATA, 12), plain(1));
    guest.arrives(&frame(MAC, 1000));
    assert_eq!((guest.ring(0).used_index(), guest.ring(0).used_element(1)), (2, (1, 1012)));
}

#[test]
fn the_largest_frame_arrives_and_what_is_longer_does_not() {
    let mut guest = Guest::started(LINUX);
    let lay_out = |guest: &mut Guest| {
        for number in 0..20 {
            guest.ring(0).offer(&[buffer(number, 4096)]);
        }
        guest.ring_doorbell(0);
    };
    lay_out(&mut guest);
    guest.arrives(&frame(MAC, FRAME_MAX + 1));
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, FRAME_MAX));
    assert_eq!(guest.ring(0).used_index(), 17);
    assert_eq!(guest.get(DATA, 12), plain(17));
}

#[test]
fn what_is_no_frame_is_dropped() {
    let mut guest = Guest::started(LINUX);
    guest.offer(0, &[buffer(0, 1600)]);
    for len in [1, 11, 12, 17, 18, 25] {
        guest.wire[0].send(&vec![0; len]).unwrap();
        guest.run();
    }
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, 60));
    assert_eq!(guest.ring(0).used_element(0), (0, 72));
}

#[test]
fn a_driver_is_not_given_segments_or_checksums_that_it_did_not_ask_for() {
    let segments = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    for (features, frames) in [(LINUX, 2), (LINUX & !F_GUEST_TSO4, 1), (0, 0)] {
        let mut guest = Guest::started(features);
        for number in 0..4 {
            guest.ring(0).offer(&[buffer(number, 1600)]);
        }
        guest.ring_doorbell(0);
        guest.arrives_with(segments, &frame(MAC, 1000));
        guest.arrives_with([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &frame(MAC, 1000));
        assert_eq!(guest.ring(0).used_index(), frames, "{features:#x}");
    }
}

#[test]
fn buffers_that_the_device_cannot_write_to_take_nothing_and_stop_nobody() {
    let wrong: [&[Part]; 4] = [
        &[(DATA, 1600, 0)],
        &[(0x9_0000, 1600, WRITE)],
        &[(0x7_ff00, 1600, WRITE)],
        &[(DATA, 0, WRITE)],
    ];
    for parts in wrong {
        let mut guest = Guest::started(LINUX);
        guest.ring(0).offer(parts);
        guest.ring(0).offer(&[buffer(1, 1600)]);
        guest.ring_doorbell(0);
        let frame = frame(MAC, 60);
        guest.arrives(&frame);
        assert_eq!(guest.ring(0).used_index(), 2);
        assert_eq!(guest.ring(0).used_element(0), (0, 0), "{parts:x?}");
        assert_eq!(guest.get(DATA + 0x1000, 72), [plain(2), frame].concat());
    }
}

#[test]
fn a_ring_that_is_too_small_for_a_frame_loses_it_and_gets_the_next() {
    let mut guest = Guest::started(LINUX);
    for number in 0..256 {
        guest.ring(0).offer(&[(DATA + 4 * number, 1, WRITE)]);
    }
    guest.ring_doorbell(0);
    guest.arrives(&frame(MAC, 400));
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, 100));
    assert_eq!(guest.ring(0).used_index(), 112);
}

#[test]
fn a_short_ring_that_is_too_small_for_a_frame_loses_it_and_gets_the_next() {
    let mut guest = Guest::new(1);
    guest.start_with(LINUX, &[0, 1, 2], 16);
    for number in 0..16 {
        guest.ring(0).offer(&[buffer(number, 100)]);
    }
    guest.ring_doorbell(0);
    // The driver has no more buffers, so it can never have enough for this one.
    guest.arrives(&frame(MAC, 1600));
    assert_eq!(guest.ring(0).used_index(), 0);
    guest.arrives(&frame(MAC, 1588));
    assert_eq!(guest.ring(0).used_index(), 16);
}

#[test]
fn a_short_ring_of_buffers_in_parts_that_is_too_small_for_a_frame_loses_it_and_gets_the_next() {
    // With buffers of three descriptors one of the 16 entries stays free.
    for (parts, buffers) in [(2, 8), (3, 5)] {
        let mut guest = Guest::new(1);
        guest.start_with(LINUX, &[0, 1, 2], 16);
        for number in 0..buffers {
            let part = |part| (DATA + 0x1000 * number + 100 * part, 100, WRITE);
            let parts: Vec<Part> = (0..parts).map(part).collect();
            guest.ring(0).offer(&parts);
        }
        guest.ring_doorbell(0);
        let room = 100 * (parts * buffers) as usize;
        guest.arrives(&frame(MAC, room));
        assert_eq!(guest.ring(0).used_index(), 0);
        guest.arrives(&frame(MAC, room - header::LEN));
        assert_eq!(u64::from(guest.ring(0).used_index()), buffers, "{parts} parts");
    }
}

#[test]
fn a_frame_waits_for_buffers_that_lie_in_indirect_tables() {
    const TABLES: u64 = 0x3_f000;
    let mut guest = Guest::new(1);
    guest.start_with(LINUX | RING_INDIRECT_DESC, &[0, 1, 2], 16);
    let offer = |guest: &mut Guest, number: u64| {
        let table = TABLES + 32 * number;
        let at = DATA + 0x1000 * number;
        guest.ring(0).describe(table, 0, (at, 100, WRITE | NEXT), 1);
        guest.ring(0).describe(table, 1, (at + 100, 100, WRITE), 0);
        guest.ring(0).offer(&[(table, 32, INDIRECT)]);
    };
    (0..8).for_each(|number| offer(&mut guest, number));
    guest.ring_doorbell(0);
    // The driver has used half of the entries, each for a table.
    guest.arrives(&frame(MAC, 1700));
    assert_eq!(guest.ring(0).used_index(), 0);
    offer(&mut guest, 8);
    guest.ring_doorbell(0);
    assert_eq!(guest.ring(0).used_index(), 9);
}

#[test]
fn many_frames_are_received_in_their_order() {
    let mut guest = Guest::started(LINUX);
    for number in 0..200 {
        guest.ring(0).offer(&[(DATA + 0x200 * number, 512, WRITE)]);
    }
    let mut sent = 0;
    // As many as the wire takes, which the device reads in several goes.
    while sent < 200 {
        let frame = frame(MAC, 60 + sent as usize);
        match guest.wire[0].send(&[&[0; header::LEN][..], &frame].concat()) {
            Ok(_) => sent += 1,
            Err(_) => guest.ring_doorbell(0),
        }
    }
    guest.ring_doorbell(0);
    assert_eq!(guest.ring(0).used_index(), 200);
    for number in 0..200 {
        assert_eq!(guest.ring(0).used_element(number), (number.into(), 72 + u32::from(number)));
    }
}

/// Has the driver use MSI-X with one vector, for its receive queue.
fn interrupt_at_receive(guest: &mut Guest) {
    use crate::devices::pci::{PciFunction, msix};
    let mut byte = |at: u8| {
        let mut byte = [0];
        guest.function.read_config(at, &mut byte);
        byte[0]
    };
    let mut at = byte(0x34);
    while byte(at) != msix::CAPABILITY {
        at = byte(at + 1);
    }
    guest.function.write_config(at + 2, &0x8000u16.to_le_bytes());
    // Vector 0: its message, and not masked.
    guest.write(0x4000, 0xfee0_0000, 8);
    guest.write(0x4008, 0x30, 8);
    guest.write(0x16, 0, 2);
    guest.write(0x1a, 0, 2);
}

#[test]
fn frames_that_wait_in_the_tap_interrupt_the_driver_once_for_a_quarter_of_the_ring() {
    // Each frame takes nine buffers of 100 bytes.
    for (frames, interrupts) in [(1, 1), (2, 1), (8, 1), (10, 2)] {
        let mut guest = Guest::started(LINUX);
        interrupt_at_receive(&mut guest);
        for number in 0..frames {
            let bytes = [&[0; header::LEN][..], &frame(MAC, 800 + number)].concat();
            guest.wire[0].send(&bytes).unwrap();
        }
        for number in 0..9 * frames as u64 {
            guest.ring(0).offer(&[(DATA + 0x100 * number, 100, WRITE)]);
        }
        guest.ring_doorbell(0);
        assert_eq!(usize::from(guest.ring(0).used_index()), 9 * frames);
        let last = guest.ring(0).used_element(9 * frames as u16 - 1);
        assert_eq!(last.1 as usize, 12 + 800 + frames - 1 - 800, "all of the last frame");
        assert_eq!(guest.wires.taken(0), interrupts, "{frames} frames");
    }
}

/// The header of segments that no driver can ask this device for.
const UNWANTED: [u8; header::LEN] = [1, 5, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// A guest that has just received a large frame, with as many buffers of `len` bytes. They lie from [`DATA`] on.
fn after_a_large_frame(count: u64, len: u32) -> Guest {
    let mut guest = Guest::started(LINUX);
    for number in 0..5 {
        guest.ring(0).offer(&[buffer(number, 4096)]);
    }
    guest.ring_doorbell(0);
    guest.arrives(&frame(MAC, 20_000));
    assert_eq!(guest.ring(0).used_index(), 5);
    for number in 0..count {
        guest.ring(0).offer(&[(DATA + u64::from(len) * number, len, WRITE)]);
    }
    guest.ring_doorbell(0);
    guest
}

#[test]
fn a_frame_after_a_large_one_goes_straight_into_the_guests_buffers() {
    // The longest frame and one byte fill these buffers.
    let (count, len) = (40, 1640);
    for size in [20_000, FRAME_MAX, 60, 14] {
        let mut guest = after_a_large_frame(count, len);
        // A frame that the driver must not get shows which way it went: its bytes are there all the same.
        guest.put(DATA, &[0xee; 100]);
        guest.arrives_with(UNWANTED, &frame(OTHER, 60));
        assert_eq!(guest.ring(0).used_index(), 5);
        let untouched = [0xee; 26];
        assert_eq!(
            guest.get(DATA, 26),
            untouched,
            "what the device checks is not in the guest's reach"
        );
        assert_eq!(guest.get(DATA + 26, 46), frame(OTHER, 60)[14..]);

        let mut guest = after_a_large_frame(count, len);
        let sent = frame(MAC, size);
        guest.arrives(&sent);
        let buffers = (12 + size).div_ceil(1640);
        assert_eq!(usize::from(guest.ring(0).used_index()), 5 + buffers, "{size}");
        assert_eq!(guest.get(DATA, 12 + size), [&plain(buffers as u8)[..], &sent].concat());
        let last = guest.ring(0).used_element(5 + buffers as u16 - 1);
        assert_eq!(last.1 as usize, 12 + size - 1640 * (buffers - 1));
        // The buffers that it did not need take the next one.
        let place = DATA + 1640 * buffers as u64;
        if buffers < 39 {
            guest.arrives(&frame(MAC, 70));
            assert_eq!(usize::from(guest.ring(0).used_index()), 6 + buffers);
            assert_eq!(guest.get(place, 82), [plain(1), frame(MAC, 70)].concat());
        }
    }
}

#[test]
fn what_is_no_frame_for_the_driver_is_dropped_also_behind_a_large_frame() {
    for bytes in [vec![0; 11], vec![0; 17], vec![0; 25], vec![0; header::LEN + FRAME_MAX + 1]] {
        let mut guest = after_a_large_frame(41, 1640);
        guest.wire[0].send(&bytes).unwrap();
        guest.run();
        assert_eq!(guest.ring(0).used_index(), 5, "{}", bytes.len());
        guest.arrives(&frame(MAC, 100));
        assert_eq!(guest.ring(0).used_element(5).1, 112);
    }
    // Segments that the driver has not asked for.
    let mut guest = after_a_large_frame(41, 1640);
    guest.arrives_with(UNWANTED, &frame(MAC, 1000));
    assert_eq!(guest.ring(0).used_index(), 5);
}

#[test]
fn a_guest_with_few_or_strange_buffers_gets_its_frames_also_behind_a_large_one() {
    // Too few for the longest frame.
    let mut guest = after_a_large_frame(39, 1640);
    guest.arrives(&frame(MAC, 30_000));
    assert_eq!(guest.ring(0).used_index(), 5 + 19);
    assert_eq!(guest.get(DATA + 12, 30_000), frame(MAC, 30_000));
    // Buffers that are shorter than the headers, and one that cannot be written to.
    let mut guest = after_a_large_frame(0, 0);
    for parts in
        [&[(DATA, 5, WRITE)][..], &[(DATA, 100, 0)], &[(DATA + 5, 3, WRITE), (DATA + 8, 10, WRITE)]]
    {
        guest.ring(0).offer(parts);
    }
    for number in 0..17 {
        guest.ring(0).offer(&[(DATA + 18 + 4096 * number, 4096, WRITE)]);
    }
    guest.ring_doorbell(0);
    guest.arrives(&frame(MAC, 9000));
    let used: Vec<_> = (5..11).map(|number| guest.ring(0).used_element(number).1).collect();
    assert_eq!(used, [5, 0, 13, 4096, 4096, 802]);
    assert_eq!(guest.get(DATA, 9012), [plain(6), frame(MAC, 9000)].concat());
    guest.function.pause();
    guest.function.drain(std::time::Instant::now()).unwrap();
}
