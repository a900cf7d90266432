//! Guest RAM that outlives the process and the kernel.
//!
//! A guest's RAM is a few memfds, the *segments*, mapped side by side so that each KVM memory slot is
//! one contiguous range of host addresses. The memfds are what is handed to a new process, or over a
//! kexec by the Live Update Orchestrator; this crate makes them, checks those that came back, maps
//! them, and tells which of them the guest has touched. It knows neither KVM nor sessions. On a
//! kernel without that orchestrator they are files in memory that was reserved at boot ([`Backing`]).
//!
//! ```text
//!   guest:    0 ........................ 3 GiB    4 GiB ............. 5 GiB
//!   slots:    [ one host mapping           ]      [ one host mapping    ]
//!   segments: [ 0   ][ 1   ][ 2   ][ 3     ]      [ 4   ][ 5            ]
//! ```
//!
//! The invariant: guest memory is never copied, and no page of it is touched by making, checking or
//! mapping a segment. Whoever touches the first byte of a 2 MiB range decides whether it gets a huge
//! page, and a segment that the guest never touched need not be preserved at all.

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
pub use ram::{GuestRam, MappedSlot};
pub use segment::{
    Backing, Segment, check_segment, check_segment_of, create_segment, is_touched, untouched_bytes,
};

#[cfg(test)]
mod tests;
