//! What can go wrong with guest RAM.

use std::io;

/// Guest RAM could not be planned, made, checked or mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The layout was asked for impossible slots or segments.
    #[error("guest RAM cannot be laid out: {0}")]
    Layout(String),
    /// /proc/meminfo does not say what is available.
    #[error("cannot tell how much memory the host has available: {0}")]
    Meminfo(String),
    /// A segment could not be created.
    #[error("cannot {attempt} the memfd `{name}` of {len} bytes{}", remedy(.source))]
    Create {
        /// The memfd's name.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// The step that failed.
        attempt: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A segment's file could not be examined.
    #[error("segment {index}: cannot {attempt}")]
    Examine {
        /// Index of the segment in the layout.
        index: usize,
        /// The step that failed.
        attempt: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file is not what this segment must be.
    #[error("segment {index}: {problem}")]
    Unfit {
        /// Index of the segment in the layout.
        index: usize,
        /// What it is, and what it should be.
        problem: String,
    },
    /// The segments that were given are not those of the layout.
    #[error("the layout has {planned} segments, {given} were given")]
    SegmentCount {
        /// Segments in the layout.
        planned: usize,
        /// Segments that were given.
        given: usize,
    },
    /// Address space for a slot could not be reserved.
    #[error("cannot reserve {len} bytes of address space for the slot at {guest_base:#x}")]
    Reserve {
        /// Where the slot starts for the guest.
        guest_base: u64,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// A segment could not be mapped.
    #[error("segment {index}: cannot map {len} bytes")]
    Map {
        /// Index of the segment in the layout.
        index: usize,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// vm-memory refused the mapping.
    #[error("cannot present the mapping to the devices as guest memory")]
    Present(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The page frames of a segment could not be read.
    #[error("cannot tell a segment's page frames: {attempt}")]
    Frames {
        /// The step that failed.
        attempt: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel shows no page frame numbers to this process.
    #[error("the kernel hides page frame numbers from this process: it needs CAP_SYS_ADMIN")]
    FramesHidden,
    /// A page was in no frame although it had just been brought in.
    #[error("page {page} of the segment is in no page frame")]
    FrameAbsent {
        /// Index of the page in the segment.
        page: u64,
    },
    /// The huge page setting could not be read or set.
    #[error("cannot {attempt} {path}")]
    HugePages {
        /// The step that failed.
        attempt: &'static str,
        /// The sysfs file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// memfd_create(2): with `vm.memfd_noexec=2` executable memfds are refused.
fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES) => {
            " (it must be executable to survive a live update: is vm.memfd_noexec 2?)"
        }
        _ => "",
    }
}
