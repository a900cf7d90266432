//! What the machine's main thread has the disk's thread do. The storage may hang, so the main thread does not wait
//! for it, or only until a deadline.
//!
//! ```text
//!   main thread:  resize --event--> disk's thread: take_resize, and then the answer to whom it may concern
//!                 begin_sync --event--> take_sync, a flush, synced --> main thread: wait_for_sync
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::BlockError;
use super::engine::{new_event, signal};
use crate::devices::storage::OnResized;
use crate::mutex::lock;

/// The errands of the disk's thread.
#[derive(Debug)]
pub(super) struct Errands {
    event: OwnedFd,
    state: Mutex<State>,
    synced: Condvar,
}

#[derive(Debug, Default)]
struct State {
    resize: Option<Resize>,
    /// Whether a resize was asked for and is not answered.
    resizing: bool,
    /// Number of the last sync that was asked for. They are numbered from 1.
    asked: u64,
    /// Number of the last sync that the disk's thread has begun.
    begun: u64,
    /// Number and result of the last sync that has ended.
    ended: (u64, Option<BlockError>),
}

/// A resize: the size to which the storage grows before that, and what to call with the result.
pub(super) struct Resize {
    pub(super) bytes: Option<u64>,
    pub(super) on_resized: OnResized,
}

impl std::fmt::Debug for Resize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resize").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Errands {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { event: new_event()?, state: Mutex::default(), synced: Condvar::new() })
    }

    /// Asks for a resize. Gives it back if another one is not answered yet.
    pub(super) fn resize(&self, resize: Resize) -> Result<(), Resize> {
        let mut state = lock(&self.state);
        if state.resizing {
            return Err(resize);
        }
        (state.resize, state.resizing) = (Some(resize), true);
        signal(&self.event);
        Ok(())
    }

    /// Returns the resize that was asked for. Call [`resized`](Self::resized) when it is done.
    pub(super) fn take_resize(&self) -> Option<Resize> {
        lock(&self.state).resize.take()
    }

    /// Counts the resize as answered.
    pub(super) fn resized(&self) {
        lock(&self.state).resizing = false;
    }

    /// Asks for a sync of what was written until now.
    pub(super) fn begin_sync(&self) {
        lock(&self.state).asked += 1;
        signal(&self.event);
    }

    /// Returns the number of the sync that was asked for, if the disk's thread has not begun it.
    pub(super) fn take_sync(&self) -> Option<u64> {
        let mut state = lock(&self.state);
        let wanted = state.asked > state.begun;
        state.begun = state.asked;
        wanted.then_some(state.begun)
    }

    /// Gives the result of a sync.
    pub(super) fn synced(&self, number: u64, error: Option<BlockError>) {
        let mut state = lock(&self.state);
        if number > state.ended.0 {
            state.ended = (number, error);
            self.synced.notify_all();
        }
    }

    /// Waits until the last sync that was asked for has ended. Returns `None` if it has not at `deadline`.
    pub(super) fn wait_for_sync(&self, deadline: Instant) -> Option<Result<(), BlockError>> {
        let mut state = lock(&self.state);
        while state.ended.0 < state.asked {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.synced.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(state.ended.1.take().map_or(Ok(()), Err))
    }
}

impl AsFd for Errands {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_end_of_an_earlier_sync_is_not_that_of_the_last_one() {
        let errands = Errands::new().unwrap();
        assert!(matches!(errands.wait_for_sync(now()), Some(Ok(()))), "none was asked for");
        assert_eq!(errands.take_sync(), None);
        errands.begin_sync();
        let first = errands.take_sync().unwrap();
        assert!(errands.wait_for_sync(now()).is_none());
        // The storage answers the first one after the main thread has given up and asked again.
        errands.begin_sync();
        errands.synced(first, None);
        assert!(errands.wait_for_sync(now()).is_none());
        let second = errands.take_sync().unwrap();
        let failed = BlockError::Sync { path: "a".to_owned(), source: io::ErrorKind::Other.into() };
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| errands.wait_for_sync(now() + Duration::from_secs(60)));
            errands.synced(second, Some(failed));
            waits.join().unwrap().unwrap().unwrap_err();
        });
        assert_eq!(errands.take_sync(), None);
    }

    #[test]
    fn there_is_one_resize_at_a_time() {
        let errands = Errands::new().unwrap();
        let resize = |bytes| Resize { bytes, on_resized: Box::new(|_| ()) };
        errands.resize(resize(Some(1))).unwrap();
        errands.resize(resize(Some(2))).unwrap_err();
        assert_eq!(errands.take_resize().unwrap().bytes, Some(1));
        assert!(errands.take_resize().is_none());
        errands.resize(resize(Some(3))).unwrap_err();
        errands.resized();
        errands.resize(resize(Some(4))).unwrap();
    }
}
