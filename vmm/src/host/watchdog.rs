//! The hardware watchdog: it resets a machine whose kernel hangs, also one that hangs on its way into the next
//! kernel.
//!
//! A thread feeds it, so that a command that takes long does not. Before a jump it is left running: the next host has
//! one period to open it. It is stopped, by the character `V`, only when the host ends on purpose (Linux
//! Documentation/watchdog/watchdog-api.rst).

#![expect(unsafe_code, reason = "the watchdog's period is set by an ioctl")]

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::ioctl::{Updater, ioctl, opcode};

/// `WDIOC_SETTIMEOUT`: sets the period in seconds, and returns the one that the device took.
const SET_TIMEOUT: rustix::ioctl::Opcode = opcode::read_write::<libc::c_int>(b'W', 6);
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
    /// Opens the device, which starts it with a period of `seconds`, and feeds it three times in each period.
    pub(super) fn start(device: &Path, seconds: u32) -> Result<Self, WatchdogError> {
        let error = |source| WatchdogError { device: device.to_owned(), source };
        let mut file = File::options().write(true).open(device).map_err(error)?;
        let period = match set_period(&file, seconds) {
            Ok(taken) => taken,
            Err(source) => {
                let device = device.display();
                tracing::warn!("{device}: its period cannot be set to {seconds} s: {source}");
                seconds
            }
        };
        tracing::info!("{} resets this machine if it hangs for {period} s", device.display());
        let every = Duration::from_secs(period.into()).max(Duration::from_secs(3)) / 3;
        let (stop, stopped) = channel();
        let name = device.display().to_string();
        let feed = move || {
            let mut failing = false;
            loop {
                match file.write_all(b"\0") {
                    Ok(()) => failing = false,
                    Err(error) if !failing => {
                        tracing::error!("{name}: cannot feed the watchdog: {error}");
                        failing = true;
                    }
                    Err(_) => {}
                }
                match stopped.recv_timeout(every) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if let Err(error) = file.write_all(MAGIC_CLOSE) {
                tracing::error!("{name}: cannot stop the watchdog: {error}");
            }
        };
        let thread =
            thread::Builder::new().name("watchdog".to_owned()).spawn(feed).map_err(error)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
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
    use super::*;

    #[test]
    fn the_period_is_set_by_the_ioctl_of_the_kernels_header() {
        assert_eq!(SET_TIMEOUT, 0xc004_5706);
    }

    #[test]
    fn a_watchdog_is_fed_and_stopped_only_when_the_host_ends_on_purpose() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fed = || std::fs::read(file.path()).unwrap();
        let watchdog = Watchdog::start(file.path(), 60).unwrap();
        while fed().is_empty() {
            thread::yield_now();
        }
        assert_eq!(fed(), b"\0", "three times a period");
        drop(watchdog);
        assert_eq!(fed(), b"\0V");
        // A jump ends the thread without a word to the watchdog.
        std::mem::forget(Watchdog::start(file.path(), 60).unwrap());
        while fed().len() > 2 {
            thread::yield_now();
        }
        assert!(!fed().starts_with(b"V"));
    }

    #[test]
    fn a_device_that_does_not_exist_is_named() {
        let error = Watchdog::start(Path::new("/nowhere/watchdog"), 60).err().unwrap();
        assert!(error.to_string().contains("/nowhere/watchdog"), "{error}");
    }
}
