//! The interface that a system must provide for the conformance cases.
//!
//! A [`System`] is a running kernel with a LUO, real or simulated: processes with fds and memory, files
//! that can be preserved, and a switch to the next kernel. An action of one process is a [`Call`], plain
//! data that can be sent to a process elsewhere. Cases use only [`super::world`], which is built on
//! this.

use luo::Errno;
use serde::{Deserialize, Serialize};

use super::file::{FileCall, What};
use super::profile::Profile;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Process(pub(crate) u32);

/// The number of an fd of a process. The fd need not be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fd {
    pub(crate) process: Process,
    pub(crate) number: i32,
}

/// An fd on its way from one process to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Letter(pub(crate) usize);

/// Where the argument of a request is. The argument ends at an inaccessible page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// In memory that can be read and written.
    Writable,
    /// In writable memory, one byte further from the end, so that its address is odd.
    Unaligned,
    /// In memory that can only be read.
    ReadOnly,
    /// At no address: the pointer is NULL.
    Null,
    /// Only so many of its bytes are accessible.
    CutAfter(usize),
}

/// The argument of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Argument {
    pub(crate) bytes: Vec<u8>,
    pub(crate) place: Place,
}

impl Argument {
    /// The answer to a request. EUCLEAN if the request failed and still changed its argument.
    pub(crate) fn answer(self, result: Result<(), Errno>, sent: &[u8]) -> Result<Answer, Errno> {
        match result {
            Err(_) if self.bytes != sent => Err(Errno::UCLEAN),
            result => result.map(|()| Answer::bytes(self.bytes)),
        }
    }
}

/// How the file behind an fd is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reopen {
    ReadWrite,
    ReadOnly,
    /// With O_PATH.
    Path,
}

/// An action of a process. Fds are the process's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    /// Forbids further fds (`true`), or allows them again (`false`).
    LimitFds(bool),
    /// Opens the device, for reading only or for both.
    OpenDevice { read_only: bool },
    /// Opens a new file.
    Open(What),
    /// Opens a scripted file with an object number.
    OpenScripted(u32),
    /// Opens the file behind an fd again.
    Reopen(i32, Reopen),
    /// Copies an fd.
    Dup(i32),
    /// Closes an fd.
    Close(i32),
    /// Makes a request. The answer is the contents of its argument afterwards.
    Ioctl(i32, u32, Argument),
    /// Makes a request as a 32-bit program does.
    Ioctl32(i32, u32, Vec<u8>),
    /// Creates a memory cgroup and enters it.
    EnterCgroup,
    /// Number of bytes that are charged to this cgroup.
    ChargedBytes,
    /// Whether an fd has FD_CLOEXEC.
    ClosesOnExec(i32),
    /// Whether two fds refer to the same open file.
    IsSameOpenFile(i32, i32),
    /// Performs an operation on an open file.
    File(i32, FileCall),
    /// Makes all these calls at the same time, each in a separate thread.
    Together(Vec<Call>),
    /// Opens and closes the device so many times. The answer is how often it was not busy.
    OpenAndClose(u32),
    /// Begins a call in the background.
    Begin(Box<Call>),
    /// Number of background calls that still run.
    Running,
    /// Replaces the process's program by the same program (exec).
    Exec,
    /// Changes the process's user.
    BecomeUser(u32),
    /// Mode and owner of the file at a path.
    Stat(String),
    /// Loads the next kernel.
    Load(Load),
    /// Requests the switch by reboot(2), in cases that expect a refusal.
    Reboot(Who),
}

/// How the next kernel is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Load {
    /// As for a normal switch.
    Next,
    /// With an initramfs that is larger than the scratch area.
    TooLarge,
    /// Loads a kernel and unloads it again, so that none is loaded.
    Nothing,
}

/// Who requests a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Who {
    Root,
    /// A user without CAP_SYS_BOOT.
    Nobody,
    /// Root in another pid namespace than the first.
    OtherNamespace,
}

/// The result of a call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// A result that is a number, for example an fd.
    pub(crate) number: i64,
    pub(crate) bytes: Vec<u8>,
    /// For calls that were made together: the answer or the errno of each.
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

/// The kernel to which a switch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Next {
    /// A kernel with LUO, which finds the handover.
    Kernel,
    /// A kernel with `liveupdate=off`.
    WithoutLuo,
    /// The first kernel: the machine is reset instead of updated.
    Reset,
}

/// The errno of a switch whose next kernel panicked.
pub(crate) const NEXT_KERNEL_DIED: Errno = Errno::HOSTDOWN;

/// Scripted files and their callbacks; see [`luo::builtin::scripted`].
pub(crate) use luo::builtin::scripted::{Callback, Script};

/// An instruction to the script of these files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Direction {
    /// A callback fails for an object from now on.
    Fail(#[serde(with = "by_place")] Callback, u32, i32),
    /// The callback succeeds again for an object.
    Mend(#[serde(with = "by_place")] Callback, u32),
    /// Returns the callbacks since the last `Tell`.
    Tell,
}

impl Direction {
    /// Applies it to the script.
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

/// A callback that was called, and the object for which it was.
pub(crate) type Called = (Callback, u32);

/// A kernel with a LUO, and processes on it.
pub(crate) trait System {
    /// What the system lacks, and where it deviates.
    fn profile(&self) -> &'static Profile;

    /// Starts a process without fds.
    fn spawn(&mut self) -> Process;

    /// Starts a process with copies of another's fds.
    fn fork(&mut self, process: Process) -> Process;

    /// Ends a process, as SIGKILL does.
    fn kill(&mut self, process: Process);

    /// Sends a copy of an fd.
    fn send(&mut self, fd: Fd) -> Result<Letter, Errno>;

    /// Receives a sent fd in a process. Without a process the fd is closed.
    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd>;

    /// Makes a call in a process.
    fn call(&mut self, process: Process, call: Call) -> Result<Answer, Errno>;

    /// Gives an instruction to the script of the scripted files.
    fn direct(&mut self, direction: Direction) -> Result<Vec<Called>, Errno>;

    /// Switches to the next kernel, after which no process and no fd is left. A failure changes nothing.
    fn switch(&mut self, next: Next) -> Result<(), Errno>;

    /// Number of live updates that led to this kernel.
    fn liveupdate_number(&self) -> u64;

    /// The last panic message of a kernel, if one panicked.
    fn last_words(&self) -> Option<String> {
        None
    }

    /// Replaces `old` by `new` (of equal length) at an offset of every page of the machine's memory that
    /// has `old` there. Returns the number of pages.
    fn change_memory(&mut self, _offset: usize, _old: &[u8], _new: &[u8]) -> Result<usize, Errno> {
        Err(Errno::OPNOTSUPP)
    }
}

/// Serializes callbacks as their indexes in a list.
pub(crate) mod by_place {
    use luo::builtin::scripted::Callback;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// The callbacks that cases use.
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
