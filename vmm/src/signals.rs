//! The signals that end a host, over the exec of the next host's program.
//!
//! A program loses a signal that its handlers have taken, and one that comes before its handlers are installed ends it, with
//! all VMs. So both signals are blocked from the last look at them until the next program has installed its handlers: they
//! stay pending, also over the exec. Every other thread of a host has them blocked, or it would take a signal that the main
//! thread has blocked; but not the one that starts a process in a new PID namespace, as long as it lives.

#![expect(unsafe_code, reason = "pthread_sigmask")]

use std::io;

use signal_hook::consts::{SIGINT, SIGTERM};

/// The signals that end a host.
pub(crate) const ENDING: [i32; 2] = [SIGTERM, SIGINT];

/// Leaves the signals that end a host to its main thread. To be called first in every other thread that starts no program.
pub(crate) fn leave_to_main_thread() {
    if let Err(error) = change(libc::SIG_BLOCK) {
        tracing::warn!("this thread cannot block signals: {error}");
    }
}

/// Takes the signals that end a host, also those that came while they were blocked. For a thread that starts a program: a
/// program inherits what is blocked.
pub(crate) fn take() -> io::Result<()> {
    change(libc::SIG_UNBLOCK)
}

/// Blocks the signals that end a host for this thread until this is dropped, or another program has taken them.
pub(crate) struct Blocked(());

impl Blocked {
    pub(crate) fn new() -> io::Result<Self> {
        change(libc::SIG_BLOCK)?;
        Ok(Self(()))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Err(error) = take() {
            tracing::error!("SIGTERM and SIGINT stay blocked: {error}");
        }
    }
}

fn change(how: libc::c_int) -> io::Result<()> {
    // SAFETY: a set is plain data, for which every byte may be zero. Only this function has it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is this function's own.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in ENDING {
        // SAFETY: the set is initialized, and both numbers are those of signals.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialized and only read; the former mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether this thread has both signals blocked, or one of them.
#[cfg(test)]
pub(crate) fn are_blocked() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
    let blocked = u64::from_str_radix(blocked, 16).unwrap();
    ENDING.iter().any(|signal| blocked & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signals_are_blocked_until_the_guard_is_dropped() {
        assert!(!are_blocked());
        let blocked = Blocked::new().unwrap();
        assert!(are_blocked());
        // A thread inherits that, and so would a program.
        let inherited = std::thread::spawn(|| {
            let inherited = are_blocked();
            take().unwrap();
            (inherited, are_blocked())
        });
        assert_eq!(inherited.join().unwrap(), (true, false));
        drop(blocked);
        assert!(!are_blocked());
    }
}
