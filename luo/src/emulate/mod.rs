//! An emulated `/dev/liveupdate`: an unmodified program runs, and the built-in LUO answers its
//! requests on the device.
//!
//! The program and its descendants run under a seccomp filter that sends a few system calls to this
//! process, the supervisor (`filter`). The program may be statically linked, have threads and fork.
//! The emulator is not a sandbox: the kernel reads the arguments of a call that is let through
//! again, after the supervisor has checked them.
//!
//! ```text
//!  program --- openat, ioctl, reboot --> filter --> notify --> kernel --> builtin::Luo
//!     ^                                                          |
//!     +---- fd: a socket, whose other end (anchor) is <----------+
//!           hung up after the last close
//! ```
//!
//! A *generation* is one emulated kernel. It ends when the program ends. A switch to the next
//! generation happens when the program calls reboot(2) with the KEXEC command, or, with
//! [`Options::kexec`], when its first process exits with 0. At a switch all remaining processes of
//! the program are killed, and outgoing sessions are handed over. Without a state directory the
//! program is started again as the first process of the next kernel, and preserved memory stays in
//! place. With a state directory the run ends at the switch: preserved memory is written to a file
//! in the directory, and a later run with the same directory is the next kernel, with the next live
//! update number. A run that ends without a switch leaves the directory unchanged, and can be
//! repeated.
//!
//! Differences from Linux: the sizes of preserved files are checked at the switch instead of being
//! frozen; files keep their holes, names, modes and seals; the program's other threads run while
//! the state is written, so their writes may be handed over or not; if the state cannot be written,
//! reboot(2) fails with EAGAIN and the generation continues. `filter`, `anchor`, `memfd` and
//! [`crate::builtin`] list the other differences.

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

/// The environment variable with the number of live updates that led to this kernel. Linux logs the
/// number.
pub const NUMBER_VARIABLE: &str = "PERENNIAL_LIVEUPDATE_NUMBER";

/// How to run a program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The state directory: has the state of the previous generation, and receives that of the
    /// next.
    pub state: Option<PathBuf>,
    /// Whether to switch to the next kernel when the program's first process exits with 0.
    pub kexec: bool,
}

/// A failure to run the program, or to run it to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refuses a seccomp filter with a listener.
    #[error(
        "cannot supervise the program: a seccomp filter with a listener is not allowed here; run \
         outside of other emulators and sandboxes"
    )]
    Filter {
        /// The error of seccomp(2).
        source: io::Error,
    },
    /// The program's memory cannot be read.
    #[error(
        "cannot read the memory of the program: {errno}; allow this process to ptrace its children"
    )]
    Reach {
        /// The errno of process_vm_readv(2).
        errno: Errno,
    },
    /// The program could not be executed.
    #[error("cannot run {}", program.display())]
    Start {
        /// The path or name of the program.
        program: OsString,
        /// The error of fork(2) or execve(2).
        source: io::Error,
    },
    /// A system call of the supervisor failed.
    #[error("the emulator {what}: {errno}")]
    Supervise {
        /// The failed operation, as in "cannot wait for events".
        what: &'static str,
        /// The errno of the system call.
        errno: Errno,
    },
    /// The state directory cannot be used.
    #[error("cannot use the state of the previous kernel")]
    State(#[from] state::Error),
    /// The handover tree could be decoded, but the next kernel does not start with it.
    #[error("cannot start the next kernel")]
    Tree(#[from] Disabled),
    /// The program exited with 0, and its sessions could not be handed over.
    #[error("cannot switch to the next kernel: {}", why_switch(*errno))]
    Switch {
        /// The errno that reboot(2) would have returned.
        errno: Errno,
        /// The reason, if the state could not be written.
        source: Option<state::Error>,
    },
}

fn why_switch(errno: Errno) -> String {
    match errno {
        Errno::INVAL => "the size of a preserved file was changed; preserve the file again".into(),
        Errno::AGAIN => "its state cannot be written".into(),
        errno => errno.to_string(),
    }
}
