//! The thread of a disk: takes requests from the rings, passes them to an [`Engine`], and completes them in
//! the order in which the engine finishes them.
//!
//! ```text
//!   ring --take--> parse --> Engine --> completed --> status, used ring
//!                     \--> Flushes --sync--> Engine --/
//! ```
//!
//! The requests in flight are bounded in number and bytes, because a pause waits for them. Further requests
//! stay in the ring.

use std::io;
use std::mem::take;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::engine::{Completed, Engine, Job, MOST, Work};
use super::errand::Resize;
use super::health::{Look, Ticket};
use super::request::{self, Answer, Clear, How, Status, Task, is_unsupported};
use super::transfer::Transfer;
use super::{BlockError, REQUEST_MAX, SECTOR, Shared};
use crate::devices::alarm::Alarm;
use crate::devices::rate_limit::RateLimiter;
use crate::devices::storage::{Cause, Operation, STALLED_AFTER};
use crate::devices::virtio::{Request, Rings, VirtioWorker};

/// Indexes among the event sources.
const WATCH: usize = 1;
const ERRAND: usize = 2;
const TIMER: usize = 3;
/// Most requests that are taken before the thread handles its other events.
const BATCH: usize = 256;

/// The part of a disk that executes requests.
#[derive(Debug)]
pub struct BlockWorker {
    disk: Arc<Shared>,
    engine: Engine,
    flushes: Flushes,
    /// Number of requests that the engine has, and their bytes.
    requests: usize,
    bytes: u64,
    /// Whether the bounds left requests in the rings.
    full: bool,
    limiter: RateLimiter,
    /// Expires when the limits allow the next request. Only a disk with limits has one.
    timer: Option<Alarm>,
    /// Expires when it is time to look for stalled operations.
    watch: Alarm,
    /// Whether `watch` is set. It stays set when the storage answers, because setting it for each request would
    /// be a system call for each.
    watches: bool,
}

/// What waits for a flush: the one that is running, and the next one.
///
/// One flush runs at a time. A request that comes meanwhile waits for the next flush, because the running one
/// may not cover the writes before the request. So any number of requests takes two flushes and one thread.
///
/// If a flush fails, the requests that wait for the next flush fail as well: the kernel reports a write error
/// only once, and the next flush would succeed although the data is lost.
#[derive(Debug, Default)]
struct Flushes {
    running: Vec<Waiter>,
    waiting: Vec<Waiter>,
    /// Whether a flush failed that no request of the guest waited for. The guest's next one fails instead.
    failed_unheard: bool,
}

/// What waits for a flush.
#[derive(Debug)]
enum Waiter {
    /// A request of the guest.
    Guest((Request, Answer)),
    /// The main thread, with the number of its sync.
    Sync(u64),
}

impl Flushes {
    /// Counts the end of a flush. `heard` is whether requests of the guest waited for it. Returns whether they fail.
    fn end(&mut self, heard: bool, failed: bool) -> bool {
        let fails = failed || self.failed_unheard;
        self.failed_unheard = fails && !heard;
        fails
    }
}

impl BlockWorker {
    pub(super) fn new(disk: Arc<Shared>, engine: Engine) -> Self {
        let limiter = RateLimiter::new(&disk.image.options.rate_limits, Instant::now());
        let alarm = || Alarm::new().expect("the process may open one more file");
        let (timer, watch) = (limiter.limits_anything().then(alarm), alarm());
        let flushes = Flushes::default();
        let (requests, bytes, full, watches) = (0, 0, false, false);
        Self { disk, engine, flushes, requests, bytes, full, limiter, timer, watch, watches }
    }

    /// Returns whether the limits allow a request now. If not, sets the timer for when they do.
    fn allowed(&mut self) -> bool {
        let Some(timer) = &self.timer else { return true };
        let wait = self.limiter.wait(Instant::now());
        if wait.is_zero() {
            return true;
        }
        timer.set(Some(wait));
        false
    }

    /// Takes requests of queue `queue` up to the bounds.
    fn take(&mut self, queue: usize, rings: &Rings) {
        for _ in 0..BATCH {
            if self.requests >= MOST || self.bytes >= REQUEST_MAX {
                self.full = true;
                return;
            }
            if !self.allowed() {
                return;
            }
            let Some(request) = rings.take(queue) else { return };
            let Some((answer, task)) = request::parse(&self.disk, rings.memory(), request.chain())
            else {
                rings.complete(request, 0);
                continue;
            };
            self.limiter.take(task.bytes());
            match task {
                Task::Done(status, written) => {
                    let written = answer.give(rings.memory(), status, written);
                    rings.complete(request, written);
                }
                Task::Flush => self.flush(Waiter::Guest((request, answer))),
                Task::Transfer(transfer) => {
                    self.begin(transfer.bytes, Work::Transfer(transfer), (request, answer));
                }
                Task::Clear(clear) => {
                    self.begin(clear.bytes, Work::Clear(clear), (request, answer));
                }
            }
        }
        rings.look_again(queue);
    }

