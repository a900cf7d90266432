//! The terminal of this process, for the devices that use it as their console.
//!
//! `perennial run` copies between its terminal and the guest's console itself: only it knows the key
//! sequence that leaves, and only it can restore the terminal's settings. A device gets one end of a socket
//! instead. Any other host has no such copier; its terminal takes output only.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use super::files::OpenError;
use crate::mutex::lock;

/// Path of this process's standard output. (`/dev/stdout` is a link to it that not every `/dev` has.)
const STDOUT: &str = "/proc/self/fd/1";

/// Takes the copier's end of each new line.
type Copier = Box<dyn Fn(UnixStream) + Send>;

/// A process has one terminal, hence a static.
static COPIER: Mutex<Option<Copier>> = Mutex::new(None);

/// Lets devices have lines to the terminal: `copier` gets the other end of each line. The line ends when the
/// device's process does.
pub fn lend(copier: impl Fn(UnixStream) + Send + 'static) {
    *lock(&COPIER) = Some(Box::new(copier));
}

/// Tells the user of `perennial run` where a device is, on standard error. Any other host has its status for that.
pub fn tell(text: &str) {
    if lock(&COPIER).is_some() {
        eprintln!("perennial: {text}");
    }
}

/// Opens a file for the console of a device: a line for input and output if the terminal is lent, otherwise
/// standard output.
pub fn open_line() -> Result<OwnedFd, OpenError> {
    let Some(copier) = &*lock(&COPIER) else { return open_stdout().map(OwnedFd::from) };
    let pair = || {
        let (ours, device) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        device.set_nonblocking(true)?;
        Ok((ours, device))
    };
    let (ours, device) = pair().map_err(|source| OpenError {
        what: "a line to the terminal of",
        path: "/proc/self".into(),
        remedy: "",
        source,
    })?;
    copier(ours);
    Ok(device.into())
}

/// Opens standard output for writing. If it is a terminal, the file is non-blocking if possible: a terminal
/// that was stopped with Ctrl-S polls as writable but blocks a blocking writer.
pub fn open_stdout() -> Result<File, OpenError> {
    if io::stdout().is_terminal() {
        // Opened again, so that only this file is non-blocking. That is refused if the terminal is another
        // user's, as after `su`.
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        if let Ok(file) = options.open(STDOUT) {
            return Ok(file);
        }
    }
    let clone = io::stdout().as_fd().try_clone_to_owned();
    clone.map(File::from).map_err(|source| OpenError {
        what: "serial output",
        path: STDOUT.into(),
        remedy: "",
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_line_leads_to_the_copier_both_ways_and_waits_for_nobody() {
        let (sender, lines) = channel();
        lend(move |line| sender.send(line).unwrap());
        let mut device = File::from(open_line().unwrap());
        let mut ours = lines.recv().unwrap();
        device.write_all(b"out").unwrap();
        ours.write_all(b"in").unwrap();
        let mut bytes = [0; 3];
        ours.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"out");
        assert_eq!(device.read(&mut bytes).unwrap(), 2);
        for end in [device.read(&mut bytes), ours.read(&mut bytes)] {
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        drop(device);
        assert_eq!(ours.read(&mut bytes).unwrap(), 0);
        *lock(&COPIER) = None;
    }
}
