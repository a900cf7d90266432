//! Maps segments side by side, as guest memory for KVM and the devices.
//!
//! Each slot gets its own reservation of address space, aligned so that huge pages fit, and its
//! segments are mapped over the reservation. A mapping that is still in use when [`GuestRam`] is dropped
//! (a clone of its vm-memory exists) is never unmapped.

#![expect(unsafe_code, reason = "maps memory at fixed addresses and unmaps it")]

use std::ffi::c_void;
use std::sync::Arc;
use std::{io, ptr};

use rustix::fs::SeekFrom;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::{Error, HUGE_PAGE, Layout, Segment, SegmentPlan, Slot};

/// Bytes of a 1 GiB page. The host address of a slot of this size or more is a multiple of it.
const GIANT_PAGE: u64 = 1 << 30;

/// What KVM needs to know about one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedSlot {
    /// First guest-physical address.
    pub guest_base: u64,
    /// Length in bytes.
    pub len: u64,
    /// First address of the slot in this process (KVM's `userspace_addr`).
    pub host_address: u64,
}

/// A guest's RAM, mapped.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    slots: Vec<Mapping>,
    segments: Vec<Segment>,
    advice_failure: Option<io::Error>,
}

#[derive(Debug)]
struct Mapping {
    slot: MappedSlot,
    region: Arc<MmapRegion>,
    reservation: Reservation,
}

impl GuestRam {
    /// Maps `segments`, the segments of `layout` in its order, as shared memory. Touches no page.
    ///
    /// The kernel is advised to use huge pages before anything can touch the memory, and to leave the
    /// memory out of core dumps. If the kernel rejects the advice, that is no error: see
    /// [`advice_failure`](Self::advice_failure).
    pub fn map(layout: &Layout, segments: Vec<Segment>) -> Result<Self, Error> {
        check_against(layout, &segments)?;
        let mut slots = Vec::new();
        let mut advice_failure = None;
        for (index, slot) in layout.slots().iter().enumerate() {
            let reservation = Reservation::new(*slot)?;
            let of_slot = layout.segments().iter().zip(&segments).enumerate();
            for (number, (plan, segment)) in of_slot.filter(|(_, (plan, _))| plan.slot == index) {
                reservation.map(number, plan, segment)?;
            }
            for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
                if let Err(error) = reservation.advise(advice) {
                    advice_failure.get_or_insert(error);
                }
            }
            slots.push(Mapping {
                slot: MappedSlot {
                    guest_base: slot.guest_base,
                    len: slot.len,
                    host_address: reservation.usable as u64,
                },
                region: Arc::new(reservation.region()?),
                reservation,
            });
        }
        let memory = present(&slots)?;
        Ok(Self { memory, slots, segments, advice_failure })
    }

    /// The memory for devices and loaders to read and write: one region for each slot. A clone keeps
    /// the mapping alive.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The slots in ascending order, for KVM_SET_USER_MEMORY_REGION. Their host addresses are valid
    /// until this value is dropped: close the VM's KVM fds first.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = MappedSlot> + '_ {
        self.slots.iter().map(|mapping| mapping.slot)
    }

    /// The segments, in the layout's order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Why the kernel rejected the advice to use huge pages or to leave the memory out of core dumps;
    /// `None` if it did not. Without huge pages the guest is slower and live updates take longer.
    pub fn advice_failure(&self) -> Option<&io::Error> {
        self.advice_failure.as_ref()
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        self.memory = GuestMemoryMmap::new();
        for Mapping { slot: _, region, reservation } in self.slots.drain(..) {
            // vm-memory does not unmap regions that it did not map itself. If a clone of the memory
            // still exists, unmapping here would leave it dangling, so the mapping is leaked.
            if Arc::try_unwrap(region).is_err() {
                std::mem::forget(reservation);
            }
        }
    }
}

/// Gives memory to the pages of `segment` that have none, in huge pages where the kernel gives any ([`HugePages`]).
///
/// LUO does it too when it preserves the segment, but page by page (Linux 7.3.4, `memfd_alloc_folio` in mm/memfd.c, which
/// knows no mapping and so no advice), and retrieving a small page takes as long as retrieving a huge one. Changes no
/// contents; the guest may run meanwhile. An error does no harm: LUO fills what is left.
///
/// [`HugePages`]: crate::HugePages
pub fn fill_holes(segment: &Segment) -> Result<(), Error> {
    let len = segment.len();
    let failed = |errno: rustix::io::Errno| Error::Fill(errno.into());
    let next = |from| match rustix::fs::seek(segment, from) {
        Err(rustix::io::Errno::NXIO) => Ok(len),
        found => found.map_err(failed),
    };
    let mut hole = next(SeekFrom::Hole(0))?;
    if hole >= len {
        return Ok(());
    }
    let reservation = Reservation::new(Slot { guest_base: 0, len })?;
    reservation.map(0, &SegmentPlan { slot: 0, offset_in_slot: 0, len }, segment)?;
    // A kernel without huge pages refuses it.
    let _ = reservation.advise(Advice::LinuxHugepage);
    while hole < len {
        let data = next(SeekFrom::Data(hole))?;
        reservation.populate(hole, data).map_err(failed)?;
        hole = next(SeekFrom::Hole(data))?;
    }
    Ok(())
}

