//! Frames from the tap to the guest.
//!
//! ```text
//!   nothing held --a buffer of the guest, a frame in the tap--> frame held
//!        ^                                                          |
//!        +--- delivered, or dropped because the guest cannot take it+   enough buffers
//! ```
//!
//! A frame is held only while the guest's buffers are too few for it.
//!
//! Frames that wait in the tap are shown to the guest together, up to a quarter of the ring: each time that the
//! device shows something it looks at what the driver wants, and may interrupt it. A guest that is interrupted for the
//! first of many frames would handle it, stop, and be interrupted again for the next.

use std::io;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::header::{self, Header};
use super::{F_MRG_RXBUF, FRAME_MAX, NetWorker, QUEUE_SIZE, Shared};
use crate::devices::interface::Mac;
use crate::devices::network::Link;
use crate::devices::virtio::{Chain, Request, Rings};

/// Most frames of a queue before the thread handles its other events.
const BATCH: usize = 64;

/// Buffers that the device fills before the guest sees them: a quarter of the ring, so that the guest can work on
/// them while the device fills the next.
const TOGETHER: usize = QUEUE_SIZE as usize / 4;

/// Buffers of the guest with frames that the guest has not seen yet, and the number of bytes in each.
type Filled = Vec<(Request, u32)>;

/// Receives the frames of one queue.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// Room for a frame with its header. The first frame allocates it.
    bytes: Vec<u8>,
    /// Length of the held frame with its header, in bytes; 0 if no frame is held.
    len: usize,
}

/// The outcome of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The frame was delivered or dropped.
    Done,
    /// The frame is held, because the guest has too few buffers.
    Held,
}

impl NetWorker {
    /// Delivers the frames of the pair's queue of the tap.
    pub(super) fn receive(&mut self, rings: &Rings) {
        let (pair, shared, receiver) = (self.pair, &self.shared, &mut self.receiver);
        let queue = 2 * pair;
        // A pair that is not in use has no queue of the tap, and its receive queue may be the control
        // queue of a driver without MQ.
        if !shared.driver().carries(pair) {
            return receiver.discard(shared, pair, rings);
        }
        let mut filled = Filled::new();
        let is_done = (0..BATCH).any(|_| {
            if filled.len() >= TOGETHER {
                rings.complete_together(std::mem::take(&mut filled));
            }
            !receiver.pass_on(shared, pair, rings, &mut filled)
        });
        rings.complete_together(filled);
        if !is_done {
            rings.look_again(queue);
        }
    }
}

impl Receiver {
    /// Takes the held frame, or the next of the tap, to the guest. Returns whether there may be another one to pass
    /// on.
    fn pass_on(
        &mut self,
        shared: &Shared,
        pair: usize,
        rings: &Rings,
        filled: &mut Filled,
    ) -> bool {
        let queue = 2 * pair;
        // A frame is read from the tap only if the guest has a buffer for it.
        let Some(first) = rings.take(queue) else {
            // The event may have been the end of the tap.
            if let Err(error) = shared.taps[pair].check() {
                shared.tap_failed(pair, "wait for", &error, rings);
            }
            return false;
        };
        if self.len == 0 && !self.read(shared, pair, rings) {
            rings.give_back(vec![first]);
            return false;
        }
        let outcome = self.deliver(shared, queue, first, rings, filled);
        if outcome == Outcome::Done {
            self.len = 0;
        }
        outcome == Outcome::Done
    }

    /// Drops the held frame, and those in the tap if the link is down: they are not to be delivered later.
    fn discard(&mut self, shared: &Shared, pair: usize, rings: &Rings) {
        self.len = 0;
        if shared.driver().link() != Link::Down {
            return;
        }
        for _ in 0..BATCH {
            if !self.read(shared, pair, rings) {
                return;
            }
            self.len = 0;
        }
        rings.look_again(2 * pair);
    }

