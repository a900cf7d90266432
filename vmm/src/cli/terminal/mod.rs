//! The terminal of this program as the console of a guest.
//!
//! A thread copies between standard input and output and a *line*, a socket or a pseudoterminal that leads
//! to the guest's console. The terminal is raw as long as it has a line; see [`keys`] for how to leave. Standard input and
//! output may also be files or pipes: then there are no key sequences, and the end of the input is no
//! reason to end anything.

mod copier;
mod keys;
mod settings;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use copier::Copier;
use settings::Settings;

/// How long the rest of a guest's output may take to be written to a slow reader.
const REST_WITHIN: Duration = Duration::from_secs(1);

/// The copying thread, and the settings of the terminal, which are restored when this is dropped.
#[derive(Debug)]
pub(super) struct Terminal {
    lines: Lines,
    left: UnixStream,
    /// Gets a message at the end of each line, and is disconnected when the user has left.
    ended: Receiver<()>,
    // Dropped last, after the rest of the output.
    _settings: Settings,
}

/// Gives the copying thread its lines, one after the other.
#[derive(Debug)]
pub(super) struct Lines {
    sender: Sender<File>,
    wake: UnixStream,
}

impl Lines {
    /// Connects the terminal with this line, a non-blocking file, once the line before it has ended.
    pub(super) fn add(&self, line: File) {
        // Errors if the user has left: then nobody is there to see the line.
        let _ = self.sender.send(line);
        let _ = io::Write::write(&mut &self.wake, &[0]);
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { sender: self.sender.clone(), wake: self.wake.try_clone()? })
    }
}

impl Terminal {
    /// Starts the copying thread. It leaves the terminal alone until it gets a line.
    pub(super) fn open() -> io::Result<Self> {
        let settings = Settings::remember();
        let (sender, lines) = channel();
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let (left, leave) = UnixStream::pair()?;
        let (line_ended, ended) = channel();
        let copier = Copier::new(settings.switch(), lines, woken, line_ended)?;
        std::thread::Builder::new().name("terminal".to_owned()).spawn(move || {
            // Dropped when the thread ends, for whatever reason.
            let _leave = leave;
            copier.run();
        })?;
        Ok(Self { lines: Lines { sender, wake }, left, ended, _settings: settings })
    }

    /// Where to add lines.
    pub(super) fn lines(&self) -> io::Result<Lines> {
        self.lines.try_clone()
    }

    /// A socket that ends when the user has left.
    pub(super) fn left(&self) -> io::Result<UnixStream> {
        self.left.try_clone()
    }

    /// Waits until a line has ended or the user has left, at most for this time.
    pub(super) fn wait(&self, most: Option<Duration>) -> Wait {
        let ended = match most {
            Some(most) => self.ended.recv_timeout(most),
            None => self.ended.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match ended {
            Ok(()) => Wait::LineEnded,
            Err(RecvTimeoutError::Timeout) => Wait::TimedOut,
            Err(RecvTimeoutError::Disconnected) => Wait::Left,
        }
    }
}

/// How a wait for the terminal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    LineEnded,
    TimedOut,
    Left,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The thread writes what its lines still hold, and ends with them.
        let _ = self.lines.wake.shutdown(std::net::Shutdown::Both);
        while self.wait(Some(REST_WITHIN)) == Wait::LineEnded {}
    }
}
