//! Opens the files of a VM on a thread of its own, because that may take long or never end: a disk on a server that
//! is gone, a device that has not appeared yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use super::files::{Files, OpenError};
use crate::machine::Machine;

/// Files that are being opened. Its fd is readable when that has ended. If this is dropped before, the files are closed
/// when they have been opened.
#[derive(Debug)]
pub struct Opening {
    ended: UnixStream,
    files: Receiver<Result<Files, OpenError>>,
}

impl Opening {
    /// Begins to open what the restore of `machine` needs.
    pub fn begin(machine: &Machine) -> Result<Self, OpenError> {
        let machine = machine.clone();
        Self::run(move || Files::for_machine(&machine))
    }

    /// Begins to open what a boot of `machine` needs.
    pub fn begin_with_kernel(machine: &Machine) -> Result<Self, OpenError> {
        let machine = machine.clone();
        Self::run(move || Files::for_machine(&machine)?.with_kernel(&machine))
    }

    fn run(
        open: impl FnOnce() -> Result<Files, OpenError> + Send + 'static,
    ) -> Result<Self, OpenError> {
        let (sender, files) = channel();
        let (ended, end) = UnixStream::pair().map_err(failed)?;
        let open = move || {
            // If the send fails, nobody waits any more.
            let _ = sender.send(open());
            // This makes the other end readable.
            drop(end);
        };
        thread::Builder::new().name("open".to_owned()).spawn(open).map_err(failed)?;
        Ok(Self { ended, files })
    }

    /// The error if they are not open after `within`.
    pub fn is_late(&self, within: Duration) -> OpenError {
        let seconds = within.as_secs();
        let problem = format!("one is not open after {seconds} s: its disk or its server hangs");
        failed(io::Error::other(problem))
    }

    /// Returns the files. Waits until they are open.
    pub fn files(self) -> Result<Files, OpenError> {
        let panicked = |_| failed(io::Error::other("the thread that opens them panicked"));
        self.files.recv().map_err(panicked)?
    }
}

fn failed(source: io::Error) -> OpenError {
    OpenError { what: "the files", path: "of its devices".into(), remedy: "", source }
}

impl AsFd for Opening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::guests::answers::readable;

    #[test]
    fn files_that_take_long_are_told_when_they_are_there() {
        let (go, wait) = channel::<()>();
        let opening = Opening::run(move || {
            wait.recv().unwrap();
            Ok(Files::default())
        })
        .unwrap();
        assert!(readable(&[opening.as_fd()], Instant::now()).is_empty());
        go.send(()).unwrap();
        let long = Instant::now() + Duration::from_secs(600);
        assert_eq!(readable(&[opening.as_fd()], long), [0]);
        opening.files().unwrap();
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        let opening = Opening::run(|| panic!("on purpose")).unwrap();
        let error = crate::causes::chain(&opening.files().unwrap_err()).join(": ");
        assert!(error.contains("the files of its devices: the thread"), "{error}");
    }
}
