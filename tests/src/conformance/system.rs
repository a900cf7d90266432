//! What a system has to offer so that the table of conformance cases can be run against it.
//!
//! A [`System`] is a running kernel with a LUO, real or not: processes with fds and memory, files
//! that can be preserved, and a switch to the next kernel. What a process does by itself is a
//! [`Call`], which can be sent to a process that is elsewhere. Cases only use [`super::world`], which
//! is built on this.

use luo::Errno;
use serde::{Deserialize, Serialize};

use super::file::{FileCall, What};
use super::profile::Profile;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Process(pub(crate) u32);

/// An fd of a process. It is a number: it may be closed already, or never have been open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fd {
    pub(crate) process: Process,
    pub(crate) number: i32,
}

/// An fd on its way from one process to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Letter(pub(crate) usize);

/// Where the argument of a request is. All of it is just in front of memory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Argument {
    pub(crate) bytes: Vec<u8>,
    pub(crate) place: Place,
}

impl Argument {
    /// What a request comes to. EUCLEAN: it was refused, and changed its argument all the same.
    pub(crate) fn answer(self, result: Result<(), Errno>, sent: &[u8]) -> Result<Answer, Errno> {
        match result {
            Err(_) if self.bytes != sent => Err(Errno::UCLEAN),
            result => result.map(|()| Answer::bytes(self.bytes)),
        }
    }
}

/// How the file behind an fd is opened once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reopen {
    ReadWrite,
    ReadOnly,
    /// With O_PATH.
    Path,
}

/// What a process can do. Fds are numbers of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    /// Has no more fds than now; or as many as it wants again.
    LimitFds(bool),
    /// Opens the device, for reading only or for both.
    OpenDevice { read_only: bool },
    /// Opens a new file.
    Open(What),
    /// Opens a file that fails as the script says, of an object.
    OpenScripted(u32),
    /// Opens the file behind an fd once more.
    Reopen(i32, Reopen),
    /// Copies an fd.
    Dup(i32),
    /// Closes an fd.
    Close(i32),
    /// Makes a request. The answer has what is in its memory afterwards.
    Ioctl(i32, u32, Argument),
    /// Makes a request as a 32-bit program does.
    Ioctl32(i32, u32, Vec<u8>),
    /// Enters a memory cgroup of its own.
    EnterCgroup,
    /// How many bytes are charged to it.
    ChargedBytes,
    /// Whether an fd has FD_CLOEXEC.
    ClosesOnExec(i32),
    /// Whether two fds are of one open file.
    IsSameOpenFile(i32, i32),
    /// Does something with an open file.
    File(i32, FileCall),
    /// Does all of it at the same time, each in a thread of its own.
    Together(Vec<Call>),
    /// Opens the device and closes it again, so often, and tells how often it was not busy.
    OpenAndClose(u32),
    /// Begins something that goes on while the process does other things.
    Begin(Box<Call>),
    /// How much of what was begun still goes on.
    Running,
    /// Runs its program once more in its place.
    Exec,
    /// Goes on as another user.
    BecomeUser(u32),
    /// Mode and owner of what is at a path.
    Stat(String),
    /// Loads the next kernel.
    Load(Load),
    /// Asks for the switch, where it is to be refused.
    Reboot(Who),
}

/// How the next kernel is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Load {
    /// As for any switch.
    Next,
    /// With an initramfs that no scratch area has room for.
    TooLarge,
    /// Not at all: what is loaded is unloaded.
    Nothing,
}

/// Who asks for a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Who {
    Root,
    /// A user without CAP_SYS_BOOT.
    Nobody,
    /// Root in a pid namespace of its own.
    OtherNamespace,
}

/// What comes of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// An fd, or what else is a number.
    pub(crate) number: i64,
    pub(crate) bytes: Vec<u8>,
    /// Of calls that were made together, each one's: an errno or its answer.
    pub(crate) each: Vec<Result<Answer, i32>>,
}

impl Answer {
    pub(crate) fn number(number: impl Into<i64>) -> Self {
        Self { number: number.into(), ..Self::default() }
    }

