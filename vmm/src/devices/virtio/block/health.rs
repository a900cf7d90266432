//! How the storage of a disk does: which operations it has not answered yet, and which failed.
//!
//! ```text
//!   disk's thread:  begin --> Ticket --> end, failed        main thread:  report
//! ```
//!
//! The disk's thread may be the one that hangs, so it holds the lock only to count.

use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::devices::storage::{Cause, Engine, Operation, STALLED_AFTER, StorageError};
use crate::mutex::lock;

/// Time from one log line about a kind of error to the next.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Operations and errors of one disk.
#[derive(Debug, Default)]
pub(super) struct Health {
    engine: OnceLock<Engine>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// When each operation began that is not answered, by its ticket.
    begun: Vec<Option<Instant>>,
    /// Tickets that are free.
    free: Vec<usize>,
    errors: u64,
    last: Option<(Operation, Cause, Instant)>,
    /// One entry for each kind of error.
    logged: Vec<Logged>,
    /// Whether the log says that operations are stalled.
    stalled: bool,
}

/// The log lines about one kind of error.
#[derive(Debug)]
struct Logged {
    kind: (Operation, Cause),
    last: Instant,
    /// Number of errors of the kind since then.
    since: u64,
}

/// An operation that the storage has not answered. Give it to [`Health::end`].
#[derive(Debug)]
#[must_use = "an operation that does not end counts as stalled"]
pub(super) struct Ticket(usize);

/// A part of the report.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Number of operations that wait.
    pub(super) in_flight: u32,
    /// Number of operations that wait for longer than [`STALLED_AFTER`].
    pub(super) stalled: u32,
    /// For how long the oldest one waits. `None` if all are answered.
    pub(super) oldest: Option<Duration>,
}

/// What [`Health::look`] has found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// What to log: the number of operations that are stalled now, or 0 if none is any more.
    pub(super) news: Option<u32>,
    /// When to look again. `None` if the storage has answered everything.
    pub(super) again: Option<Duration>,
}

impl Health {
    pub(super) fn set_engine(&self, engine: Engine) {
        let _ = self.engine.set(engine);
    }

    pub(super) fn engine(&self) -> Engine {
        self.engine.get().copied().unwrap_or(Engine::Threads)
    }

    /// Counts an operation that begins at `now`.
    pub(super) fn begin(&self, now: Instant) -> Ticket {
        let mut counts = lock(&self.counts);
        let index = counts.free.pop().unwrap_or_else(|| {
            counts.begun.push(None);
            counts.begun.len() - 1
        });
        counts.begun[index] = Some(now);
        Ticket(index)
    }

    /// Counts an operation as answered.
    pub(super) fn end(&self, Ticket(index): Ticket) {
        let mut counts = lock(&self.counts);
        counts.begun[index] = None;
        counts.free.push(index);
    }

    /// Counts an error at `now`. Returns whether to log it, and if so the number of errors of the same kind that
    /// were not logged since the last one: the first error of a kind is logged at once, and later ones once a
    /// minute.
    pub(super) fn failed(&self, operation: Operation, cause: Cause, now: Instant) -> Option<u64> {
        let mut counts = lock(&self.counts);
        counts.errors += 1;
        counts.last = Some((operation, cause, now));
        let kind = (operation, cause);
        match counts.logged.iter_mut().find(|logged| logged.kind == kind) {
            None => {
                counts.logged.push(Logged { kind, last: now, since: 0 });
                Some(0)
            }
            Some(logged) if now.saturating_duration_since(logged.last) >= LOG_EVERY => {
                logged.last = now;
                Some(std::mem::take(&mut logged.since))
            }
            Some(logged) => {
                logged.since += 1;
                None
            }
        }
    }

