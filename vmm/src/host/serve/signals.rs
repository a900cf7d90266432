//! The signals that the host's main loop waits for, each kind as a pipe that becomes readable.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{
    SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGUSR1, SIGUSR2, SIGVTALRM,
    SIGXCPU, SIGXFSZ,
};

/// The signals by what they mean.
pub(super) struct Signals {
    /// A child has ended.
    pub(super) children: Pipe,
    /// The host is to end.
    pub(super) end: Pipe,
    /// Signals that do nothing here.
    pub(super) ignored: Pipe,
}

impl Signals {
    /// Installs the signal handlers. To be called before the first child is started.
    /// `end` are the signals that end the host. No other signal does, except those that nobody can catch.
    pub(super) fn catch(end: &[i32]) -> io::Result<Self> {
        // By default each of them ends the process, and with it all VMs.
        let named = [
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
        let ignored = named.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        let ignored: Vec<i32> = ignored.filter(|signal| !end.contains(signal)).collect();
        Ok(Self {
            children: Pipe::of(&[SIGCHLD])?,
            end: Pipe::of(end)?,
            ignored: Pipe::of(&ignored)?,
        })
    }
}

/// A pipe that has bytes when one of its signals has come.
pub(super) struct Pipe(UnixStream);

impl Pipe {
    fn of(signals: &[i32]) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        for signal in signals {
            signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
        }
        Ok(Self(read))
    }

    /// Takes note of the signals that have come.
    pub(super) fn drain(&self) {
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// The end to wait for.
impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
