//! Where tests stop a pool: before any of its changes.
//!
//! [`before_change`] stands in front of each change that a pool makes on disk. In a program it is
//! nothing. A test can count the changes and let one fail, or that one and all that follow, as if
//! the machine had stopped there. It works for the thread that it was set up in.

#[cfg(not(test))]
use rustix::io::Errno;

/// A change is about to be made. EIO: it must not be.
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
        /// Only the one with this number, counted from 0, and with this errno.
        At(usize, Errno),
        /// That one, and all after it.
        From(usize),
    }

    thread_local! {
        static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
        static CHANGES: Cell<usize> = const { Cell::new(0) };
    }

    impl Fault {
        /// Sets the fault up for what `act` does. Says whether it got that far.
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
