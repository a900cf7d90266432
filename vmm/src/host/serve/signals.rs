//! The signals that the host's main loop waits for. All of them together take two files, because a host to which VMs are
//! handed over ends with them if it cannot catch its signals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{
    SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGUSR1, SIGUSR2, SIGVTALRM,
    SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Meaning {
    /// A child has ended.
    Child,
    /// The host is to end.
    End,
    /// The signal does nothing here.
    Ignored,
}

/// The signals, and a socket that is readable when one of them has come.
pub(super) struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    end: Vec<i32>,
}

impl Signals {
    /// Installs the signal handlers. To be called before the first child is started.
    /// `end` are the signals that end the host. No other signal does, except those that nobody can catch.
    pub(super) fn catch(end: &[i32]) -> io::Result<Self> {
        // By default each of them but SIGCHLD ends the process, and with it all VMs.
        let named = [
            SIGCHLD,
            SIGHUP,
            SIGINT,
            SIGQUIT,
            SIGUSR1,
            SIGUSR2,
            SIGALRM,
            SIGVTALRM,
            SIGPROF,
            SIGIO,
            SIGXCPU,
            SIGXFSZ,
            libc::SIGPWR,
            libc::SIGSTKFLT,
        ];
        let all = named.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        let all = all.chain(end.iter().copied());
        let (read, write) = UnixStream::pair()?;
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, all)?;
        Ok(Self { delivery, end: end.to_vec() })
    }

    /// Returns what the signals mean that have come since the last time, each meaning once.
    pub(super) fn take(&mut self) -> Vec<Meaning> {
        let meaning = |signal| match signal {
            SIGCHLD => Meaning::Child,
            signal if self.end.contains(&signal) => Meaning::End,
            _ => Meaning::Ignored,
        };
        let mut all: Vec<_> = self.delivery.pending().map(meaning).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// The end to wait for.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}
