//! How reads, writes and flushes of a disk are carried out while its thread goes on: by io_uring, or by
//! a pool of threads where the host's kernel does not allow io_uring.
//!
//! ```text
//!   begin(Job), ... --submit--> kernel or threads --event--> completed() -> [(Job, result)]
//! ```
//!
//! An engine is handed at most [`MOST`] jobs at once. It completes them in any order, and says so by
//! an event. A short read or write is a result like any other: the worker begins the rest as a new job.

mod pool;
mod uring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;

use self::pool::Pool;
use self::uring::Uring;
use super::Shared;
use super::request::{Answer, Clear, How};
use super::transfer::Transfer;
use crate::devices::virtio::Request;

/// Most jobs that an engine has at once.
pub(super) const MOST: usize = 128;

/// What an engine does.
#[derive(Debug)]
pub(super) enum Work {
    /// Moves data.
    Transfer(Transfer),
    /// Makes durable what was written before. Counts no bytes.
    Sync,
    /// Discards or zeroes. Counts no bytes.
    Clear(Clear),
}

impl How {
    /// What fallocate(2) is told. Block devices understand it as well (`blkdev_fallocate` in block/fops.c
    /// of Linux); none of it changes the size of the file.
    fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                Self::Discard | Self::ZeroAndUnmap => FallocateFlags::PUNCH_HOLE,
                Self::Zero => FallocateFlags::ZERO_RANGE,
            }
    }
}

/// Work, and the request that it is done for. A sync is done for all requests that wait for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) request: Option<(Request, Answer)>,
}

/// A job that an engine has finished, and how many bytes it moved.
pub(super) type Completed = (Job, io::Result<usize>);

/// Carries out jobs.
#[derive(Debug)]
pub(super) enum Engine {
    Uring(Box<Uring>),
    Pool(Pool),
}

impl Engine {
    /// The best engine that the host's kernel allows. Says in the log which one it is.
    pub(super) fn new(disk: &Arc<Shared>) -> Self {
        let path = &disk.image.path;
        if disk.image.no_uring {
            return Self::Pool(Pool::new(disk));
        }
        match Uring::new(disk) {
            Ok(uring) => {
                tracing::debug!("disk {path}: it is read and written by io_uring");
                Self::Uring(Box::new(uring))
            }
            Err(error) => {
                tracing::info!(
                    "disk {path}: it is read and written by threads: the host's kernel does not \
                     allow io_uring: {error}"
                );
                Self::Pool(Pool::new(disk))
            }
        }
    }

    /// What has input when jobs may have been completed.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        match self {
            Self::Uring(uring) => uring.event.as_fd(),
            Self::Pool(pool) => pool.event().as_fd(),
        }
    }

    /// Takes a job, which is begun at the latest by the next [`submit`](Self::submit).
    pub(super) fn begin(&mut self, job: Job) {
        match self {
            Self::Uring(uring) => uring.begin(job),
            Self::Pool(pool) => pool.begin(job),
        }
    }

    /// Begins all jobs that were taken.
    pub(super) fn submit(&mut self) {
        match self {
            Self::Uring(uring) => uring.submit(),
            // They are begun one by one.
            Self::Pool(_) => {}
        }
    }

    /// Returns the jobs that were completed since the last call.
    pub(super) fn completed(&mut self) -> Vec<Completed> {
        match self {
            Self::Uring(uring) => uring.completed(),
            Self::Pool(pool) => pool.completed(),
        }
    }
}

/// An event by which an engine tells the disk's thread that jobs may have been completed. The thread
/// watches for each signal, so nobody reads it.
fn new_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn signal(event: &OwnedFd) {
    // It fails after 2^64 signals.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