fn check_against(layout: &Layout, segments: &[Segment]) -> Result<(), Error> {
    let (planned, given) = (layout.segments().len(), segments.len());
    if planned != given {
        return Err(Error::SegmentCount { planned, given });
    }
    for (index, (plan, segment)) in layout.segments().iter().zip(segments).enumerate() {
        if plan.len != segment.len() {
            let problem = format!("it has {} bytes, the layout says {}", segment.len(), plan.len);
            return Err(Error::Unfit { index, problem });
        }
    }
    Ok(())
}

fn present(slots: &[Mapping]) -> Result<GuestMemoryMmap, Error> {
    let regions = slots.iter().map(|mapping| {
        let base = GuestAddress(mapping.slot.guest_base);
        GuestRegionMmap::with_arc(mapping.region.clone(), base)
            .map(Arc::new)
            // The layout has checked that no slot ends beyond 64 bits.
            .ok_or_else(|| Error::Present("a slot ends beyond 64 bits".into()))
    });
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_arc_regions(regions).map_err(|error| Error::Present(error.into()))
}

/// Address space for one slot. Dropping it unmaps it together with the segments mapped into it.
#[derive(Debug)]
struct Reservation {
    slot: Slot,
    /// First reserved address.
    start: usize,
    /// Bytes reserved.
    len: usize,
    /// First address of the slot: aligned, within the reservation.
    usable: usize,
}

impl Reservation {
    /// Reserves inaccessible address space. The parts before and behind the slot stay inaccessible, so
    /// that an access beyond the slot faults.
    fn new(slot: Slot) -> Result<Self, Error> {
        let failed = |source| Error::Reserve { guest_base: slot.guest_base, len: slot.len, source };
        let align = if slot.len >= GIANT_PAGE { GIANT_PAGE } else { HUGE_PAGE };
        let len = slot
            .len
            .checked_add(align)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags) };
        let start = mapped.map_err(|errno| failed(errno.into()))? as usize;
        Ok(Self { slot, start, len, usable: start.next_multiple_of(align as usize) })
    }

    /// Maps `segment` at its place in the slot.
    fn map(&self, index: usize, plan: &SegmentPlan, segment: &Segment) -> Result<(), Error> {
        let failed =
            |errno: rustix::io::Errno| Error::Map { index, len: plan.len, source: errno.into() };
        debug_assert!(plan.offset_in_slot + plan.len <= self.slot.len);
        let place = (self.usable + plan.offset_in_slot as usize) as *mut c_void;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the range is inside this reservation: a layout's segments lie within their slot, and
        // the slot within the reservation. No reference points into the reservation yet.
        unsafe { rustix::mm::mmap(place, plan.len as usize, protection, flags, segment.file(), 0) }
            .map_err(failed)?;
        Ok(())
    }

    /// Gives the kernel advice about the whole slot.
    fn advise(&self, advice: Advice) -> io::Result<()> {
        debug_assert!(matches!(advice, Advice::LinuxHugepage | Advice::LinuxDontDump));
        // SAFETY: the range is inside this reservation, and neither kind of advice changes contents.
        unsafe { rustix::mm::madvise(self.usable as *mut c_void, self.slot.len as usize, advice) }?;
        Ok(())
    }

    /// Brings the bytes from `start` to `end` of the slot into memory.
    fn populate(&self, start: u64, end: u64) -> rustix::io::Result<()> {
        let Some(len) = end.min(self.slot.len).checked_sub(start) else { return Ok(()) };
        let place = (self.usable + start as usize) as *mut c_void;
        // SAFETY: the range is inside this reservation, and the advice changes no contents.
        unsafe { rustix::mm::madvise(place, len as usize, Advice::LinuxPopulateRead) }
    }

    /// The slot as a region of vm-memory. [`GuestRam`] keeps the reservation for longer than the region.
    fn region(&self) -> Result<MmapRegion, Error> {
        // SAFETY: `slot.len` bytes from `usable` on are mapped readable and writable.
        let region = unsafe {
            MmapRegion::build_raw(
                self.usable as *mut u8,
                self.slot.len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
        };
        region.map_err(|error| Error::Present(error.into()))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: this value owns the reservation, and `GuestRam` forgets the value instead of dropping
        // it while references into it exist.
        let unmapped = unsafe { rustix::mm::munmap(self.start as *mut c_void, self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