    fn begin(&mut self, bytes: u64, work: Work, request: (Request, Answer)) {
        self.requests += 1;
        self.bytes += bytes;
        let ticket = self.count();
        self.engine.begin(Job { work, ticket, request: Some(request) });
    }

    /// Counts an operation on the storage, which begins now.
    fn count(&mut self) -> Ticket {
        if !std::mem::replace(&mut self.watches, true) {
            self.watch.set(Some(STALLED_AFTER));
        }
        self.disk.health.begin(Instant::now())
    }

    /// Looks for stalled operations. Logs when there are some, and when there are none any more.
    fn look(&mut self) {
        let Look { news, again } = self.disk.health.look(Instant::now());
        let (path, seconds) = (self.disk.image.path(), STALLED_AFTER.as_secs());
        match news {
            Some(0) => tracing::info!("disk {path}: its storage answers again"),
            Some(count) => tracing::warn!(
                "disk {path}: its storage has not answered for more than {seconds} s (operations: {count})"
            ),
            None => {}
        }
        self.watches = again.is_some();
        self.watch.set(again);
    }

    /// Does what the main thread asks for.
    fn run_errands(&mut self, rings: &Rings) {
        if let Some(number) = self.disk.errands.take_sync() {
            self.flush(Waiter::Sync(number));
        }
        let Some(Resize { bytes, on_resized }) = self.disk.errands.take_resize() else { return };
        let resized = self.resize(bytes, rings);
        self.disk.errands.resized();
        on_resized(resized.map_err(Into::into));
    }

    fn resize(&self, wanted: Option<u64>, rings: &Rings) -> Result<u64, BlockError> {
        let disk = &self.disk;
        // Counts, because the storage may hang.
        let ticket = disk.health.begin(Instant::now());
        let here = disk.measure(wanted);
        disk.health.end(ticket);
        if disk.grow(here?) && disk.grown.swap(false, Ordering::Relaxed) {
            rings.config_changed();
        }
        let (path, bytes) = (disk.image.path(), disk.sectors() * SECTOR);
        tracing::info!("disk {path}: it has {bytes} bytes now");
        Ok(bytes)
    }

    /// Lets `waiter` wait for a flush that begins after this call.
    fn flush(&mut self, waiter: Waiter) {
        if self.flushes.running.is_empty() {
            self.flushes.running.push(waiter);
            let ticket = self.count();
            self.engine.begin(Job { work: Work::Sync, ticket, request: None });
        } else {
            self.flushes.waiting.push(waiter);
        }
    }

    /// Begins the jobs that were taken and completes finished ones, until none of either is left.
    fn advance(&mut self, rings: &Rings) {
        loop {
            self.engine.submit();
            let completed = self.engine.completed();
            if completed.is_empty() {
                break;
            }
            for (job, result) in completed {
                self.complete((job, result), rings);
            }
        }
        if self.full && self.requests < MOST && self.bytes < REQUEST_MAX {
            self.full = false;
            (0..rings.count()).for_each(|queue| rings.look_again(queue));
        }
    }

    fn complete(&mut self, (job, result): Completed, rings: &Rings) {
        let again = result.as_ref().is_err_and(|error| {
            matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        });
        if again {
            return self.engine.begin(job);
        }
        match job {
            Job { work: Work::Transfer(transfer), ticket, request: Some(request) } => {
                self.moved(transfer, ticket, request, result, rings);
            }
            Job { work: Work::Clear(clear), ticket, request: Some(request) } => {
                let instead = result.as_ref().err().and_then(|error| clear.instead(error));
                if let Some(instead) = instead {
                    let work = Work::Clear(instead);
                    return self.engine.begin(Job { work, ticket, request: Some(request) });
                }
                self.disk.health.end(ticket);
                self.cleared(clear, request, result.map(drop), rings);
            }
            Job { ticket, .. } => {
                self.disk.health.end(ticket);
                self.flushed(result.map(drop), rings);
            }
        }
    }

