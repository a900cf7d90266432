//! Reads and writes through the host's page cache on the disk's own thread, as long as that takes no longer
//! than copying the bytes.
//!
//! A write to the page cache is a copy of some microseconds. Passing it to another thread costs more than the
//! copy, and io_uring does that for every buffered write on file systems without `RWF_NOWAIT` for writes (ext4).
//! But such a write may also wait: for room among the dirty pages, for a journal, for storage that hangs. A
//! write that took long is taken as a sign of that, and the next ones go to the background, where they delay
//! no other request.
//!
//! A read without `RWF_NOWAIT` goes to the background at once, because it waits for the storage whenever it misses
//! the page cache. On a file system that has no storage (tmpfs, ramfs) it is a copy like a write.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::fstatfs;

use super::Shared;
use crate::devices::virtio::block::transfer::Transfer;

/// A transfer of up to 1 MiB that takes longer than this has waited for something other than the copy.
const COPY: Duration = Duration::from_millis(1);
/// Number of transfers that go to the background after one that has waited.
const AFTER_A_WAIT: u32 = 64;
/// Most bytes that are copied on the disk's thread for one request.
const MOST_BYTES: u64 = 1 << 20;

/// Tries reads and writes at once.
#[derive(Debug)]
pub(super) struct PageCache {
    disk: Arc<Shared>,
    /// How reads are tried.
    read: Attempt,
    /// How reads are tried where the kernel has no `RWF_NOWAIT` for them.
    read_if_it_may_wait: Attempt,
    /// How writes are tried.
    write: Attempt,
    /// Number of the next transfers that go to the background instead of being tried as [`Attempt::Plain`].
    in_background: u32,
}

/// A way to try a read or a write at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// `RWF_NOWAIT`: the kernel refuses what has to wait.
    NoWait,
    /// An ordinary system call.
    Plain,
    /// Not at all.
    Never,
}

impl PageCache {
    pub(super) fn new(disk: &Arc<Shared>) -> Self {
        // A file that is opened with O_DIRECT bypasses the page cache, so each transfer waits for the storage.
        let first = if disk.image.options.direct { Attempt::Never } else { Attempt::NoWait };
        let read_if_it_may_wait = match has_storage(&disk.image.file) {
            true => Attempt::Never,
            false => Attempt::Plain,
        };
        let disk = disk.clone();
        Self { disk, read: first, read_if_it_may_wait, write: first, in_background: 0 }
    }

    /// Does `transfer` at once, or a part of it, and returns its result. Returns `None` if it would wait, or
    /// probably would: then it belongs into the background.
    pub(super) fn attempt(&mut self, transfer: &Transfer) -> Option<io::Result<usize>> {
        if transfer.rest > MOST_BYTES {
            return None;
        }
        let way = if transfer.write { self.write } else { self.read };
        match way {
            Attempt::Never => None,
            Attempt::NoWait => self.without_waiting(transfer),
            Attempt::Plain if self.in_background > 0 => {
                self.in_background -= 1;
                None
            }
            Attempt::Plain => {
                let start = Instant::now();
                let result = transfer.step(&self.disk.image, 0);
                if start.elapsed() > COPY {
                    self.in_background = AFTER_A_WAIT;
                }
                Some(result)
            }
        }
    }

    fn without_waiting(&mut self, transfer: &Transfer) -> Option<io::Result<usize>> {
        match transfer.step(&self.disk.image, libc::RWF_NOWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                match transfer.write {
                    true => self.write = Attempt::Plain,
                    false => self.read = self.read_if_it_may_wait,
                }
                self.attempt(transfer)
            }
            result => Some(result),
        }
    }
}

/// Returns whether the file system of `file` has storage.
fn has_storage(file: &File) -> bool {
    // From Linux include/uapi/linux/magic.h; libc has no RAMFS_MAGIC.
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    !fstatfs(file).is_ok_and(|system| [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&system.f_type))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;
    use crate::devices::identity::Identity;
    use crate::devices::virtio::block::transfer::Pieces;
    use crate::devices::virtio::block::{Block, BlockOptions, Image};

    fn page_cache(options: &str) -> PageCache {
        page_cache_of(tempfile::tempfile().unwrap(), options)
    }

    fn page_cache_of(file: File, options: &str) -> PageCache {
        file.write_all_at(&[1; 4096], 0).unwrap();
        let options = BlockOptions::parse(&format!("path=a,{options}"), 1).unwrap();
        let identity = Identity::of(&file).unwrap();
        let image = Image { file, cached: None, identity, options };
        PageCache::new(&Block::new(image, "a-0").unwrap().0)
    }

    fn transfer(write: bool, bytes: usize) -> Transfer {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let slice = memory.get_slice(GuestAddress(0), bytes).unwrap();
        let pieces = Pieces::new(&Arc::new(memory.clone()), &[slice]);
        let bytes = bytes as u64;
        Transfer { write, pieces, offset: 0, rest: bytes, bytes, cached: false }
    }

    #[test]
    fn a_write_to_the_page_cache_is_done_at_once() {
        let mut page_cache = page_cache("readonly=off");
        assert_eq!(page_cache.attempt(&transfer(true, 4096)).unwrap().unwrap(), 4096);
        let mut bytes = [0; 4096];
        page_cache.disk.image.file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn after_a_write_that_has_waited_the_next_ones_go_to_the_background() {
        let mut page_cache = page_cache("readonly=off");
        page_cache.write = Attempt::Plain;
        page_cache.in_background = AFTER_A_WAIT;
        for _ in 0..AFTER_A_WAIT {
            assert!(page_cache.attempt(&transfer(true, 4096)).is_none());
        }
        assert!(page_cache.attempt(&transfer(true, 4096)).is_some());
    }

    #[test]
    fn a_read_from_a_file_system_without_storage_is_done_at_once_or_after_a_wait_in_the_background()
    {
        let memory = memfd_create(c"disk", MemfdFlags::CLOEXEC).unwrap();
        let mut page_cache = page_cache_of(memory.into(), "readonly=on");
        let read = transfer(false, 4096);
        assert_eq!(page_cache.attempt(&read).unwrap().unwrap(), 4096);
        page_cache.in_background = 1;
        assert!(page_cache.attempt(&read).is_none());
        assert!(page_cache.attempt(&read).is_some());
    }

    #[test]
    fn a_large_transfer_and_a_disk_without_the_page_cache_use_the_background() {
        for write in [false, true] {
            assert!(page_cache("readonly=off").attempt(&transfer(write, 2 << 20)).is_none());
            assert!(page_cache("direct=on").attempt(&transfer(write, 4096)).is_none());
        }
    }
}
