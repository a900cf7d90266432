//! The machine's RAM, accessed from outside through the file that QEMU uses for it.
//!
//! A test can so read or damage a kernel's handover, which no interface of the kernel shows. All RAM is
//! below the hole at 3 GiB, so a guest-physical address is an offset into the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use luo::builtin::tree::memory::PAGE_BYTES;

/// The file with the RAM.
#[derive(Debug)]
pub(crate) struct Ram(File);

impl Ram {
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    /// The addresses of all pages that have these bytes at an offset.
    pub(crate) fn find(&self, offset: usize, bytes: &[u8]) -> io::Result<Vec<u64>> {
        const CHUNK: usize = 1 << 20;
        let (end, mut chunk) = (self.0.metadata()?.len(), vec![0; CHUNK]);
        let mut found = Vec::new();
        for start in (0..end).step_by(CHUNK) {
            self.0.read_exact_at(&mut chunk, start)?;
            let pages = chunk.chunks_exact(PAGE_BYTES).zip((start..).step_by(PAGE_BYTES));
            let fits = pages.filter(|(page, _)| page[offset..].starts_with(bytes));
            found.extend(fits.map(|(_, address)| address));
        }
        Ok(found)
    }

    /// Replaces `old` by `new` at an offset of every page that has `old` there. Returns the number of
    /// pages.
    pub(crate) fn change(&self, offset: usize, old: &[u8], new: &[u8]) -> io::Result<usize> {
        let pages = self.find(offset, old)?;
        for page in &pages {
            self.0.write_all_at(new, page + offset as u64)?;
        }
        Ok(pages.len())
    }

    pub(crate) fn read<const N: usize>(&self, address: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, address)?;
        Ok(bytes)
    }
}
