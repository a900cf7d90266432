//! `/dev/liveupdate` for everyone: a program runs as it is, and what it asks of the device is
//! answered by the built-in LUO.
//!
//! The program and its descendants run under a seccomp filter that sends a few system calls here
//! (`filter`); they can be static, have threads and fork. It is a convenience, not a sandbox: what
//! is let through is looked up by the kernel a second time, after this has looked.
//!
//! ```text
//!  program --- openat, ioctl, reboot --> filter --> notify --> kernel --> builtin::Luo
//!     ^                                                          |
//!     +---- fd: a socket, whose other end (anchor) tells <-------+
//!           when its last reference is gone
//! ```
//!
//! A *generation* is one kernel. It ends with the program, or when the program calls reboot(2) for
//! the next kernel, or, if so wanted, when the program's first process ends with 0. Then whoever
//! is left of it is killed, and outgoing sessions cross. Without a state directory the program is
//! started again, as that kernel's first process, and preserved memory stays where it is. With one
//! the run ends there: memory is written to a file in the directory, and a later run with the same
//! directory is the next kernel, with the number plus one. A run that ends in any other way leaves the
//! directory as it was, and can be repeated.
//!
//! Not as on Linux: sizes of preserved files are checked at the switch instead of being frozen; files
//! keep their holes, names, modes and seals; while a switch is written the program's other threads
//! run, and what they write then may cross or not; after a failed write reboot(2) says EAGAIN, and all
//! goes on. What else differs is said in `filter`, `anchor`, `memfd` and [`crate::builtin`].

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::builtin::Disabled;

mod anchor;
mod filter;
mod kernel;
mod memfd;
mod node;
mod notify;
mod path;
mod program;
mod request;
mod run;
pub mod state;
mod tracee;

pub use program::{Exit, Program};
pub use run::run;

/// The variable in which the program finds how many live updates led to its kernel; Linux says it in
/// its log.
pub const NUMBER_VARIABLE: &str = "PERENNIAL_LIVEUPDATE_NUMBER";

/// How to run a program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Where the previous generation is, and the next one goes.
    pub state: Option<PathBuf>,
    /// Whether the next kernel comes when the program ends with 0.
    pub kexec: bool,
}

/// Why a program cannot be run, or not to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel does not allow a filter with a listener.
    #[error(
        "cannot supervise the program: this system, or who started this, does not allow a seccomp \
         filter with a listener here"
    )]
    Filter {
        /// What seccomp said.
        source: io::Error,
    },
    /// Its memory cannot be read.
    #[error("cannot supervise the program: its memory cannot be read (ptrace rights): {errno}")]
    Reach {
        /// What the kernel said.
        errno: Errno,
    },
    /// There is no such program.
    #[error("cannot run {}", program.display())]
    Start {
        /// Its path or name.
        program: OsString,
        /// Why.
        source: io::Error,
    },
    /// The supervisor itself fails.
    #[error("cannot supervise the program: {what}: {errno}")]
    Supervise {
        /// What it needs.
        what: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// The directory's state cannot be used.
    #[error("cannot use the state of the previous kernel")]
    State(#[from] state::Error),
    /// A tree that was read before, but does not start a kernel.
    #[error("cannot start the next kernel")]
    Tree(#[from] Disabled),
    /// The program ended, and its sessions cannot be handed over.
    #[error("cannot switch to the next kernel: {}", why_switch(*errno))]
    Switch {
        /// What reboot(2) would have said.
        errno: Errno,
        /// Why the state was not written, if that was it.
        source: Option<state::Error>,
    },
}

fn why_switch(errno: Errno) -> String {
    match errno {
        Errno::INVAL => "a preserved file has another size than when it was preserved".into(),
        Errno::AGAIN => "its state cannot be written".into(),
        errno => errno.to_string(),
    }
}
