//! io_uring: the kernel reads, writes, flushes and clears, and no thread of this process waits for it.
//!
//! The ring is restricted, before its first use, to four operations on the one image that is registered with it. So it is no way around the seccomp filter of the process.

#![expect(unsafe_code, reason = "the kernel is given addresses of guest memory and of iovecs")]

use std::io;
use std::os::fd::AsRawFd;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::super::Image;
use super::{Arc, Clear, Completed, Job, MOST, OwnedFd, Shared, Work, new_event, signal};

/// Entries of the submission queue: room for all jobs and a flush between two submissions.
const ENTRIES: u32 = 256;
const _: () = assert!(MOST < ENTRIES as usize);
/// Index of the image in the ring's registered files.
const FILE: types::Fixed = types::Fixed(0);
/// Index of the image opened without O_DIRECT, with `direct=on`.
const CACHED: types::Fixed = types::Fixed(1);
/// Most kernel threads for one ring: for files, and for other work.
const KERNEL_THREADS: [u32; 2] = [8, 8];

/// A ring of one disk.
pub(in crate::devices::virtio::block) struct Uring {
    ring: IoUring,
    pub(super) event: Arc<OwnedFd>,
    /// The jobs that the kernel has, by the number that it returns for them.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that the kernel refused.
    refused: Vec<Completed>,
    /// Keeps the file open.
    _disk: Arc<Shared>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("jobs", &self.jobs.len()).finish_non_exhaustive()
    }
}

impl Uring {
    /// Creates a ring for the file of `disk`. Errors if the kernel does not allow io_uring.
    pub(super) fn new(disk: &Arc<Shared>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(ENTRIES)?;
        let event = Arc::new(new_event()?);
        let submitter = ring.submitter();
        let Image { file, cached, identity: _, options: _ } = &disk.image;
        let files = [Some(file), cached.as_ref()].into_iter().flatten();
        let files: Vec<_> = files.map(AsRawFd::as_raw_fd).collect();
        submitter.register_files(&files)?;
        submitter.register_eventfd(event.as_raw_fd())?;
        // Linux 5.15 and later. Earlier kernels have their own limit.
        let _ = submitter.register_iowq_max_workers(&mut KERNEL_THREADS.clone());
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let (jobs, refused) = (Vec::new(), Vec::new());
        Ok(Self { ring, event, jobs, free: Vec::new(), refused, _disk: disk.clone() })
    }

    pub(super) fn begin(&mut self, job: Job) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let entry = match &job.work {
            Work::Sync => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Clear(Clear { how, offset, bytes }) => {
                let mode = how.flags().bits() as i32;
                opcode::Fallocate::new(FILE, *bytes).offset(*offset).mode(mode).build()
            }
            Work::Transfer(transfer) => {
                let (pieces, offset) = (transfer.pieces.left(), transfer.offset);
                let (first, count) = (pieces.as_ptr(), pieces.len() as u32);
                let file = if transfer.cached { CACHED } else { FILE };
                match transfer.write {
                    true => opcode::Writev::new(file, first, count).offset(offset).build(),
                    false => opcode::Readv::new(file, first, count).offset(offset).build(),
                }
            }
        };
        self.jobs[index] = Some(job);
        let entry = entry.user_data(index as u64);
        // SAFETY: the iovecs and the memory of the guest that they name belong to the job, which stays
        // in `jobs`, unchanged, until the kernel completes the entry.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The queue has room for all jobs, so this does not happen.
            self.refuse(index, io::ErrorKind::OutOfMemory.into());
        }
    }

    fn refuse(&mut self, index: usize, error: io::Error) {
        if let Some(job) = self.jobs.get_mut(index).and_then(Option::take) {
            self.free.push(index);
            self.refused.push((job, Err(error)));
        }
    }

    pub(super) fn submit(&mut self) {
        // `IoUring::submit` enters the kernel even if there is nothing to submit. For a disk in the page cache
        // that would be a third of all system calls.
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory. The entries stay in the queue, and the event makes the
                // thread submit them again.
                Err(error) => {
                    tracing::debug!("io_uring does not accept requests now: {error}");
                    std::thread::yield_now();
                    return signal(&self.event);
                }
            }
        }
    }

    pub(super) fn completed(&mut self) -> Vec<Completed> {
        let Self { ring, jobs, free, refused, .. } = self;
        let mut completed = std::mem::take(refused);
        for entry in ring.completion() {
            let index = entry.user_data() as usize;
            let Some(job) = jobs.get_mut(index).and_then(Option::take) else { continue };
            free.push(index);
            let result = entry.result();
            completed.push((
                job,
                match usize::try_from(result) {
                    Ok(count) => Ok(count),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                },
            ));
        }
        completed
    }
}

impl Drop for Uring {
    /// Waits until the kernel no longer uses the guest's memory.
    fn drop(&mut self) {
        while self.jobs.iter().any(Option::is_some) {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // The memory must stay mapped while the kernel may write to it.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            drop(self.completed());
        }
    }
}
