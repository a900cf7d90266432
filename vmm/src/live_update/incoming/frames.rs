//! Where guest memory lies in the host's RAM, before and after a live update.

use guest_mem::{FrameDigest, Segment};

use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::entry::VmEntry;

/// The page frames of one segment in both kernels.
#[derive(Debug, Clone, Copy)]
pub struct FrameComparison {
    /// Size of the segment in bytes.
    pub bytes: u64,
    /// Digest in the old kernel, when the segment was preserved.
    pub before: FrameDigest,
    /// Digest in this kernel.
    pub after: FrameDigest,
}

/// Computes the digests of the page frames of those segments for which the manifest has a digest. Returns
/// them with the TSC at the end. This happens in the blackout, because once the VM's process has mapped
/// the segments with the advice to use huge pages, the kernel may merge small pages into huge ones.
pub(super) fn compare(
    segments: &[Segment],
    entry: &mut VmEntry,
    start: u64,
) -> (Vec<FrameComparison>, u64) {
    let known = segments.iter().zip(&entry.segments);
    let known = known.filter_map(|(segment, entry)| Some((segment, entry.frames?)));
    let frames = known.map(|(segment, before)| {
        Ok(FrameComparison { bytes: segment.len(), before, after: FrameDigest::of(segment)? })
    });
    let frames: Result<Vec<_>, guest_mem::Error> = frames.collect();
    let frames = frames.unwrap_or_else(|error| {
        // A failed comparison is only logged: the guest can still be resumed.
        let why = chain(&error).join(": ");
        tracing::error!("VM `{}`: cannot verify its page frames: {why}", entry.machine.name);
        Vec::new()
    });
    if frames.is_empty() {
        return (frames, start);
    }
    let end = tsc::now();
    entry.ledger.enter("verify-frames", start, end);
    (frames, end)
}
