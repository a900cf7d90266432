//! Work that is done on a thread of its own, because it may take long or never end: a file on a server that is gone, a
//! device that has not appeared yet. The host's loop serves all else meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::signals;
use crate::work::Work;

/// Work that goes on. Its fd is readable when the work has ended. If this is dropped before, the result is dropped when
/// the work has ended.
#[derive(Debug)]
pub struct Elsewhere<T> {
    ended: UnixStream,
    result: Receiver<T>,
}

/// The thread that does the work panicked.
#[derive(Debug, thiserror::Error)]
#[error("its thread panicked")]
pub struct Panicked;

impl<T: Send + 'static> Elsewhere<T> {
    /// Begins `work` on a thread of this name. `what` continues the words "this host is still", for a handover that waits for
    /// the work.
    pub fn begin(
        thread: &str,
        what: String,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, result) = channel();
        let (ended, end) = UnixStream::pair()?;
        let goes_on = Work::begins(what);
        let work = move || {
            signals::leave_to_main_thread();
            // Also while a result is dropped that nobody waits for.
            let _goes_on = goes_on;
            // If the send fails, nobody waits any more.
            let _ = sender.send(work());
            // This makes the other end readable.
            drop(end);
        };
        thread::Builder::new().name(thread.to_owned()).spawn(work)?;
        Ok(Self { ended, result })
    }

    /// Returns the result, if the work has ended. The result can be taken once.
    pub fn take(&self) -> Option<Result<T, Panicked>> {
        self.wait_for(Duration::ZERO)
    }

    /// Waits for the result, for `within` at most.
    pub fn wait_for(&self, within: Duration) -> Option<Result<T, Panicked>> {
        match self.result.recv_timeout(within) {
            Ok(result) => Some(Ok(result)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(Panicked)),
        }
    }

    /// Waits for the result.
    pub fn wait(self) -> Result<T, Panicked> {
        self.result.recv().map_err(|_| Panicked)
    }
}

impl<T> AsFd for Elsewhere<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::guests::answers::readable;

    fn begin<T: Send + 'static>(
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Elsewhere<T>> {
        Elsewhere::begin("test", "testing".to_owned(), work)
    }

    #[test]
    fn work_that_takes_long_is_told_when_it_has_ended() {
        let (go, wait) = channel::<()>();
        let work = begin(move || wait.recv().map(|()| 7)).unwrap();
        assert!(readable(&[work.as_fd()], Instant::now()).is_empty());
        assert!(work.take().is_none());
        go.send(()).unwrap();
        let long = Instant::now() + Duration::from_secs(600);
        assert_eq!(readable(&[work.as_fd()], long), [0]);
        assert_eq!(work.take().unwrap().unwrap(), Ok(7));
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        let panics = || begin::<()>(|| panic!("on purpose")).unwrap();
        assert_eq!(panics().wait().unwrap_err().to_string(), "its thread panicked");
        let work = panics();
        readable(&[work.as_fd()], Instant::now() + Duration::from_secs(600));
        while work.take().is_none() {
            thread::yield_now();
        }
    }
}
