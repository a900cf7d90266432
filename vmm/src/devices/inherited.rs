//! File descriptors that another program has left open for this one, which `perennial run` lends to devices
//! (`fd=3`).
//!
//! A descriptor is known by its number only, so this module takes only those without FD_CLOEXEC: this process
//! opens all of its own files with it. Any other host lends none: it starts its VMs again after an update, when the
//! program that could open the files again is gone.

#![expect(unsafe_code, reason = "an inherited fd is known by its number only")]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

use crate::mutex::lock;

/// The first descriptor that can be inherited: those below are standard input, output and error.
const FIRST: RawFd = 3;

/// A process has one set of descriptors, hence a static. `None`: this process lends none.
static FILES: Mutex<Option<Files>> = Mutex::new(None);

/// The descriptors that were taken so far, by number.
type Files = BTreeMap<RawFd, OwnedFd>;

/// Lets devices have the descriptors that this process has inherited.
pub fn lend() {
    lock(&FILES).get_or_insert_default();
}

/// Returns a copy of the descriptor `number`. The error says why there is none, and what to do.
pub fn duplicate(number: RawFd) -> Result<OwnedFd, String> {
    let mut files = lock(&FILES);
    let Some(files) = files.as_mut() else {
        return Err("a file descriptor can be given to `perennial run` only: the VMs of a host outlive the \
                    program that could open it again; name a tap with tap="
            .to_owned());
    };
    let file = match files.entry(number) {
        Entry::Occupied(taken) => taken.into_mut(),
        Entry::Vacant(place) => place.insert(take(number)?),
    };
    file.try_clone().map_err(|error| format!("fd {number} cannot be duplicated: {error}"))
}

/// Takes over the descriptor `number`.
fn take(number: RawFd) -> Result<OwnedFd, String> {
    if number < FIRST {
        return Err(format!("fd {number} is standard input, output or error"));
    }
    // SAFETY: the fd may not be open or not be this function's, which is all right for one call that only asks.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let not_open = || {
        format!(
            "fd {number} is not open: start `perennial` with the descriptor open and without FD_CLOEXEC"
        )
    };
    match fcntl_getfd(borrowed) {
        Ok(flags) if flags == FdFlags::empty() => {}
        // One of this process's own files.
        Ok(_) | Err(Errno::BADF) => return Err(not_open()),
        Err(errno) => return Err(format!("fd {number}: {errno}")),
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|errno| format!("fd {number}: {errno}"))?;
    // SAFETY: the fd is open, and nothing in this process owns it: std and rustix open all files with
    // FD_CLOEXEC, so an fd without it was inherited. FD_CLOEXEC, which was just set, prevents that the fd is
    // taken twice.
    let taken = unsafe { OwnedFd::from_raw_fd(number) };
    debug_assert_eq!(taken.as_raw_fd(), number);
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_a_descriptor_that_was_inherited_is_taken_and_only_once() {
        let own = std::fs::File::open("/dev/null").unwrap();
        for (number, why) in [(2, "standard"), (own.as_raw_fd(), "not open"), (999_999, "not open")]
        {
            let said = take(number).unwrap_err();
            assert!(said.contains(why), "{number}: {said}");
        }
        let number = own.into_raw_fd();
        // SAFETY: the fd is open and owned by nobody, as after exec.
        let inherited = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl_setfd(inherited, FdFlags::empty()).unwrap();
        let taken = take(number).unwrap();
        assert_eq!(fcntl_getfd(taken.as_fd()).unwrap(), FdFlags::CLOEXEC);
        assert!(take(number).is_err());
    }
}
