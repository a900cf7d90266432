//! The hardware watchdog: it resets a machine whose kernel hangs, also one that hangs on its way into the next
//! kernel.
//!
//! A thread feeds it, so that a command that takes long does not. Before a jump it is left running: the next host has
//! one period to open it. It is stopped, by the character `V`, only when the host ends on purpose (Linux
//! Documentation/watchdog/watchdog-api.rst), or when the next host is to have none.

#![expect(unsafe_code, reason = "the watchdog's period is set by an ioctl")]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::ioctl::{Updater, ioctl, opcode};

use crate::causes::chain;
use crate::signals;

/// `WDIOC_SETTIMEOUT`: sets the period in seconds, and returns the one that the device took.
const SET_TIMEOUT: rustix::ioctl::Opcode = opcode::read_write::<libc::c_int>(b'W', 6);
/// How long a device that cannot be used is left alone. Its driver may come later than the host.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// The character that stops the watchdog when the device is closed after it.
const MAGIC_CLOSE: &[u8] = b"V";

/// The watchdog cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the watchdog {}: a kernel that hangs is not noticed", device.display())]
pub(super) struct WatchdogError {
    device: PathBuf,
    #[source]
    source: io::Error,
}

/// A watchdog that is fed. Dropping this stops it.
pub(super) struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Opens the device, which starts it with a period of `seconds`, and feeds it three times in each period. A device
    /// that cannot be opened is tried again.
    pub(super) fn start(device: &Path, seconds: u32) -> io::Result<Self> {
        Self::start_with(device, seconds, AGAIN_AFTER)
    }

    fn start_with(device: &Path, seconds: u32, again_after: Duration) -> io::Result<Self> {
        // The first attempt is made here: the last host's period may be short.
        let mut fed = Fed::open(device, seconds);
        if let Err(error) = &fed {
            tracing::error!("{}; it is tried again", chain(error).join(": "));
        }
        let device = device.to_owned();
        let (stop, stopped) = channel();
        let feed = move || {
            signals::leave_to_main_thread();
            loop {
                let pause = match &mut fed {
                    Ok(fed) => fed.feed(),
                    Err(_) => again_after,
                };
                match stopped.recv_timeout(pause) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
                if fed.is_err() {
                    fed = Fed::open(&device, seconds);
                }
            }
            fed.into_iter().for_each(Fed::stop);
        };
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(feed)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

/// An open device.
struct Fed {
    name: String,
    file: File,
    /// How long to wait before it is fed again.
    every: Duration,
    is_failing: bool,
}

impl Fed {
    fn open(device: &Path, seconds: u32) -> Result<Self, WatchdogError> {
        let error = |source| WatchdogError { device: device.to_owned(), source };
        let file = open(device).map_err(error)?;
        let name = device.display().to_string();
        let period = set_period(&file, seconds).unwrap_or_else(|error| {
            tracing::warn!("{name}: its period cannot be set to {seconds} s: {error}");
            seconds
        });
        tracing::info!("{name} resets this machine if it hangs for {period} s");
        let every = Duration::from_secs(period.into()).max(Duration::from_secs(3)) / 3;
        Ok(Self { name, file, every, is_failing: false })
    }

    /// Returns how long to wait before the next time.
    fn feed(&mut self) -> Duration {
        let fed = self.file.write_all(b"\0");
        if let (Err(error), false) = (&fed, self.is_failing) {
            tracing::error!("{}: cannot feed the watchdog: {error}", self.name);
        }
        self.is_failing = fed.is_err();
        self.every
    }

    fn stop(mut self) {
        if let Err(error) = self.file.write_all(MAGIC_CLOSE) {
            tracing::error!("{}: cannot stop the watchdog: {error}", self.name);
        }
    }
}

/// Stops a watchdog that the last host fed and that this one is not to have.
pub(super) fn stop(device: &Path) -> Result<(), WatchdogError> {
    let stopped = open(device).and_then(|mut file| file.write_all(MAGIC_CLOSE));
    stopped.map_err(|source| WatchdogError { device: device.to_owned(), source })
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens a character device only: to feed anything else would overwrite it.
fn open(device: &Path) -> io::Result<File> {
    match device.metadata()?.file_type().is_char_device() {
        true => File::options().write(true).open(device),
        false => Err(io::Error::other("it is not a character device")),
    }
}

fn set_period(file: &File, seconds: u32) -> io::Result<u32> {
    let mut value = libc::c_int::try_from(seconds).unwrap_or(libc::c_int::MAX);
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which `value` is.
    let request = unsafe { Updater::<SET_TIMEOUT, libc::c_int>::new(&mut value) };
    // SAFETY: the request owns the pointer to `value` for as long as the call takes; on another device than a
    // watchdog the kernel knows no such request.
    unsafe { ioctl(file, request) }?;
    Ok(u32::try_from(value).unwrap_or(seconds))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

    use super::*;

    #[test]
    fn the_period_is_set_by_the_ioctl_of_the_kernels_header() {
        assert_eq!(SET_TIMEOUT, 0xc004_5706);
    }

    /// A character device, and where to read what is written to it.
    fn device() -> (PathBuf, File) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        // The terminal stays open, so that the end of a watchdog is not the end of what can be read.
        let mut settings = tcgetattr(&master).unwrap();
        settings.make_raw();
        tcsetattr(&master, OptionalActions::Now, &settings).unwrap();
        (path.into(), File::from(master))
    }

    #[test]
    fn a_watchdog_is_fed_and_stopped_only_when_the_host_ends_on_purpose() {
        let (path, mut written) = device();
        let _terminal = File::options().write(true).open(&path).unwrap();
        let mut next = || {
            let mut byte = [0xff];
            written.read_exact(&mut byte).unwrap();
            byte[0]
        };
        let watchdog = Watchdog::start(&path, 60).unwrap();
        assert_eq!(next(), 0);
        drop(watchdog);
        assert_eq!(next(), b'V', "fed three times a period, and then stopped");
        // A jump ends the thread without a word to the watchdog.
        std::mem::forget(Watchdog::start(&path, 60).unwrap());
        assert_eq!(next(), 0);
        fcntl_setfl(&written, OFlags::NONBLOCK).unwrap();
        let nothing = written.read(&mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_the_last_host_fed_is_stopped() {
        let (path, mut written) = device();
        let _terminal = File::options().write(true).open(&path).unwrap();
        stop(&path).unwrap();
        let mut all = [0; 2];
        assert_eq!((written.read(&mut all).unwrap(), all[0]), (1, b'V'));
    }

    #[test]
    fn a_file_that_is_no_device_stays_as_it_is_and_the_device_in_its_place_is_fed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("watchdog");
        std::fs::write(&path, "an image").unwrap();
        let error = Fed::open(&path, 60).err().unwrap();
        assert!(error.source.to_string().contains("character device"), "{error:?}");
        let watchdog = Watchdog::start_with(&path, 60, Duration::from_millis(1)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "an image");
        // The driver comes.
        let (device, mut written) = device();
        let _terminal = File::options().write(true).open(&device).unwrap();
        std::os::unix::fs::symlink(&device, directory.path().join("new")).unwrap();
        std::fs::rename(directory.path().join("new"), &path).unwrap();
        let mut byte = [0xff];
        written.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0]);
        drop(watchdog);
        written.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *MAGIC_CLOSE);
    }

    #[test]
    fn a_device_that_does_not_exist_is_named_and_its_watchdog_can_be_dropped() {
        let nowhere = Path::new("/nowhere/watchdog");
        let error = Fed::open(nowhere, 60).err().unwrap();
        assert!(error.to_string().contains("/nowhere/watchdog"), "{error}");
        drop(Watchdog::start(nowhere, 60).unwrap());
    }
}
