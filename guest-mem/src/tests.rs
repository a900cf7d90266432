//! Tests of guest RAM through the crate's public functions: laid out, created, mapped and retrieved.

mod backing;
mod host;
mod plan;
mod ram;
mod segments;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::*;

/// A path under which the file of `fd` can be opened again.
fn path_of(fd: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Opens the same memfd again, as a session or another process would return it.
fn reopen(segment: &Segment) -> OwnedFd {
    File::options().read(true).write(true).open(path_of(segment.file())).unwrap().into()
}

/// Bytes of the pages that a file has.
fn allocated(segment: &Segment) -> u64 {
    segment.file().metadata().unwrap().blocks() * 512
}

/// A layout with a hole, whose slots are cut into three and two segments.
fn layout() -> Layout {
    let slots = [
        Slot { guest_base: 0, len: 2 * HUGE_PAGE + PAGE },
        Slot { guest_base: 4 * HUGE_PAGE, len: HUGE_PAGE + PAGE },
    ];
    Layout::new(&slots, Some(HUGE_PAGE)).unwrap()
}

/// New segments for `layout`, shown as `name` in `/proc/PID/maps`.
fn segments(name: &str, layout: &Layout) -> Vec<Segment> {
    let plans = layout.segments().iter();
    plans.map(|plan| create_segment(name, plan.len).unwrap()).collect()
}
