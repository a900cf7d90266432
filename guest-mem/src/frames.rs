//! Digests of the page frames that hold a segment: they prove that guest memory was not copied.
//!
//! The digest of all page frame numbers, taken before a live update and after it, is the same only if
//! every page stayed in its frame. No guest byte is read: this module maps the pages a second time and
//! reads their frame numbers from `/proc/self/pagemap`.

#![expect(unsafe_code, reason = "maps memory to ask the kernel where it is, and unmaps it")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{Error, HUGE_PAGE, PAGE, Segment};

/// Bytes mapped at a time, which bounds the page tables and the buffer. A multiple of the huge page
/// size.
const WINDOW: u64 = 32 * HUGE_PAGE;

/// Linux `Documentation/admin-guide/mm/pagemap.rst`.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_FRAME: u64 = (1 << 55) - 1;

/// A digest of page indices and their page frame numbers, over one or several segments in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameDigest {
    /// FNV-1a over index and frame of each page, each as 8 bytes, little-endian.
    pub hash: u64,
    /// Number of pages in the digest.
    pub pages: u64,
}

impl Default for FrameDigest {
    fn default() -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, pages: 0 }
    }
}

impl FrameDigest {
    /// The digest of one segment.
    pub fn of(segment: &Segment) -> Result<Self, Error> {
        let mut digest = Self::default();
        digest.add(segment)?;
        Ok(digest)
    }

    /// Adds all pages of `segment`. Swapped-out pages are read back, and holes are filled with zero
    /// pages, as a preservation does: add only segments that are preserved anyway.
    ///
    /// The kernel may migrate pages, so the digest stays valid only while LUO preserves the segment.
    ///
    /// Errors with [`Error::FramesHidden`] without CAP_SYS_ADMIN.
    pub fn add(&mut self, segment: &Segment) -> Result<(), Error> {
        let pagemap =
            File::open("/proc/self/pagemap").map_err(failed("open /proc/self/pagemap"))?;
        let mut offset = 0;
        while offset < segment.len() {
            let len = WINDOW.min(segment.len() - offset);
            let window = Window::new(segment, offset, len as usize)?;
            self.add_entries(&window.pagemap_entries(&pagemap)?, offset / PAGE)?;
            offset += len;
        }
        Ok(())
    }

    /// Adds the digest of further pages, for example those of the next segment.
    pub fn append(&mut self, other: Self) {
        self.fold(other.hash);
        self.pages += other.pages;
    }

    /// Adds entries of the pagemap. The first entry is page `first_page` of its segment.
    fn add_entries(&mut self, entries: &[u64], first_page: u64) -> Result<(), Error> {
        for (page, entry) in (first_page..).zip(entries) {
            if entry & ENTRY_PRESENT == 0 {
                return Err(Error::FrameAbsent { page });
            }
            // Without CAP_SYS_ADMIN the kernel shows 0 for every frame. It never allocates frame 0.
            let frame = entry & ENTRY_FRAME;
            if frame == 0 {
                return Err(Error::FramesHidden);
            }
            self.fold(self.pages);
            self.fold(frame);
            self.pages += 1;
        }
        Ok(())
    }

    fn fold(&mut self, value: u64) {
        for byte in value.to_le_bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

fn failed(attempt: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Frames { attempt, source }
}

/// A read-only mapping of a part of a segment. All of its pages are present.
struct Window {
    start: *mut c_void,
    len: usize,
}

impl Window {
    fn new(segment: &Segment, offset: u64, len: usize) -> Result<Self, Error> {
        let errno = |attempt| {
            move |errno: rustix::io::Errno| Error::Frames { attempt, source: errno.into() }
        };
        let fd = segment.as_fd();
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, fd, offset)
        }
        .map_err(errno("map the segment"))?;
        let window = Self { start, len };
        // SAFETY: the range is the mapping just made, and the advice changes no contents.
        unsafe { rustix::mm::madvise(window.start, window.len, Advice::LinuxPopulateRead) }
            .map_err(errno("bring in the segment's pages"))?;
        Ok(window)
    }

    fn pagemap_entries(&self, pagemap: &File) -> Result<Vec<u64>, Error> {
        let pages = self.len / PAGE as usize;
        let mut bytes = vec![0; pages * 8];
        let at = self.start as u64 / PAGE * 8;
        pagemap.read_exact_at(&mut bytes, at).map_err(failed("read /proc/self/pagemap"))?;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_ne_bytes(*entry)).collect())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and no reference points into it.
        let unmapped = unsafe { rustix::mm::munmap(self.start, self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESENT: u64 = ENTRY_PRESENT;

    fn digest_of(entries: &[u64]) -> Result<FrameDigest, Error> {
        let mut digest = FrameDigest::default();
        digest.add_entries(entries, 0).map(|()| digest)
    }

    #[test]
    fn a_digest_tells_frames_and_their_order_apart() {
        let digest = digest_of(&[PRESENT | 7, PRESENT | 8]).unwrap();
        assert_eq!(digest.pages, 2);
        assert_eq!(digest_of(&[PRESENT | 7, PRESENT | 8]).unwrap(), digest);
        assert_ne!(digest_of(&[PRESENT | 8, PRESENT | 7]).unwrap(), digest);
        assert_ne!(digest_of(&[PRESENT | 7, PRESENT | 9]).unwrap(), digest);
        assert_ne!(digest_of(&[PRESENT | 7]).unwrap(), digest);
    }

    #[test]
    fn flags_of_an_entry_are_not_part_of_the_digest() {
        let soft_dirty_and_exclusive = 0b11 << 55;
        let with = digest_of(&[PRESENT | soft_dirty_and_exclusive | 7]).unwrap();
        assert_eq!(with, digest_of(&[PRESENT | 7]).unwrap());
    }

    #[test]
    fn a_page_in_swap_is_an_error() {
        let swapped = 1 << 62;
        let error = digest_of(&[PRESENT | 7, swapped | 7]).unwrap_err();
        assert_eq!(error.to_string(), "page 1 of the segment is in no page frame");
    }

    #[test]
    fn hidden_frames_are_an_error() {
        assert!(matches!(digest_of(&[PRESENT]), Err(Error::FramesHidden)));
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // XOR with a zero byte changes nothing, so eight zero bytes are eight multiplications.
        let mut digest = FrameDigest::default();
        digest.fold(0);
        let expected =
            (0..8).fold(0xcbf2_9ce4_8422_2325_u64, |hash, _| hash.wrapping_mul(0x0100_0000_01b3));
        assert_eq!(digest.hash, expected);
    }
}
