//! The plan of a guest's RAM: which guest addresses, cut into which segments.
//!
//! A plan is plain numbers, made before anything is allocated. The same slots and the same segment
//! size always give the same plan; both travel in the state document, and the plan is made again.

use crate::Error;

/// Bytes of a small page.
pub const PAGE: u64 = 4096;
/// Bytes of a huge page of x86-64, and of a huge folio.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The default size is chosen so that there are no more segments than this. Each is one token of a
/// session and one fd in two processes.
const DEFAULT_MAX_SEGMENTS: u64 = 64;
/// Smallest default size. Smaller ones preserve less of a sparsely used guest, but mean more folios
/// that are cut off at a segment's end.
const DEFAULT_MIN_SEGMENT: u64 = 64 << 20;
/// Most segments when the caller chooses the size.
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

/// Where one segment goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentPlan {
    /// Index of the slot.
    pub slot: usize,
    /// Where the segment starts in the slot, in bytes.
    pub offset_in_slot: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A checked plan of a guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    segments: Vec<SegmentPlan>,
    segment_bytes: u64,
    total: u64,
}

impl Layout {
    /// Plans `slots`, which ascend and do not overlap, in segments of `segment_bytes` (a multiple of
    /// [`PAGE`]; better one of [`HUGE_PAGE`]). The last segment of a slot takes what is left.
    ///
    /// Without `segment_bytes`, segments are as small as makes sense: at least 64 MiB, a multiple of
    /// 2 MiB, and no more than 64 of them.
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

    /// The size of every segment that is not the last of its slot, in bytes: what to give to
    /// [`Layout::new`] to have the same plan again.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// All of the guest's RAM, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }
}

/// The sum of the lengths, if every slot is sound.
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
    // Every slot may end in a segment that is not full: n slots cut into segments of s bytes are
    // fewer than total / s + n.
    let enough = total.div_ceil(DEFAULT_MAX_SEGMENTS - slots).next_multiple_of(HUGE_PAGE);
    enough.max(DEFAULT_MIN_SEGMENT)
}
