//! Errors of guest RAM.

use std::io;

/// Guest RAM could not be planned, created, checked or mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The slots or the segment size do not make a layout.
    #[error("guest RAM cannot be laid out: {0}")]
    Layout(String),
    /// `MemAvailable` is absent from /proc/meminfo or is not a number of kB.
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
        /// What the file is, and what it should be.
        problem: String,
    },
    /// The number of segments to map differs from the layout's.
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
        /// First guest-physical address of the slot.
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
    /// The holes of a segment could not be filled.
    #[error("cannot bring the pages of a segment into memory")]
    Fill(#[source] io::Error),
    /// The page frames of a segment could not be read.
    #[error("cannot find out which page frames hold a segment: cannot {attempt}")]
    Frames {
        /// The step that failed.
        attempt: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel shows this process zeroes instead of page frame numbers.
    #[error("the kernel hides page frame numbers from this process: it needs CAP_SYS_ADMIN")]
    FramesHidden,
    /// A page was not in memory although MADV_POPULATE_READ had just brought it in.
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

/// With `vm.memfd_noexec=2` the kernel refuses executable memfds with EACCES (memfd_create(2)).
fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES) => {
            " (it must be executable to survive a live update: is vm.memfd_noexec 2?)"
        }
        _ => "",
    }
}
