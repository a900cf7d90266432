//! Guest RAM that outlives the process and the kernel.
//!
//! A guest's RAM is a few memfds, the *segments*, mapped side by side so that each KVM memory slot is
//! one contiguous range of host addresses. A new process gets the memfds as fds; over a kexec, the Live
//! Update Orchestrator (LUO) carries them. On a kernel without LUO, the segments are files in memory
//! that was reserved at boot ([`Backing`]). This crate creates segments, checks retrieved ones, maps
//! them, and finds out which of them the guest has touched. It knows neither KVM nor sessions.
//!
//! ```text
//!   guest:    0 ........................ 3 GiB    4 GiB ............. 5 GiB
//!   slots:    [ one host mapping           ]      [ one host mapping    ]
//!   segments: [ 0   ][ 1   ][ 2   ][ 3     ]      [ 4   ][ 5            ]
//! ```
//!
//! The invariant: guest memory is never copied, and creating, checking or mapping a segment touches no
//! page of it. This matters for two reasons: the first access to a 2 MiB range decides whether the range
//! gets a huge page, and a segment that the guest never touched need not be preserved.

mod error;
pub mod frames;
mod host_memory;
mod huge_pages;
mod khugepaged;
mod layout;
mod ram;
mod segment;

pub use error::Error;
pub use frames::FrameDigest;
pub use host_memory::available_bytes;
pub use huge_pages::{HugePages, ShmemPolicy};
pub use khugepaged::KhugepagedStopped;
pub use layout::{HUGE_PAGE, Layout, PAGE, SegmentPlan, Slot};
pub use ram::{GuestRam, MappedSlot, fill_holes};
pub use segment::{
    Backing, Segment, check_segment, check_segment_of, create_segment, is_touched, untouched_bytes,
};

#[cfg(test)]
mod tests;
