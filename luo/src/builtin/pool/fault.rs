//! Fault injection for tests: makes changes of a pool on disk fail.
//!
//! The pool calls [`before_change`] before each change that it makes on disk. Outside of tests the
//! function does nothing. A test chooses a change by its number. Either only that change fails, or
//! that change and all later ones, as if the machine had stopped there. A fault applies only to
//! the thread that set it up.

#[cfg(not(test))]
use rustix::io::Errno;

/// Called before each change. Outside of tests, always succeeds.
#[cfg(not(test))]
pub(super) fn before_change() -> Result<(), Errno> {
    Ok(())
}

#[cfg(test)]
pub(super) use armed::{Fault, before_change};

#[cfg(test)]
mod armed {
    use std::cell::Cell;

    use rustix::io::Errno;

    /// Which changes fail.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in super::super) enum Fault {
        /// Only the change with this number, counted from 0, fails, with this errno.
        At(usize, Errno),
        /// The change with this number, and all later ones, fail with EIO.
        From(usize),
    }

    thread_local! {
        static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
        static CHANGES: Cell<usize> = const { Cell::new(0) };
    }

    impl Fault {
        /// Runs `act` with the fault. Also returns whether `act` reached the change of this number.
        pub(in super::super) fn during<T>(self, act: impl FnOnce() -> T) -> (T, bool) {
            FAULT.set(Some(self));
            CHANGES.set(0);
            let done = act();
            FAULT.set(None);
            let (Self::At(number, _) | Self::From(number)) = self;
            (done, CHANGES.get() > number)
        }
    }

    pub(in super::super) fn before_change() -> Result<(), Errno> {
        let number = CHANGES.replace(CHANGES.get() + 1);
        match FAULT.get() {
            Some(Fault::At(at, errno)) if at == number => Err(errno),
            Some(Fault::From(from)) if from <= number => Err(Errno::IO),
            _ => Ok(()),
        }
    }
}
