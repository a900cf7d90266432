//! File descriptors that another program has left open for this one and named by their numbers, and those that this one leaves.

#![expect(unsafe_code, reason = "an inherited fd is known by its number only")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// The first descriptor that can be inherited: those below are standard input, output and error.
const FIRST: RawFd = 3;

/// A number is not that of an inherited file descriptor.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TakeError {
    #[error("fd {0} is standard input, output or error")]
    Standard(RawFd),
    #[error(
        "fd {0} is not open: start `perennial` with the descriptor open and without FD_CLOEXEC"
    )]
    NotOpen(RawFd),
    #[error("fd {0}: {1}")]
    Refused(RawFd, Errno),
}

/// Takes over the descriptor `number`. Takes only one without FD_CLOEXEC, because this process opens all of its own
/// files with it.
pub(crate) fn take(number: RawFd) -> Result<OwnedFd, TakeError> {
    if number < FIRST {
        return Err(TakeError::Standard(number));
    }
    // SAFETY: borrowed only to ask whether it is open, which is defined for any number but -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    match fcntl_getfd(borrowed) {
        Ok(flags) if flags == FdFlags::empty() => {}
        // One of this process's own files.
        Ok(_) | Err(Errno::BADF) => return Err(TakeError::NotOpen(number)),
        Err(errno) => return Err(TakeError::Refused(number, errno)),
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|errno| TakeError::Refused(number, errno))?;
    // SAFETY: the fd is open, and nothing in this process owns it: std and rustix open all files with
    // FD_CLOEXEC, so an fd without it was inherited. FD_CLOEXEC, which was just set, prevents that the fd is
    // taken twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether the descriptor `number` is open, and stays open over an exec.
pub(crate) fn survives_exec(number: RawFd) -> bool {
    // SAFETY: borrowed only to ask for its flags, which is defined for any number but -1.
    number >= 0 && fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }) == Ok(FdFlags::empty())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_a_descriptor_that_was_inherited_is_taken_and_only_once() {
        let own = std::fs::File::open("/dev/null").unwrap();
        for (number, why) in [(2, "standard"), (own.as_raw_fd(), "not open"), (999_999, "not open")]
        {
            let said = take(number).unwrap_err().to_string();
            assert!(said.contains(why), "{number}: {said}");
        }
        let number = own.into_raw_fd();
        // SAFETY: the fd is open and owned by nobody, as after exec.
        let inherited = unsafe { BorrowedFd::borrow_raw(number) };
        assert!(!survives_exec(number) && !survives_exec(-1) && !survives_exec(999_999));
        fcntl_setfd(inherited, FdFlags::empty()).unwrap();
        assert!(survives_exec(number));
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(fcntl_getfd(taken.as_fd()).unwrap(), FdFlags::CLOEXEC);
        assert!(take(number).is_err());
    }
}
