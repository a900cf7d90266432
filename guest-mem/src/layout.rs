//! The layout of a guest's RAM: its guest addresses (slots) and how they are cut into segments.
//!
//! A layout is plain numbers, computed before any memory is allocated. The same slots and the same
//! segment size always give the same layout, so a restore computes it again from those numbers.

use crate::Error;

/// Bytes of a small page.
pub const PAGE: u64 = 4096;
/// Bytes of a huge page of x86-64, and of a huge folio.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Most segments with the default segment size. Each segment costs one token of a session and one fd in
/// each of two processes.
const DEFAULT_MAX_SEGMENTS: u64 = 64;
/// Smallest default segment size, in bytes. With smaller segments, less of a sparsely used guest is
/// preserved, but more folios are cut off at a segment's end.
const DEFAULT_MIN_SEGMENT: u64 = 64 << 20;
/// Most segments when the caller chooses the segment size.
const MAX_SEGMENTS: u64 = 1024;
/// Most slots. A PC has two: below and above the PCI hole.
const MAX_SLOTS: usize = 16;
/// Most pages in one memfd that LUO preserves (Linux `mm/memfd_luo.c`, EFBIG above it).
const MAX_SEGMENT_PAGES: u64 = u32::MAX as u64;

/// A range of guest-physical addresses: one KVM memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// First guest-physical address, in bytes. A multiple of [`PAGE`]; huge pages need a multiple of
    /// [`HUGE_PAGE`].
    pub guest_base: u64,
    /// Length in bytes, a multiple of [`PAGE`].
    pub len: u64,
}

/// Place of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentPlan {
    /// Index of the slot that the segment is part of.
    pub slot: usize,
    /// Start of the segment within the slot, in bytes.
    pub offset_in_slot: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A checked layout of a guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    segments: Vec<SegmentPlan>,
    segment_bytes: u64,
    total: u64,
}

impl Layout {
    /// Cuts `slots` into segments of `segment_bytes`, a multiple of [`PAGE`] and preferably of
    /// [`HUGE_PAGE`]. The last segment of a slot is the remainder. Errors unless the slots ascend and do
    /// not overlap.
    ///
    /// Without `segment_bytes`, the size is the smallest multiple of 2 MiB that is at least 64 MiB and
    /// is sure to give no more than 64 segments.
    pub fn new(slots: &[Slot], segment_bytes: Option<u64>) -> Result<Self, Error> {
        let total = check_slots(slots).map_err(Error::Layout)?;
        let segment_bytes = match segment_bytes {
            Some(bytes) => check_segment_bytes(bytes, slots).map_err(Error::Layout)?,
            None => default_segment_bytes(total, slots.len() as u64),
        };
        let mut segments = Vec::new();
        for (index, slot) in slots.iter().enumerate() {
            let mut offset = 0;
            while offset < slot.len {
                let len = segment_bytes.min(slot.len - offset);
                segments.push(SegmentPlan { slot: index, offset_in_slot: offset, len });
                offset += len;
            }
        }
        if let Some(index) = segments.iter().position(|plan| plan.len / PAGE > MAX_SEGMENT_PAGES) {
            let problem = format!(
                "segment {index} has {} pages, LUO preserves at most {MAX_SEGMENT_PAGES}",
                segments[index].len / PAGE
            );
            return Err(Error::Layout(problem));
        }
        Ok(Self { slots: slots.to_vec(), segments, segment_bytes, total })
    }

    /// The slots, in ascending order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The segments, in the order of their guest addresses.
    pub fn segments(&self) -> &[SegmentPlan] {
        &self.segments
    }

    /// The size in bytes of every segment that is not the last of its slot. [`Layout::new`] with this
    /// size gives the same layout again.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// All of the guest's RAM, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }
}

/// Returns the sum of the slots' lengths in bytes, or what is wrong with a slot.
fn check_slots(slots: &[Slot]) -> Result<u64, String> {
    if slots.is_empty() || slots.len() > MAX_SLOTS {
        return Err(format!("there are {} slots, not 1 to {MAX_SLOTS}", slots.len()));
    }
    let mut end_of_previous = 0;
    let mut total: u64 = 0;
    for (index, Slot { guest_base, len }) in slots.iter().copied().enumerate() {
        if len == 0 {
            return Err(format!("slot {index} is empty"));
        }
        if !guest_base.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(format!(
                "slot {index} is {len:#x} bytes at {guest_base:#x}, not whole pages of {PAGE}"
            ));
        }
        let Some(end) = guest_base.checked_add(len) else {
            return Err(format!(
                "slot {index} is {len:#x} bytes at {guest_base:#x}, which ends beyond 64 bits"
            ));
        };
        if guest_base < end_of_previous {
            return Err(format!(
                "slot {index} starts at {guest_base:#x}, the one before it ends at \
                 {end_of_previous:#x}"
            ));
        }
        end_of_previous = end;
        // Slots do not overlap and end within 64 bits, so their sum does too.
        total += len;
    }
    // Host mappings and file sizes are signed.
    if i64::try_from(total).is_err() {
        return Err(format!("{total:#x} bytes are more than a process can map"));
    }
    Ok(total)
}

fn check_segment_bytes(bytes: u64, slots: &[Slot]) -> Result<u64, String> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(format!("a segment of {bytes:#x} bytes is not whole pages of {PAGE}"));
    }
    let segments: u64 = slots.iter().map(|slot| slot.len.div_ceil(bytes)).sum();
    if segments > MAX_SEGMENTS {
        return Err(format!(
            "segments of {bytes:#x} bytes make {segments}, the most is {MAX_SEGMENTS}"
        ));
    }
    Ok(bytes)
}

fn default_segment_bytes(total: u64, slots: u64) -> u64 {
    // The last segment of every slot may be smaller: n slots cut into segments of s bytes make fewer
    // than total / s + n segments.
    let enough = total.div_ceil(DEFAULT_MAX_SEGMENTS - slots).next_multiple_of(HUGE_PAGE);
    enough.max(DEFAULT_MIN_SEGMENT)
}