    fn moved(
        &mut self,
        mut transfer: Transfer,
        ticket: Ticket,
        request: (Request, Answer),
        result: io::Result<usize>,
        rings: &Rings,
    ) {
        let done = match result.and_then(|count| transfer.advance(count)) {
            Ok(false) => {
                let work = Work::Transfer(transfer);
                return self.engine.begin(Job { work, ticket, request: Some(request) });
            }
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        self.disk.health.end(ticket);
        self.requests -= 1;
        self.bytes -= transfer.bytes;
        if transfer.write {
            return self.written(Operation::Write, request, done, rings);
        }
        let status = self.status(Operation::Read, &done);
        answer(request, status, if done.is_ok() { transfer.bytes } else { 0 }, rings);
    }

    fn cleared(
        &mut self,
        clear: Clear,
        request: (Request, Answer),
        result: io::Result<()>,
        rings: &Rings,
    ) {
        let Clear { how, offset: _, bytes } = clear;
        self.requests -= 1;
        self.bytes -= bytes;
        match (how, result) {
            // A discard is a hint, and Linux logs each one that is refused. Zeroes the guest can write itself.
            (How::Discard, Err(error)) if is_unsupported(&error) => {
                answer(request, Status::Ok, 0, rings);
            }
            (_, Err(error)) if is_unsupported(&error) => {
                answer(request, Status::Unsupported, 0, rings);
            }
            (How::Discard, result) => {
                let status = self.status(Operation::Discard, &result);
                answer(request, status, 0, rings);
            }
            (_, result) => self.written(Operation::WriteZeroes, request, result, rings),
        }
    }

    /// Completes a request that has changed the disk. For a driver without FLUSH the change must be durable
    /// first (5.2.6.2).
    fn written(
        &mut self,
        operation: Operation,
        request: (Request, Answer),
        result: io::Result<()>,
        rings: &Rings,
    ) {
        if result.is_ok() && !self.disk.driver_flushes.load(Ordering::Relaxed) {
            return self.flush(Waiter::Guest(request));
        }
        let status = self.status(operation, &result);
        answer(request, status, 0, rings);
    }

    fn flushed(&mut self, result: io::Result<()>, rings: &Rings) {
        let mut done = take(&mut self.flushes.running);
        let waiting = take(&mut self.flushes.waiting);
        match result.is_ok() {
            true => waiting.into_iter().for_each(|waiter| self.flush(waiter)),
            false => done.extend(waiting),
        }
        let status = self.status(Operation::Flush, &result);
        let heard = done.iter().any(|waiter| matches!(waiter, Waiter::Guest(_)));
        let fails = self.flushes.end(heard, result.is_err());
        for waiter in done {
            match waiter {
                Waiter::Guest(request) => {
                    answer(request, if fails { Status::IoError } else { status }, 0, rings);
                }
                Waiter::Sync(number) => self.synced(number, &result),
            }
        }
    }

    /// Gives the main thread the result of a sync.
    fn synced(&self, number: u64, result: &io::Result<()>) {
        let error = result.as_ref().err().map(|error| BlockError::Sync {
            path: self.disk.image.path(),
            source: error.raw_os_error().map_or(error.kind().into(), io::Error::from_raw_os_error),
        });
        self.disk.errands.synced(number, error);
    }

    /// Returns the status for the guest. Counts an error of the host, and logs it unless one of its kind was
    /// logged a short time ago.
    fn status(&self, operation: Operation, result: &io::Result<()>) -> Status {
        let Err(error) = result else { return Status::Ok };
        let (path, cause) = (self.disk.image.path(), Cause::from(error));
        match self.disk.health.failed(operation, cause, Instant::now()) {
            Some(0) => tracing::warn!("disk {path}: a {operation} failed: {cause}"),
            Some(more) => {
                tracing::warn!("disk {path}: a {operation} failed, and {more} before it: {cause}");
            }
            None => {}
        }
        Status::IoError
    }
}

fn answer((request, answer): (Request, Answer), status: Status, written: u64, rings: &Rings) {
    let written = answer.give(rings.memory(), status, written);
    rings.complete(request, written);
}

impl VirtioWorker for BlockWorker {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let timer = self.timer.as_ref().map(AsFd::as_fd);
        let sources = [self.engine.event(), self.watch.as_fd(), self.disk.errands.as_fd()];
        sources.into_iter().chain(timer).collect()
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        self.take(queue, rings);
        self.advance(rings);
    }

    fn on_source(&mut self, source: usize, rings: &Rings) {
        match source {
            TIMER => (0..rings.count()).for_each(|queue| rings.look_again(queue)),
            WATCH => self.look(),
            ERRAND => self.run_errands(rings),
            _ => {}
        }
        self.advance(rings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_that_failed_while_no_request_waited_fails_the_next_request_and_no_other() {
        let mut flushes = Flushes::default();
        assert!(!flushes.end(true, false));
        assert!(flushes.end(true, true));
        assert!(!flushes.end(true, false), "the guest was told");
        // Only the host has waited, twice.
        flushes.end(false, true);
        flushes.end(false, false);
        assert!(flushes.end(true, false));
        assert!(!flushes.end(true, false));
    }
}
