//! What the main thread has the disk's thread do, because the storage may hang: then only this disk waits, and
//! the main thread gives up after a while.
//!
//! ```text
//!   main thread: ask --event--> disk's thread: serve: work, finish --> answer
//! ```

use std::io;
use std::mem::take;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::BlockError;
use super::engine::{new_event, signal};
use crate::mutex::lock;

/// Something to do that may have to wait for the storage. Each is answered with a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Errand {
    /// Make the disk as large as its storage, after growing that to this size if given.
    Resize(Option<u64>),
    /// Make completed writes durable. The answer is 0.
    Sync,
}

impl Errand {
    /// How long the main thread waits for the answer.
    pub(super) fn within(self) -> Duration {
        Duration::from_secs(match self {
            Self::Resize(_) => 10,
            // As long as the requests in flight have before it.
            Self::Sync => 20,
        })
    }
}

/// The errand of the disk's thread.
#[derive(Debug)]
pub(super) struct Errands {
    event: OwnedFd,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Asked(Errand),
    /// The disk's thread waits for the storage.
    Working,
    Answered(Result<u64, BlockError>),
}

impl Errands {
    pub(super) fn new() -> io::Result<Self> {
        let (state, answered) = (Mutex::default(), Condvar::new());
        Ok(Self { event: new_event()?, state, answered })
    }

    /// Asks the disk's thread, and waits for the answer for at most `within`. Returns `None` if there is none:
    /// then the errand is not finished, whenever the storage answers.
    pub(super) fn ask(&self, errand: Errand, within: Duration) -> Option<Result<u64, BlockError>> {
        let deadline = Instant::now() + within;
        let mut state = lock(&self.state);
        *state = State::Asked(errand);
        signal(&self.event);
        loop {
            match take(&mut *state) {
                State::Answered(answer) => return Some(answer),
                other => *state = other,
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *state = State::Idle;
                return None;
            }
            let waited = self.answered.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Does what the main thread asks, if it asks: `work`, which may take long, and then `finish` with its result,
    /// if the main thread still waits. Called on the disk's thread.
    pub(super) fn serve(
        &self,
        work: impl FnOnce(Errand) -> Result<u64, BlockError>,
        finish: impl FnOnce(Errand, u64) -> u64,
    ) {
        let errand = {
            let mut state = lock(&self.state);
            match take(&mut *state) {
                State::Asked(errand) => {
                    *state = State::Working;
                    errand
                }
                other => return *state = other,
            }
        };
        let worked = work(errand);
        let mut state = lock(&self.state);
        if let State::Working = *state {
            *state = State::Answered(worked.map(|bytes| finish(errand, bytes)));
            self.answered.notify_all();
        }
    }
}

impl AsFd for Errands {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_comes_too_late_changes_nothing_and_the_next_one_counts() {
        let errands = Errands::new().unwrap();
        assert!(errands.ask(Errand::Sync, Duration::ZERO).is_none());
        // The thread has not begun in time, so it does not begin at all.
        errands.serve(|_| unreachable!(), |_, _| unreachable!());
        let [first, second] = [2, 3].map(|bytes| Errand::Resize(Some(bytes)));
        std::thread::scope(|scope| {
            // The storage answers only after the main thread has given up and asked again.
            let asked = scope.spawn(|| errands.ask(first, Duration::from_secs(60)));
            while !matches!(*lock(&errands.state), State::Asked(_)) {
                std::thread::yield_now();
            }
            let work = |errand| {
                assert_eq!(errand, first);
                *lock(&errands.state) = State::Asked(second);
                Ok(2)
            };
            errands.serve(work, |_, _| unreachable!());
            errands.serve(|errand| Ok(u64::from(errand == second) * 3), |_, bytes| bytes * 10);
            assert_eq!(asked.join().unwrap().unwrap().unwrap(), 30);
        });
    }
}
