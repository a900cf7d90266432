//! What a system has to offer so that the table of conformance cases can be run against it.
//!
//! A [`System`] is a running kernel with a LUO, real or not: processes with fds and memory, files
//! that can be preserved, and a switch to the next kernel. The words are those of system calls, so
//! that a system of real processes and `/dev/liveupdate` fits as well as a simulated one. Cases only
//! use [`super::world`], which is built on this.

use luo::Errno;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Process(pub(crate) u32);

/// An fd of a process. It is a number: it may be closed already, or never have been open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fd {
    pub(crate) process: Process,
    pub(crate) number: i32,
}

/// An fd on its way from one process to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Letter(pub(crate) usize);

/// Where the argument of a request is. All of it is just in front of memory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In memory that can be read and written.
    Writable,
    /// The same, at an odd address: one byte further from the end.
    Unaligned,
    /// In memory that can only be read.
    ReadOnly,
    /// Nowhere: the address is NULL.
    Null,
    /// Only so many of its bytes are there.
    CutAfter(usize),
}

/// The argument of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Argument {
    pub(crate) bytes: Vec<u8>,
    pub(crate) place: Place,
}

/// What a system does otherwise on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deviation {
    /// A retrieved session whose answer cannot be written can be retrieved again.
    SessionIsReturned,
}

/// A file handler that does as it is told; see [`luo::builtin::scripted`].
pub(crate) use luo::builtin::scripted::{Callback, Script};

/// A kernel with a LUO, and processes on it.
pub(crate) trait System {
    /// Whether it does otherwise in some respect.
    fn deviates(&self, deviation: Deviation) -> bool;

    /// A process without fds.
    fn spawn(&mut self) -> Process;

    /// A process with the same fds.
    fn fork(&mut self, process: Process) -> Process;

    /// Ends a process, as SIGKILL does.
    fn kill(&mut self, process: Process);

    /// Lets a process have no more fds than it has now; or as many as it wants again.
    fn limit_fds(&mut self, process: Process, limited: bool);

    /// Opens the device, for reading only or for both.
    fn open_device(&mut self, process: Process, read_only: bool) -> Result<Fd, Errno>;

    /// A memfd that holds `contents`, with its position at the start.
    fn memfd(&mut self, process: Process, contents: &[u8]) -> Result<Fd, Errno>;

    /// Opens the file behind an fd once more.
    fn reopen(&mut self, fd: Fd) -> Result<Fd, Errno>;

    /// Opens the file behind an fd with O_PATH.
    fn reopen_as_path(&mut self, fd: Fd) -> Result<Fd, Errno>;

    /// Something that cannot be preserved, such as `/dev/null`.
    fn unsupported(&mut self, process: Process) -> Result<Fd, Errno>;

    /// A file that fails as the script says, of an object. `None`: there are no such files here.
    fn scripted(&mut self, process: Process, object: u32) -> Option<Fd>;

    /// The script of such files.
    fn script(&self) -> Option<Script>;

    /// Copies an fd.
    fn dup(&mut self, fd: Fd) -> Result<Fd, Errno>;

    /// Closes an fd.
    fn close(&mut self, fd: Fd) -> Result<(), Errno>;

    /// Sends a copy of an fd away.
    fn send(&mut self, fd: Fd) -> Result<Letter, Errno>;

    /// Receives what was sent; `None` loses it.
    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd>;

    /// Makes a request. What the kernel writes to memory is in the argument afterwards.
    fn ioctl(&mut self, fd: Fd, command: u32, argument: &mut Argument) -> Result<(), Errno>;

    /// Whether an fd has FD_CLOEXEC.
    fn closes_on_exec(&self, fd: Fd) -> Result<bool, Errno>;

    /// Whether two fds are of one open file.
    fn is_same_open_file(&self, one: Fd, other: Fd) -> Result<bool, Errno>;

    /// Reads up to `length` bytes from the position on, and moves it.
    fn read(&mut self, fd: Fd, length: usize) -> Result<Vec<u8>, Errno>;

    /// Writes within the size of the file, from `offset` on.
    fn write_at(&mut self, fd: Fd, offset: usize, bytes: &[u8]) -> Result<(), Errno>;

    /// Switches to the next kernel. No process and no fd is left. A failure leaves all as it was.
    fn switch(&mut self) -> Result<(), Errno>;

    /// How many live updates led to this kernel.
    fn liveupdate_number(&self) -> u64;
}