    /// Reads a frame from the tap. Returns whether there was one.
    fn read(&mut self, shared: &Shared, pair: usize, rings: &Rings) -> bool {
        // One byte more than the longest frame: a frame that fills it is too long.
        self.bytes.resize(header::LEN + FRAME_MAX + 1, 0);
        match shared.taps[pair].read(&mut self.bytes) {
            Ok(len) => self.len = len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => shared.tap_failed(pair, "receive", &error, rings),
        }
        self.len > 0
    }

    /// Copies the held frame into the guest's buffers, of which `first` is the first, and adds them to `filled`.
    fn deliver(
        &self,
        shared: &Shared,
        queue: usize,
        first: Request,
        rings: &Rings,
        filled: &mut Filled,
    ) -> Outcome {
        let features = shared.features();
        let Some((header, frame)) = self.wanted(shared) else {
            rings.give_back(vec![first]);
            return Outcome::Done;
        };
        let (mut taken, mut room) = (Vec::new(), 0);
        let mut next = Some(first);
        let mut buffers = Vec::new();
        while let Some(request) = next {
            let slices = writable(rings.memory(), request.chain());
            room += slices.iter().map(VolatileSlice::len).sum::<usize>();
            taken.push(request);
            buffers.push(slices);
            // Without MRG_RXBUF a frame has one buffer (5.1.6.4).
            let enough = room >= header::LEN + frame.len() || features & F_MRG_RXBUF == 0;
            next = if enough { None } else { rings.take(queue) };
        }
        if features & F_MRG_RXBUF != 0 && room < header::LEN + frame.len() {
            let is_full = taken.len() >= usize::from(QUEUE_SIZE);
            rings.give_back(taken);
            // If the whole ring is too small for the frame, the guest will never have room for it.
            return if is_full { Outcome::Done } else { Outcome::Held };
        }
        let header = header.checked_to_receive(features, taken.len() as u16);
        let (Some(header), true) = (header, room >= header::LEN + frame.len()) else {
            rings.give_back(taken);
            return Outcome::Done;
        };
        let written = fill(&buffers, &[&header.to_bytes(), frame]);
        filled.extend(taken.into_iter().zip(written));
        Outcome::Done
    }

    /// The held frame and its header. `None` if it is too short or too long for a frame, or if the
    /// driver does not want frames to its destination.
    fn wanted(&self, shared: &Shared) -> Option<(Header, &[u8])> {
        let (header, frame) = self.bytes.get(..self.len)?.split_first_chunk()?;
        let destination = Mac(*frame.first_chunk()?);
        let driver = shared.driver();
        let wanted = frame.len() <= FRAME_MAX && driver.filter.wants(driver.mac, destination);
        wanted.then_some((Header::from_bytes(*header), frame))
    }
}

/// Returns the parts of a chain that the device may write to, in order, up to the first that is not in RAM.
fn writable(memory: &GuestMemoryMmap, chain: Chain) -> Vec<VolatileSlice<'_>> {
    // No chain is longer than the queue (2.7.5.3.1).
    let parts = chain.take(QUEUE_SIZE.into()).filter(|descriptor| descriptor.is_write_only());
    let slices = parts.map_while(|d| memory.get_slice(d.addr(), d.len() as usize).ok());
    slices.filter(|slice| !slice.is_empty()).collect()
}

/// Copies `parts`, one after the other, into the buffers. Returns the number of bytes in each buffer.
fn fill(buffers: &[Vec<VolatileSlice<'_>>], parts: &[&[u8]]) -> Vec<u32> {
    let mut parts = parts.iter().copied();
    let mut rest: &[u8] = parts.next().unwrap_or_default();
    let mut fill_one = |slices: &Vec<VolatileSlice<'_>>| {
        let mut written = 0;
        for slice in slices {
            let mut at = 0;
            while at < slice.len() {
                if rest.is_empty() {
                    match parts.next() {
                        Some(part) => rest = part,
                        None => return written as u32,
                    }
                }
                let count = rest.len().min(slice.len() - at);
                // Within the slice.
                let _ = slice.write_slice(&rest[..count], at);
                rest = &rest[count..];
                at += count;
                written += count;
            }
        }
        written as u32
    };
    buffers.iter().map(&mut fill_one).collect()
}
