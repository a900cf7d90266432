//! Frames from the guest into the tap.

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::header::{self, Header};
use super::{FRAME_MAX, NetWorker, QUEUE_SIZE};
use crate::devices::virtio::{Chain, Rings};

impl NetWorker {
    /// Sends the frames in the transmit queue of the pair.
    pub(super) fn transmit(&mut self, rings: &Rings) {
        let pair = self.pair;
        let (shared, reported) = (&self.shared, &mut self.reported);
        rings.serve(2 * pair + 1, |chain| {
            // A pair that is not in use has no queue of the tap. A link that is down takes every frame and
            // carries none.
            if !shared.driver().carries(pair) {
                return 0;
            }
            match collect(rings.memory(), chain, shared.features()) {
                Ok((header, frame)) => {
                    if let Err(error) = shared.taps[pair].write(header.to_bytes(), &frame) {
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
    }
}

/// Returns the checked header of a frame, and the pieces of the frame. A driver may divide both into any
/// descriptors (2.7.4.1). The error says why the frame is not sent.
fn collect(
    memory: &GuestMemoryMmap,
    chain: Chain,
    features: u64,
) -> Result<(Header, Vec<VolatileSlice<'_>>), &'static str> {
    let (mut bytes, mut filled) = ([0; header::LEN], 0);
    let (mut frame, mut len) = (Vec::new(), 0);
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
            frame.push(rest);
        }
    }
    if filled < header::LEN {
        return Err("it is shorter than its header");
    }
    let header = Header::from_bytes(bytes).checked_to_send(features, len)?;
    Ok((header, frame))
}