    pub(crate) fn bytes(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::default() }
    }

    pub(crate) fn each(answers: Vec<Result<Self, Errno>>) -> Self {
        let each = answers.into_iter().map(|answer| answer.map_err(Errno::raw_os_error)).collect();
        Self { each, ..Self::default() }
    }
}

/// What the next kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Next {
    /// One that finds what was handed over.
    Kernel,
    /// One that was told to have no LUO.
    WithoutLuo,
    /// The first one: the machine is reset instead of updated.
    Reset,
}

/// What a switch comes to whose next kernel did not start.
pub(crate) const NEXT_KERNEL_DIED: Errno = Errno::HOSTDOWN;

/// A callback of files that do as they are told; see [`luo::builtin::scripted`].
pub(crate) use luo::builtin::scripted::{Callback, Script};

/// What is said to the script of such files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Direction {
    /// A callback fails for an object from now on.
    Fail(#[serde(with = "by_place")] Callback, u32, i32),
    /// It succeeds again.
    Mend(#[serde(with = "by_place")] Callback, u32),
    /// What was called since the last time?
    Tell,
}

impl Direction {
    /// Gives it to the script.
    pub(crate) fn give(self, script: &Script) -> Vec<Called> {
        match self {
            Self::Fail(callback, object, errno) => {
                script.fail(callback, object, Errno::from_raw_os_error(errno));
                Vec::new()
            }
            Self::Mend(callback, object) => {
                script.mend(callback, object);
                Vec::new()
            }
            Self::Tell => {
                let calls = script.take_calls().into_iter();
                calls.map(|call| (call.callback, call.object)).collect()
            }
        }
    }
}

/// What was called, and for which object.
pub(crate) type Called = (Callback, u32);

/// A kernel with a LUO, and processes on it.
pub(crate) trait System {
    /// What it lacks, and does otherwise.
    fn profile(&self) -> &'static Profile;

    /// A process without fds.
    fn spawn(&mut self) -> Process;

    /// A process with the same fds.
    fn fork(&mut self, process: Process) -> Process;

    /// Ends a process, as SIGKILL does.
    fn kill(&mut self, process: Process);

    /// Sends a copy of an fd away.
    fn send(&mut self, fd: Fd) -> Result<Letter, Errno>;

    /// Receives what was sent; `None` loses it.
    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd>;

    /// Has a process do something.
    fn call(&mut self, process: Process, call: Call) -> Result<Answer, Errno>;

    /// Directs the files that do as they are told.
    fn direct(&mut self, direction: Direction) -> Result<Vec<Called>, Errno>;

    /// Switches to the next kernel. No process and no fd is left. A failure leaves all as it was.
    fn switch(&mut self, next: Next) -> Result<(), Errno>;

    /// How many live updates led to this kernel.
    fn liveupdate_number(&self) -> u64;

    /// With which words the last kernel died that did.
    fn last_words(&self) -> Option<String> {
        None
    }

    /// Changes what every page of the machine's memory has at an offset from `old` to `new`, which are
    /// of one length, and tells how many had it.
    fn change_memory(&mut self, _offset: usize, _old: &[u8], _new: &[u8]) -> Result<usize, Errno> {
        Err(Errno::OPNOTSUPP)
    }
}

/// Callbacks as numbers: their places in a list.
pub(crate) mod by_place {
    use luo::builtin::scripted::Callback;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Those that cases are about.
    const ALL: [Callback; 6] = [
        Callback::Freeze,
        Callback::Unfreeze,
        Callback::Retrieve,
        Callback::CanFinish,
        Callback::Finish,
        Callback::Preserve,
    ];

    pub(crate) fn place(callback: Callback) -> Option<usize> {
        ALL.iter().position(|known| *known == callback)
    }

    pub(crate) fn callback(place: usize) -> Option<Callback> {
        ALL.get(place).copied()
    }

    pub(crate) fn serialize<S: Serializer>(callback: &Callback, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(place(*callback).map_or(u64::MAX, |place| place as u64))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Callback, D::Error> {
        callback(usize::deserialize(from)?).ok_or_else(|| D::Error::custom("no such callback"))
    }
}
