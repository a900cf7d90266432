//! Executes reads, writes and flushes of a disk in the background: by io_uring, or by a pool of threads if the
//! host's kernel does not allow io_uring.
//!
//! ```text
//!   begin(Job) --try-- page cache -------------------------> completed() -> [(Job, result)]
//!                \--submit--> kernel or threads --event--/
//! ```
//!
//! An engine gets at most [`MOST`] jobs at a time. It completes them in any order and signals an event. After a
//! short read or write the worker begins the rest as a new job.

mod discard;
mod page_cache;
mod pool;
mod uring;

pub(super) use self::discard::can_discard;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;

use self::page_cache::PageCache;
use self::pool::Pool;
use self::uring::Uring;
use super::Shared;
use super::health::Ticket;
use super::request::{Answer, Clear, How};
use super::transfer::Transfer;
use crate::devices::storage;
use crate::devices::virtio::Request;

/// Most jobs of an engine at a time.
pub(super) const MOST: usize = 128;

/// The kinds of work of an engine.
#[derive(Debug)]
pub(super) enum Work {
    /// Moves data.
    Transfer(Transfer),
    /// Makes earlier writes durable. Counts no bytes.
    Sync,
    /// Discards or zeroes. Counts no bytes.
    Clear(Clear),
}

impl How {
    /// Returns the flags for fallocate(2), which never change the size of the file. Block devices support them
    /// too, as ways to write zeroes (`blkdev_fallocate` in Linux block/fops.c): discards of devices are not done by it.
    fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                Self::Discard | Self::ZeroAndUnmap => FallocateFlags::PUNCH_HOLE,
                Self::Zero => FallocateFlags::ZERO_RANGE,
            }
    }
}

/// Work, and its request. A sync has no request, because several requests wait for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    /// Counts the job as not answered.
    pub(super) ticket: Ticket,
    pub(super) request: Option<(Request, Answer)>,
}

impl Job {
    fn is_discard(&self) -> bool {
        matches!(self.work, Work::Clear(Clear { how: How::Discard, .. }))
    }
}

/// A job that an engine has finished, and the number of bytes that it moved.
pub(super) type Completed = (Job, io::Result<usize>);

/// Executes jobs.
#[derive(Debug)]
pub(super) struct Engine {
    background: Background,
    page_cache: PageCache,
    /// Whether the disk is a block device.
    is_device: bool,
    /// Jobs that were done when they were begun.
    done: Vec<Completed>,
}

/// What executes the jobs that may have to wait.
#[derive(Debug)]
enum Background {
    /// The threads of the pool discard blocks of a device, for which io_uring has no operation before Linux 6.12.
    Uring(Box<Uring>, Pool),
    Pool(Pool),
}

impl Engine {
    /// Creates the best engine that the host's kernel allows, and logs which one it is.
    pub(super) fn new(disk: &Arc<Shared>) -> Self {
        let page_cache = PageCache::new(disk);
        let background = Background::new(disk);
        disk.health.set_engine(match background {
            Background::Uring(..) => storage::Engine::IoUring,
            Background::Pool(_) => storage::Engine::Threads,
        });
        let is_device = disk.image.is_device();
        Self { background, page_cache, is_device, done: Vec::new() }
    }

    /// Returns the fd that is readable when jobs may have been completed.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        match &self.background {
            // The pool has the same one.
            Background::Uring(uring, _) => uring.event.as_fd(),
            Background::Pool(pool) => pool.event().as_fd(),
        }
    }

    /// Takes a job. The next [`submit`](Self::submit) begins it at the latest.
    pub(super) fn begin(&mut self, job: Job) {
        if let Work::Transfer(transfer) = &job.work
            && let Some(result) = self.page_cache.attempt(transfer)
        {
            return self.done.push((job, result));
        }
        match &mut self.background {
            Background::Uring(_, pool) if self.is_device && job.is_discard() => pool.begin(job),
            Background::Uring(uring, _) => uring.begin(job),
            Background::Pool(pool) => pool.begin(job),
        }
    }

    /// Begins all jobs that were taken so far.
    pub(super) fn submit(&mut self) {
        match &mut self.background {
            Background::Uring(uring, _) => uring.submit(),
            // The pool begins each job when it takes it.
            Background::Pool(_) => {}
        }
    }

    /// Returns the jobs that were completed since the last call.
    pub(super) fn completed(&mut self) -> Vec<Completed> {
        let mut completed = std::mem::take(&mut self.done);
        completed.append(&mut match &mut self.background {
            Background::Uring(uring, pool) => {
                let mut completed = uring.completed();
                completed.append(&mut pool.completed());
                completed
            }
            Background::Pool(pool) => pool.completed(),
        });
        completed
    }
}

impl Background {
    fn new(disk: &Arc<Shared>) -> Self {
        let path = disk.image.path();
        if disk.image.options.no_uring {
            return Self::Pool(Pool::new(disk, new_pool_event()));
        }
        match Uring::new(disk) {
            Ok(uring) => {
                tracing::debug!("disk {path}: io_uring reads and writes it");
                let pool = Pool::new(disk, uring.event.clone());
                Self::Uring(Box::new(uring), pool)
            }
            Err(error) => {
                tracing::info!(
                    "disk {path}: threads read and write it, because the host's kernel does not \
                     allow io_uring: {error}"
                );
                Self::Pool(Pool::new(disk, new_pool_event()))
            }
        }
    }
}

fn new_pool_event() -> Arc<OwnedFd> {
    new_event().expect("an eventfd, as every doorbell is one").into()
}

/// Creates the eventfd by which an engine tells the disk's thread that jobs may have been completed. The thread
/// waits for it edge-triggered, so nothing reads its counter.
pub(super) fn new_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

pub(super) fn signal(event: &OwnedFd) {
    // The write fails only after 2^64 signals.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
