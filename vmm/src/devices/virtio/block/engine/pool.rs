//! A pool of threads that read, write and flush a disk. Each disk has its own pool, so that a disk whose
//! storage hangs does not delay other disks.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::fs::fallocate;

use super::super::calls::POOL;
use super::discard::discard;
use super::{Clear, Completed, How, Job, OwnedFd, Shared, Work, signal};
use crate::causes::panic_message;
use crate::confine;
use crate::mutex::lock;

/// Most threads of one disk. The worker ensures that at most one of them flushes at a time.
const THREADS: usize = 8;

/// Passes jobs to threads, which are started when they are needed.
#[derive(Debug)]
pub(in crate::devices::virtio::block) struct Pool {
    disk: Arc<Shared>,
    state: Arc<State>,
    threads: usize,
    /// Jobs that were completed without a thread, because none could be started.
    without_thread: Vec<Completed>,
}

#[derive(Debug)]
struct State {
    jobs: Mutex<Jobs>,
    /// Notified when a job is added or the pool is closed.
    changed: Condvar,
    event: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    completed: Vec<Completed>,
    /// Number of threads that wait for a job.
    idle: usize,
    closed: bool,
    /// Why a thread has ended with its job, if one has.
    panicked: Option<String>,
}

impl Pool {
    /// A pool that signals `event` when jobs have been completed.
    pub(super) fn new(disk: &Arc<Shared>, event: Arc<OwnedFd>) -> Self {
        let (disk, without_thread) = (disk.clone(), Vec::new());
        Self { disk, state: Arc::new(State::new(event)), threads: 0, without_thread }
    }

    pub(super) fn event(&self) -> &OwnedFd {
        &self.state.event
    }

    /// Passes the job to a thread.
    pub(super) fn begin(&mut self, job: Job) {
        let mut jobs = lock(&self.state.jobs);
        jobs.waiting.push_back(job);
        let more = jobs.waiting.len() > jobs.idle && self.threads < THREADS;
        drop(jobs);
        self.state.changed.notify_one();
        if more {
            self.start_thread();
        }
    }

    fn start_thread(&mut self) {
        let (disk, state) = (self.disk.clone(), self.state.clone());
        let builder = thread::Builder::new().name("disk-io".to_owned());
        match builder.spawn(move || state.serve(&disk)) {
            Ok(_) => self.threads += 1,
            // The existing threads do the work; without any, this thread does.
            Err(_) if self.threads > 0 => {}
            Err(error) => {
                tracing::warn!("disk {}: cannot start a thread: {error}", self.disk.image.path());
                let job = lock(&self.state.jobs).waiting.pop_front();
                self.without_thread.extend(job.map(|job| perform(&self.disk, job)));
            }
        }
    }

    /// Returns the jobs that were completed since the last call. Panics if a thread of the pool has panicked:
    /// its job is lost, and the caller's end ends the VM.
    pub(super) fn completed(&mut self) -> Vec<Completed> {
        let mut completed = std::mem::take(&mut self.without_thread);
        completed.append(&mut self.state.completed());
        completed
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.state.jobs).closed = true;
        self.state.changed.notify_all();
    }
}

impl State {
    fn new(event: Arc<OwnedFd>) -> Self {
        Self { jobs: Mutex::default(), changed: Condvar::new(), event }
    }

    /// Runs one thread of the pool.
    fn serve(&self, disk: &Shared) {
        self.note_panic(|| {
            confine::thread(&[POOL]);
            while let Some(job) = self.next() {
                let completed = perform(disk, job);
                lock(&self.jobs).completed.push(completed);
                signal(&self.event);
            }
        });
    }

    fn completed(&self) -> Vec<Completed> {
        let mut jobs = lock(&self.jobs);
        if let Some(why) = jobs.panicked.take() {
            drop(jobs);
            panic!("{why}");
        }
        std::mem::take(&mut jobs.completed)
    }

    /// Calls `work`. If it panics, lets [`completed`](Self::completed) panic too.
    fn note_panic(&self, work: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let why = format!("a thread of its pool panicked: {}", panic_message(&*panic));
            lock(&self.jobs).panicked = Some(why);
            signal(&self.event);
        }
    }

    /// Waits for a job. Returns `None` if the pool was closed.
    fn next(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            jobs.idle += 1;
            jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        }
    }
}

/// Does a job and waits until it is done.
pub(super) fn perform(disk: &Shared, job: Job) -> Completed {
    let result = match &job.work {
        Work::Transfer(transfer) => transfer.step(&disk.image, 0),
        Work::Sync => disk.image.file.sync_data().map(|()| 0),
        Work::Clear(Clear { how: How::Discard, offset, bytes }) if disk.image.is_device() => {
            discard(&disk.image.file, *offset, *bytes).map(|()| 0)
        }
        Work::Clear(Clear { how, offset, bytes }) => {
            fallocate(&disk.image.file, how.flags(), *offset, *bytes)
                .map(|()| 0)
                .map_err(io::Error::from)
        }
    };
    (job, result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_thread_of_the_pool_becomes_one_of_the_thread_of_its_disk() {
        let state = State::new(super::super::new_pool_event());
        state.note_panic(|| panic!("on purpose"));
        rustix::io::read(&state.event, &mut [0; 8]).unwrap();
        let panic = catch_unwind(AssertUnwindSafe(|| state.completed())).unwrap_err();
        assert_eq!(panic_message(&*panic), "a thread of its pool panicked: on purpose");
    }
}
