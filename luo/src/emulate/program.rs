//! The processes of the program: their start, signals and end.
//!
//! The supervisor becomes the reaper of all descendants, so every process can be killed when a
//! generation ends. The supervisor reads signals from an fd, between notifications. Signals that
//! another process sent are forwarded to the program; signals of the terminal are not, because the
//! program gets them itself.
#![expect(unsafe_code, reason = "signal masks, and code between fork and exec")]

use std::ffi::OsString;
use std::fs;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, signalfd_siginfo, sigset_t};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process,
    set_child_subreaper, setrlimit, wait,
};

use super::Error;
use super::notify::{self, Listener};

/// The program to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The path of the program, or its name in `PATH`.
    pub path: OsString,
    /// The arguments, without the program's name.
    pub arguments: Vec<OsString>,
}

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The program exited with this status.
    Status(i32),
    /// This signal killed the program.
    Signal(i32),
}

impl From<WaitStatus> for Exit {
    fn from(status: WaitStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(status), _) => Self::Status(status),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

/// Signals that are forwarded to the program.
const FORWARDED: [c_int; 9] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGWINCH,
    libc::SIGCONT,
];

/// The default of `fs.nr_open`, Linux' upper bound for the limit on fds.
const MANY_FDS: u64 = 1 << 20;

/// The supervisor's signal fd, and its former signal mask and limit on fds, which the program gets.
#[derive(Debug)]
pub(super) struct Surroundings {
    /// The signalfd.
    signals: OwnedFd,
    /// The former signal mask.
    mask: sigset_t,
    /// The former limit on fds.
    fds: Rlimit,
}

impl Surroundings {
    /// Makes this process a reaper, blocks the signals that it reads from the signalfd, and raises
    /// the limit on fds, because each session and each preserved file needs one. Dropping the value
    /// restores the signal mask and the limit.
    pub(super) fn enter() -> Result<Self, Errno> {
        set_child_subreaper(Some(rustix::process::getpid()))?;
        let fds = getrlimit(Resource::Nofile);
        let many = Rlimit { current: Some(MANY_FDS), maximum: Some(MANY_FDS) };
        // Only root may raise the maximum; otherwise the maximum is the new limit.
        if setrlimit(Resource::Nofile, many).is_err() {
            setrlimit(Resource::Nofile, Rlimit { current: fds.maximum, ..fds })?;
        }
        let set = signal_set(FORWARDED.into_iter().chain([libc::SIGCHLD]));
        let mask = set_mask(libc::SIG_BLOCK, &set)?;
        Ok(Self { signals: signalfd(&set)?, mask, fds })
    }

    /// Reads all pending signals and forwards those for the program. For SIGCHLD nothing is done:
    /// [`reap`] finds children that have ended.
    pub(super) fn take_signals(&self, first: Pid) -> Result<(), Errno> {
        let mut bytes = [0; size_of::<signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.signals, &mut bytes) {
                Ok(length) if length == bytes.len() => forward(&bytes, first),
                Err(Errno::INTR) => {}
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Starts the program under the filter, and returns its PID and the listener.
    pub(super) fn start(
        &self,
        program: &Program,
        environment: &[(&str, String)],
    ) -> Result<(Pid, Listener), Error> {
        let pair =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) =
            pair.map_err(|errno| Error::Supervise { what: "cannot create a socket pair", errno })?;
        let (filter, mask, fds) = (super::filter::program(), self.mask, self.fds);
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).envs(environment.iter().map(|(k, v)| (k, v)));
        let prepare = move || {
            set_mask(libc::SIG_SETMASK, &mask)?;
            setrlimit(Resource::Nofile, fds)?;
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            let listener = notify::install(&filter)?;
            send_fd(theirs.as_fd(), listener.as_fd())?;
            Ok(())
        };
        // SAFETY: between fork and exec, `prepare` only makes system calls: it allocates nothing
        // and takes no lock. It owns all values that it uses.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn();
        drop(command);
        let listener = receive_fd(ours.as_fd());
        match (child, listener) {
            (Ok(child), Some(listener)) => {
                let pid = Pid::from_child(&child);
                Ok((pid, Listener::new(listener)))
            }
            // The listener arrived, so exec failed.
            (Err(source), Some(_)) => Err(Error::Start { program: program.path.clone(), source }),
            (Err(source), None) => Err(Error::Filter { source }),
            (Ok(_), None) => {
                Err(Error::Filter { source: io::Error::other("the listener did not arrive") })
            }
        }
    }
}

impl AsFd for Surroundings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

impl Drop for Surroundings {
    fn drop(&mut self) {
        // Both values were in force before, so neither call fails.
        let _ = set_mask(libc::SIG_SETMASK, &self.mask);
        let _ = setrlimit(Resource::Nofile, self.fds);
    }
}

/// Sends the signal to the program if another process sent it to the supervisor.
fn forward(bytes: &[u8; size_of::<signalfd_siginfo>()], first: Pid) {
    // SAFETY: signalfd writes whole signalfd_siginfo, which are plain numbers of any value.
    let info: signalfd_siginfo = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
    let number = info.ssi_signo as c_int;
    let from_a_process = info.ssi_code <= 0;
    if number == libc::SIGCHLD || !from_a_process {
        return;
    }
    if let Some(signal) = Signal::from_named_raw(number) {
        // Fails if the program has ended; then the signal is not needed.
        let _ = kill_process(first, signal);
    }
}

fn signal_set(signals: impl Iterator<Item = c_int>) -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: `sigemptyset` has initialized the set.
    let mut set: sigset_t = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is initialized, and every number above is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Changes the signal mask of this thread and returns the former mask.
fn set_mask(how: c_int, set: &sigset_t) -> Result<sigset_t, Errno> {
    let mut before = signal_set([].into_iter());
    // SAFETY: both sets are initialized; one is read and the other written.
    let error = unsafe { libc::pthread_sigmask(how, set, &raw mut before) };
    if error == 0 { Ok(before) } else { Err(Errno::from_raw_os_error(error)) }
}

/// Creates a non-blocking fd from which these signals are read.
fn signalfd(set: &sigset_t) -> Result<OwnedFd, Errno> {
    // SAFETY: -1 asks for a new fd; the set is only read.
    let fd = unsafe { libc::signalfd(-1, set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: the fd is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send_fd(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    message.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(socket, &[io::IoSlice::new(b"l")], &mut message, SendFlags::empty()).map(drop)
}

fn receive_fd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut into = [io::IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut into, &mut message, RecvFlags::CMSG_CLOEXEC).ok()?;
    message.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

/// Waits for all children that have ended. Returns how `first` ended, if it is one of them.
pub(super) fn reap(first: Pid) -> Result<Option<Exit>, Errno> {
    let mut exit = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == first => exit = Some(status.into()),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(Errno::CHILD) => return Ok(exit),
            Err(errno) => return Err(errno),
        }
    }
}

/// Kills all processes of the program and waits for their end. A process whose parent dies becomes
/// a child of this process, so killing children until none is left reaches every process.
pub(super) fn end_all() -> Result<(), Errno> {
    loop {
        for child in children() {
            match kill_process(child, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(errno),
            }
        }
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}

/// Returns the children of this process, adopted orphans included.
fn children() -> Vec<Pid> {
    let me = rustix::process::getpid();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let pids = numbers.filter_map(Pid::from_raw);
    pids.filter(|pid| parent(*pid) == Some(me)).collect()
}

fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The format is `pid (name) state parent`. The name may contain any character, also `)`.
    let (_, rest) = stat.rsplit_once(')')?;
    Pid::from_raw(rest.split_whitespace().nth(1)?.parse().ok()?)
}
