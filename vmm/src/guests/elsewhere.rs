//! Work that is done on a thread of its own, because it may take long or never end: a file on a server that is gone, a
//! device that has not appeared yet. The host's loop serves all else meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;

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
    /// Begins `work` on a thread of this name.
    pub fn begin(thread: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let (sender, result) = channel();
        let (ended, end) = UnixStream::pair()?;
        let work = move || {
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
        match self.result.try_recv() {
            Ok(result) => Some(Ok(result)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Panicked)),
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
    use std::time::{Duration, Instant};

    use super::*;
    use crate::guests::answers::readable;

    #[test]
    fn work_that_takes_long_is_told_when_it_has_ended() {
        let (go, wait) = channel::<()>();
        let work = Elsewhere::begin("test", move || wait.recv().map(|()| 7)).unwrap();
        assert!(readable(&[work.as_fd()], Instant::now()).is_empty());
        assert!(work.take().is_none());
        go.send(()).unwrap();
        let long = Instant::now() + Duration::from_secs(600);
        assert_eq!(readable(&[work.as_fd()], long), [0]);
        assert_eq!(work.take().unwrap().unwrap(), Ok(7));
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        let begin = || Elsewhere::<()>::begin("test", || panic!("on purpose")).unwrap();
        assert_eq!(begin().wait().unwrap_err().to_string(), "its thread panicked");
        let work = begin();
        readable(&[work.as_fd()], Instant::now() + Duration::from_secs(600));
        while work.take().is_none() {
            thread::yield_now();
        }
    }
}
