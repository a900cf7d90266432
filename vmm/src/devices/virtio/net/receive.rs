//! Frames from the tap to the guest.
//!
//! ```text
//!   nothing held --a buffer of the guest, a frame in the tap--> frame held
//!        ^                                                          |
//!        +--- delivered, or dropped because the guest cannot take it+   enough buffers
//! ```
//!
//! A frame is held only while the guest's buffers are too few for it. While frames are large (segments of TCP), the
//! device reads them straight into the guest's buffers instead, if the guest has enough for any frame.
//!
//! Frames that wait in the tap are shown to the guest together, up to a quarter of the ring: each time that the
//! device shows something it looks at what the driver wants, and may interrupt it. A guest that is interrupted for the
//! first of many frames would handle it, stop, and be interrupted again for the next.

use std::io;

use super::buffers::Buffers;
use super::header::{self, Header};
use super::{F_MRG_RXBUF, FRAME_MAX, FRAME_MIN, LARGE, NetWorker, QUEUE_SIZE, Shared, tap};
use crate::devices::interface::Mac;
use crate::devices::network::Link;
use crate::devices::virtio::{Request, Rings};

/// Most frames of a queue before the thread handles its other events.
const BATCH: usize = 64;

/// Most bytes of a frame with its header.
const LONGEST: usize = header::LEN + FRAME_MAX;

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
    /// Length of the last frame with its header, in bytes.
    last: usize,
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
        let Some(mut first) = rings.take(queue) else { return false };
        // Behind a large frame the next one is read straight into buffers of the guest, with room for the longest: that
        // saves copying it.
        if self.len == 0 && self.last > LARGE && shared.features() & F_MRG_RXBUF != 0 {
            first = match self.read_directly(shared, pair, first, rings, filled) {
                Ok(was_there) => return was_there,
                Err(first) => first,
            };
        }
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
        self.bytes.resize(LONGEST + 1, 0);
        match shared.taps[pair].read(&mut self.bytes) {
            Ok(len) => (self.len, self.last) = (len, len),
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
        let (len, merges) = (header::LEN + frame.len(), features & F_MRG_RXBUF != 0);
        let buffers = Buffers::take(rings, queue, first, len, merges);
        if merges && buffers.room < len {
            let is_all = buffers.exhaust(rings, queue);
            buffers.give_back(rings);
            // If the whole ring is too small for the frame, the guest will never have room for it.
            return if is_all { Outcome::Done } else { Outcome::Held };
        }
        let header = header.checked_to_receive(features, buffers.count() as u16);
        let (Some(header), true) = (header, buffers.room >= len) else {
            buffers.give_back(rings);
            return Outcome::Done;
        };
        buffers.write(&[&header.to_bytes(), frame]);
        buffers.fill(rings, len, filled);
        Outcome::Done
    }

    /// Reads the next frame straight into the guest's buffers, of which `first` is the first, and adds them to
    /// `filled`. Returns whether there was a frame. Returns `first` if the guest has too few buffers for any frame.
    fn read_directly(
        &mut self,
        shared: &Shared,
        pair: usize,
        first: Request,
        rings: &Rings,
        filled: &mut Filled,
    ) -> Result<bool, Request> {
        // The header and the Ethernet header are checked here, where the guest cannot change them.
        let mut front = [0; header::LEN + FRAME_MIN];
        // One byte more than the longest frame: a frame that fills it is too long.
        let buffers = Buffers::take(rings, 2 * pair, first, LONGEST + 1, true);
        let rest = buffers.behind(front.len());
        if buffers.room <= LONGEST || rest.len() >= tap::PIECES_MAX {
            return buffers.give_back_but_first(rings).map_or(Ok(false), Err);
        }
        let len = match shared.taps[pair].read_into(&mut front, &rest) {
            Ok(len) => len,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    shared.tap_failed(pair, "receive", &error, rings);
                }
                0
            }
        };
        if len == 0 {
            buffers.give_back(rings);
            return Ok(false);
        }
        self.last = len;
        let (header, frame) = front.split_at(header::LEN);
        let count = buffers.count_for(len) as u16;
        let header = Some(header)
            .filter(|_| (front.len()..=LONGEST).contains(&len) && is_wanted(shared, frame))
            .and_then(|header| header.try_into().ok())
            .and_then(|header| {
                Header::from_bytes(header).checked_to_receive(shared.features(), count)
            });
        match header {
            Some(header) => {
                buffers.write(&[&header.to_bytes(), frame]);
                buffers.fill(rings, len, filled);
            }
            None => buffers.give_back(rings),
        }
        Ok(true)
    }

    /// The held frame and its header. `None` if it is too short or too long for a frame, or if the
    /// driver does not want frames to its destination.
    fn wanted(&self, shared: &Shared) -> Option<(Header, &[u8])> {
        let (header, frame) = self.bytes.get(..self.len)?.split_first_chunk()?;
        let wanted = (FRAME_MIN..=FRAME_MAX).contains(&frame.len()) && is_wanted(shared, frame);
        wanted.then_some((Header::from_bytes(*header), frame))
    }
}

/// Whether the driver wants frames to the destination of `frame`.
fn is_wanted(shared: &Shared, frame: &[u8]) -> bool {
    let driver = shared.driver();
    frame.first_chunk().is_some_and(|mac| driver.filter.wants(driver.mac, Mac(*mac)))
}