    /// Returns the number of errors, and the last one.
    pub(super) fn errors(&self, now: Instant) -> (u64, Option<StorageError>) {
        let counts = lock(&self.counts);
        let last = counts.last.map(|(operation, cause, at)| StorageError {
            operation,
            cause,
            seconds_ago: now.saturating_duration_since(at).as_secs(),
        });
        (counts.errors, last)
    }

    pub(super) fn waiting(&self, now: Instant) -> Waiting {
        lock(&self.counts).waiting(now)
    }

    /// Looks for operations that are stalled.
    pub(super) fn look(&self, now: Instant) -> Look {
        let mut counts = lock(&self.counts);
        let Waiting { stalled, oldest, .. } = counts.waiting(now);
        let was = std::mem::replace(&mut counts.stalled, stalled > 0);
        let again = oldest.map(|oldest| match STALLED_AFTER.saturating_sub(oldest) {
            Duration::ZERO => STALLED_AFTER,
            left => left,
        });
        Look { news: (was != (stalled > 0)).then_some(stalled), again }
    }
}

impl Counts {
    fn waiting(&self, now: Instant) -> Waiting {
        let waits = self.begun.iter().flatten().map(|begun| now.saturating_duration_since(*begun));
        waits.fold(Waiting::default(), |Waiting { in_flight, stalled, oldest }, wait| Waiting {
            in_flight: in_flight + 1,
            stalled: stalled + u32::from(wait >= STALLED_AFTER),
            oldest: oldest.max(Some(wait)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_operation_is_stalled_from_ten_seconds_on_until_it_ends() {
        let (health, start) = (Health::default(), Instant::now());
        assert_eq!(health.look(start), Look { news: None, again: None });
        let first = health.begin(start);
        let second = health.begin(start + 4 * SECOND);
        let look = health.look(start + 9 * SECOND);
        assert_eq!(look, Look { news: None, again: Some(SECOND) });
        let look = health.look(start + 10 * SECOND);
        assert_eq!(look, Look { news: Some(1), again: Some(STALLED_AFTER) });
        let both = Waiting { in_flight: 2, stalled: 2, oldest: Some(20 * SECOND) };
        assert_eq!(health.waiting(start + 20 * SECOND), both);
        assert_eq!(health.look(start + 20 * SECOND).news, None, "the log says so already");
        health.end(first);
        let one = Waiting { in_flight: 1, stalled: 1, oldest: Some(16 * SECOND) };
        assert_eq!(health.waiting(start + 20 * SECOND), one);
        // The ticket is used again.
        let third = health.begin(start + 20 * SECOND);
        health.end(second);
        let look = health.look(start + 21 * SECOND);
        assert_eq!(look, Look { news: Some(0), again: Some(9 * SECOND) });
        health.end(third);
        assert_eq!(health.look(start + 30 * SECOND), Look { news: None, again: None });
        assert_eq!(lock(&health.counts).begun.len(), 2);
    }

    #[test]
    fn every_error_is_counted_and_each_kind_is_logged_once_a_minute() {
        let (health, start) = (Health::default(), Instant::now());
        let (full, broken) = (Cause::Errno(libc::ENOSPC), Cause::Errno(libc::EIO));
        let failed = |operation, cause, s| health.failed(operation, cause, start + s * SECOND);
        assert_eq!(failed(Operation::Write, full, 0), Some(0));
        assert_eq!(failed(Operation::Write, full, 1), None);
        assert_eq!(failed(Operation::Write, broken, 1), Some(0), "another kind");
        assert_eq!(failed(Operation::Flush, full, 2), Some(0), "another kind");
        assert_eq!(failed(Operation::Write, full, 59), None);
        assert_eq!(failed(Operation::Write, full, 60), Some(2));
        assert_eq!(failed(Operation::Write, full, 61), None);
        let (errors, last) = health.errors(start + 66 * SECOND);
        let write = Operation::Write;
        assert_eq!(errors, 7);
        assert_eq!(last, Some(StorageError { operation: write, cause: full, seconds_ago: 5 }));
    }
}
