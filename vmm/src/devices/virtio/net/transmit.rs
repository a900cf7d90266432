//! Frames from the guest into the tap.

use std::thread;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::header::{self, Header};
use super::{FRAME_MAX, LARGE, NetWorker, QUEUE_SIZE};
use crate::devices::virtio::{Chain, Rings};

impl NetWorker {
    /// Sends the frames in the transmit queue of the pair.
    ///
    /// A guest that sends large frames is about to send more. If it shares a CPU with this thread it has to be let
    /// go on: otherwise this thread goes before it each time that it wakes up, and the guest stops for each frame.
    pub(super) fn transmit(&mut self, rings: &Rings) {
        if self.send(rings) > LARGE {
            thread::yield_now();
            // After the thread's other events, such as the answers to these frames.
            rings.look_again(2 * self.pair + 1);
        }
    }

    /// Sends the frames, and returns the size of the largest.
    fn send(&mut self, rings: &Rings) -> usize {
        let pair = self.pair;
        let (shared, reported) = (&self.shared, &mut self.reported);
        let mut largest = 0;
        rings.serve(2 * pair + 1, |chain| {
            // A pair that is not in use has no queue of the tap. A link that is down takes every frame and
            // carries none.
            if !shared.driver().carries(pair) {
                return 0;
            }
            match collect(rings.memory(), chain, shared.features()) {
                Ok(Frame { header, pieces, len }) => {
                    largest = largest.max(len);
                    if let Err(error) = shared.taps[pair].write(header.to_bytes(), &pieces) {
                        shared.tap_failed(pair, "send", &error, rings);
                    }
                }
                // Only the first is a warning: otherwise a hostile guest could fill the host's log.
                Err(problem) => match std::mem::replace(reported, true) {
                    false => tracing::warn!("tap {}: a frame is dropped: {problem}", shared.name),
                    true => tracing::debug!("tap {}: a frame is dropped: {problem}", shared.name),
                },
            }
            // The device writes nothing into the guest's buffers.
            0
        });
        largest
    }
}

/// A frame in guest memory.
struct Frame<'m> {
    /// Copied and checked.
    header: Header,
    pieces: Vec<VolatileSlice<'m>>,
    /// Bytes in all pieces.
    len: usize,
}

/// Finds the frame of a chain. A driver may divide header and frame into any descriptors (2.7.4.1). The error says why
/// the frame is not sent.
fn collect(
    memory: &GuestMemoryMmap,
    chain: Chain,
    features: u64,
) -> Result<Frame<'_>, &'static str> {
    let (mut bytes, mut filled) = ([0; header::LEN], 0);
    let (mut pieces, mut len) = (Vec::new(), 0);
    for (number, descriptor) in chain.enumerate() {
        // No chain is longer than the queue (2.7.5.3.1).
        if number == usize::from(QUEUE_SIZE) {
            return Err("it is in too many pieces");
        }
        if descriptor.is_write_only() {
            return Err("a part of it is a buffer for the device to write into");
        }
        let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize);
        let slice = slice.map_err(|_| "a part of it is not in RAM")?;
        let count = slice.len().min(header::LEN - filled);
        // The header is copied once; the copy is checked and used.
        let copied = slice.read_slice(&mut bytes[filled..filled + count], 0);
        copied.map_err(|_| "its header cannot be read")?;
        filled += count;
        let rest = slice.offset(count).map_err(|_| "its header cannot be read")?;
        len += rest.len();
        if len > FRAME_MAX {
            return Err("it is longer than a frame can be");
        }
        if !rest.is_empty() {
            pieces.push(rest);
        }
    }
    if filled < header::LEN {
        return Err("it is shorter than its header");
    }
    let header = Header::from_bytes(bytes).checked_to_send(features, len)?;
    Ok(Frame { header, pieces, len })
}
