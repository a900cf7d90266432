//! Puts requests into the used ring (2.7.8), several at once if need be. A received frame can lie in the buffers of
//! several requests, and a driver that found some of them without the others would take the frame for damaged.
//!
//! virtio-queue adds one request at a time, shows each to the driver at once, and interrupts also a driver that does
//! not want that (`VIRTQ_AVAIL_F_NO_INTERRUPT`).

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes in front of the elements of both rings: flags and index.
const HEADER: u64 = 4;
/// Bytes of an element of the available ring and of the used ring.
const AVAILABLE_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, a flag of the available ring: the driver looks at the used ring by itself.
const NO_INTERRUPT: u16 = 1;

/// Adds requests, as head and number of bytes written, and then says so. Returns whether the driver
/// wants to be interrupted (2.7.7.2).
pub(super) fn add(
    queue: &mut Queue,
    used: &[(u16, u32)],
    memory: &GuestMemoryMmap,
) -> Result<bool, Error> {
    let size = queue.size();
    let before = Wrapping(queue.next_used());
    let mut after = before;
    for (head, len) in used {
        if *head >= size {
            return Err(Error::InvalidDescriptorIndex);
        }
        let offset = HEADER + u64::from(after.0 % size) * USED_ELEMENT;
        let element = u64::from(*head) | u64::from(*len) << 32;
        let address = at(queue.used_ring(), offset)?;
        memory.write_obj(element.to_le(), address).map_err(Error::GuestMemory)?;
        after += 1;
    }
    queue.set_next_used(after.0);
    let index = at(queue.used_ring(), 2)?;
    memory.store(after.0.to_le(), index, Ordering::Release).map_err(Error::GuestMemory)?;
    // The driver must see the index before its answer is read: it writes the flag or `used_event` first and
    // then looks at the index.
    fence(Ordering::SeqCst);
    if !queue.event_idx_enabled() {
        let flags = at(queue.avail_ring(), 0)?;
        let flags: u16 = memory.load(flags, Ordering::Relaxed).map_err(Error::GuestMemory)?;
        return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
    }
    let event = at(queue.avail_ring(), HEADER + u64::from(size) * AVAILABLE_ELEMENT)?;
    let event: u16 = memory.load(event, Ordering::Relaxed).map_err(Error::GuestMemory)?;
    let event = Wrapping(u16::from_le(event));
    Ok(after - event - Wrapping(1) < after - before)
}

fn at(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    ring.checked_add(offset).map(GuestAddress).ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{Ring, ram};

    const SIZE: u16 = 8;

    /// A queue, and the driver's view of it.
    fn queue(event_idx: bool) -> (Queue, Ring, GuestMemoryMmap) {
        let memory = ram();
        let ring = Ring::new(&memory, 0x4000, SIZE);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_avail_ring_address(Some(ring.available() as u32), None);
        queue.set_used_ring_address(Some(ring.used() as u32), None);
        queue.set_event_idx(event_idx);
        (queue, ring, memory)
    }

    #[test]
    fn all_requests_are_added_and_the_ring_wraps() {
        let (mut queue, ring, memory) = queue(false);
        queue.set_next_used(6);
        let used = [(3, 10), (4, 20), (0, 30)];
        assert!(add(&mut queue, &used, &memory).unwrap(), "no flag says otherwise");
        assert_eq!((ring.used_index(), queue.next_used()), (9, 9));
        let elements: Vec<_> = (6..9).map(|number| ring.used_element(number)).collect();
        assert_eq!(elements, [(3, 10), (4, 20), (0, 30)]);
    }

    #[test]
    fn the_flag_of_a_driver_that_wants_no_interrupt_counts_without_event_idx_only() {
        for (event_idx, flags, wanted) in
            [(false, 1, false), (false, 0, true), (false, 2, true), (true, 1, true)]
        {
            let (mut queue, ring, memory) = queue(event_idx);
            ring.set_available_flags(flags);
            let interrupt = add(&mut queue, &[(3, 10)], &memory).unwrap();
            assert_eq!((interrupt, ring.used_index()), (wanted, 1), "{event_idx}, {flags}");
        }
    }

    #[test]
    fn the_driver_is_interrupted_when_the_request_that_it_waits_for_is_among_them() {
        for (event, wanted) in [(5, false), (6, true), (7, true), (8, true), (9, false)] {
            let (mut queue, ring, memory) = queue(true);
            queue.set_next_used(6);
            ring.set_used_event(event);
            let used = [(3, 10), (4, 20), (0, 30)];
            assert_eq!(add(&mut queue, &used, &memory).unwrap(), wanted, "{event}");
        }
    }

    #[test]
    fn a_head_or_a_ring_that_cannot_be_is_an_error_and_shows_nothing() {
        let (mut queue, ring, memory) = queue(true);
        let error = add(&mut queue, &[(0, 1), (SIZE, 1)], &memory).unwrap_err();
        assert!(matches!(error, Error::InvalidDescriptorIndex));
        assert_eq!((ring.used_index(), queue.next_used()), (0, 0));
        queue.set_used_ring_address(Some(0x9_0000), None);
        add(&mut queue, &[(0, 1)], &memory).expect_err("no RAM");
    }
}
