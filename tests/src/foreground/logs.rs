//! The log of a VM's serial port: the host bounds its size, and follows a rename.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::init::{BOOTED, Problem};

/// The serial port of the VM.
pub(super) const SERIAL: &str = "file=/run/logs/vm,max_size=64K,keep=2";
const DIRECTORY: &str = "/run/logs";
const LOG: &str = "/run/logs/vm";
/// `max_size`.
const MOST: u64 = 64 << 10;

/// Longest time for the host to replace a log.
const WITHIN: Duration = Duration::from_secs(120);

/// Leaves a log that the first lines of the VM fill.
pub(super) fn leave_nearly_full() -> Result<(), Problem> {
    fs::create_dir_all(DIRECTORY)?;
    let line = [b'.'; 63].into_iter().chain([b'\n']).collect::<Vec<_>>();
    let mut log = File::create(LOG)?;
    (0..MOST / 64 - 1).try_for_each(|_| log.write_all(&line))?;
    Ok(())
}

/// Waits until the host has renamed the log that was left, and the VM writes another one.
pub(super) fn expect_rotation() -> Result<(), Problem> {
    let old = format!("{LOG}.1");
    wait_until("the log is rotated", || size(&old) >= MOST && has_new_log())
}

/// Renames the log, as `logrotate` does, and waits until the VM writes another one.
pub(super) fn expect_to_follow_rename(when: &str) -> Result<(), Problem> {
    wait_until(&format!("there is a log {when}"), has_new_log)?;
    fs::rename(LOG, format!("{LOG}-{when}"))?;
    wait_until(&format!("the rename {when} is followed"), has_new_log)
}

/// All that the VM has written to the present log.
pub(super) fn text() -> Result<String, Problem> {
    Ok(String::from_utf8_lossy(&fs::read(LOG)?).into_owned())
}

/// Errors if the guest has booted since there is a log.
pub(super) fn expect_no_boot() -> Result<(), Problem> {
    wait_until("the guest says something", has_new_log)?;
    match text()? {
        log if log.contains(BOOTED) => Err(format!("the guest booted anew: {log}").into()),
        _ => Ok(()),
    }
}

fn has_new_log() -> bool {
    (1..MOST).contains(&size(LOG))
}

fn size(path: &str) -> u64 {
    Path::new(path).metadata().map_or(0, |found| found.len())
}

fn wait_until(what: &str, holds: impl Fn() -> bool) -> Result<(), Problem> {
    let deadline = Instant::now() + WITHIN;
    while !holds() {
        if Instant::now() >= deadline {
            let found: Vec<_> = fs::read_dir(DIRECTORY)?.flatten().collect();
            return Err(format!("{what}: not in time: {found:?}").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
