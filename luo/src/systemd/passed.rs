//! The fds that a service manager started this process with: sd_listen_fds(3).
#![expect(unsafe_code, reason = "the environment gives open fds by their numbers")]

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, FdFlags, fcntl_setfd};

/// The first passed fd (`SD_LISTEN_FDS_START`). The others follow without gaps.
const FIRST: RawFd = 3;

/// Takes over the fds that this process was started with, and returns them with their names. A
/// second call returns no fds.
///
/// From now on the fds are closed at `exec`. Callers must remove the variables
/// ([`VARIABLES`](super::VARIABLES)) from the environment of children.
pub(super) fn take() -> Result<Vec<(String, OwnedFd)>, Errno> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let names = names_of_this_process();
    let mut passed = Vec::with_capacity(names.len());
    for (fd, name) in (FIRST..).zip(names) {
        // SAFETY: `LISTEN_PID` says that the service manager opened this fd for this process, so
        // no file that was opened later has its number. `TAKEN` makes sure that it is taken once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
        passed.push((name, fd));
    }
    Ok(passed)
}

/// Returns the names of the fds that this process was started with.
pub(super) fn names_of_this_process() -> Vec<String> {
    names(std::process::id(), |name| std::env::var_os(name))
}

/// Returns the names of the fds that were passed to process `pid`, in the order of their numbers.
/// Returns no names if the variables are meant for another process or are invalid.
fn names(pid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Vec<String> {
    let text = |name| variable(name).and_then(|value| value.into_string().ok());
    let number = |name| text(name).and_then(|value| value.parse::<u32>().ok());
    let count = match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        // A number above every possible limit on fds is not a count of fds.
        (Some(meant), Some(count)) if meant == pid && count <= 1 << 20 => count as usize,
        _ => return Vec::new(),
    };
    let names = text("LISTEN_FDNAMES").unwrap_or_default();
    let mut names: Vec<String> = names.split(':').map(str::to_owned).collect();
    names.resize(count, String::new());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pid: &str, count: &str, named: &str) -> Vec<String> {
        names(7, |variable| match variable {
            "LISTEN_PID" => Some(pid.into()),
            "LISTEN_FDS" => Some(count.into()),
            "LISTEN_FDNAMES" => Some(named.into()),
            _ => None,
        })
    }

    #[test]
    fn every_fd_has_the_name_at_its_place() {
        assert_eq!(with("7", "3", "web/0:web/1:stored"), ["web/0", "web/1", "stored"]);
    }

    #[test]
    fn an_fd_without_a_name_is_taken_and_a_name_without_an_fd_is_ignored() {
        assert_eq!(with("7", "2", "web/0"), ["web/0", ""]);
        assert_eq!(with("7", "1", "web/0:web/1"), ["web/0"]);
        assert_eq!(with("7", "0", ""), [""; 0]);
    }

    #[test]
    fn variables_for_another_process_or_without_numbers_pass_no_fds() {
        for (pid, count) in [("8", "1"), ("", "1"), ("7", ""), ("7", "-1"), ("7", "4294967295")] {
            assert_eq!(with(pid, count, "web/0"), [""; 0], "{pid} {count}");
        }
        assert_eq!(names(7, |_| None), [""; 0]);
    }
}
