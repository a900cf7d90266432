//! The signals that end a host, over the exec of the next host's program.
//!
//! A program loses a signal that its handlers have taken, and one that comes before its handlers are installed ends it, with
//! all VMs. So both signals are blocked from the last look at them until the next program has installed its handlers: they
//! stay pending, also over the exec. Every other thread of a host has them blocked at all times, or it would take a signal that
//! the main thread has blocked. A thread that the main thread waits for may do as the main thread does.
//!
//! A program inherits what is blocked in the thread that starts it, so a thread has them unblocked in the new process, before
//! that executes the program.

#![expect(unsafe_code, reason = "pthread_sigmask, signal, and code between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

use signal_hook::consts::{SIGINT, SIGTERM};

/// The signals that end a host.
pub(crate) const ENDING: [i32; 2] = [SIGTERM, SIGINT];

/// Leaves the signals that end a host to its main thread. To be called first in every other thread.
pub(crate) fn leave_to_main_thread() {
    if let Err(error) = change(libc::SIG_BLOCK) {
        tracing::warn!("this thread cannot block signals: {error}");
    }
}

/// Takes the signals that end a host, also those that came while they were blocked. For its main thread.
pub(crate) fn take() -> io::Result<()> {
    change(libc::SIG_UNBLOCK)
}

/// Lets `command` start its program with none of the signals blocked, although this thread leaves them to the main thread.
pub(crate) fn unblock_in(command: &mut Command) {
    // Without such code, the process is started faster.
    if !are_blocked() {
        return;
    }
    let unblock = || {
        for signal in ENDING {
            // The handlers of this process would write to its pipe.
            // SAFETY: the default action is no code, and the new process has no other thread.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        change(libc::SIG_UNBLOCK)
    };
    // SAFETY: between fork and exec, this calls only functions that are safe in a signal handler, and allocates nothing.
    unsafe { command.pre_exec(unblock) };
}

/// Whether this thread has one of the signals blocked.
pub(crate) fn are_blocked() -> bool {
    // SAFETY: a set is plain data, for which every byte may be zero. Only this function has it.
    let mut blocked: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: without a new mask this changes nothing, and writes the present one to the set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut blocked) };
    // SAFETY: the set is initialized, and both numbers are those of signals.
    ENDING.iter().any(|signal| unsafe { libc::sigismember(&raw const blocked, *signal) } == 1)
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
    match unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether the `status` of a thread in `/proc` has one of the signals blocked.
#[cfg(test)]
pub(crate) fn are_blocked_in(status: &str) -> bool {
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
    let blocked = u64::from_str_radix(blocked, 16).unwrap();
    ENDING.iter().any(|signal| blocked & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_another_thread_starts_has_none_blocked_and_the_thread_still_has() {
        let status = |unblocks: bool| {
            let mut command = Command::new("cat");
            command.arg("/proc/self/status");
            if unblocks {
                unblock_in(&mut command);
            }
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let thread = std::thread::spawn(move || {
            leave_to_main_thread();
            assert!(are_blocked_in(&status(false)), "a program inherits it");
            assert!(!are_blocked_in(&status(true)));
            let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(are_blocked_in(&own) && are_blocked());
        });
        thread.join().unwrap();
    }

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
