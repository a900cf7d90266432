//! The program and all that comes of it: start, signals, end.
//!
//! This process becomes the reaper of all descendants, so that none gets away when a generation
//! ends. Signals are taken from an fd, between notifications; those that were sent to this process
//! by another go on to the program. Those of the terminal do not: it gets them itself.
#![expect(unsafe_code, reason = "signal masks, and what is done between fork and exec")]

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

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its path, or its name in `PATH`.
    pub path: OsString,
    /// Its arguments, without its own name.
    pub arguments: Vec<OsString>,
}

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With a status.
    Status(i32),
    /// By a signal.
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

/// Signals that are passed on.
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

/// As many fds as Linux lets root have unless told otherwise (`fs.nr_open`).
const MANY_FDS: u64 = 1 << 20;

/// What this process was like before, which the program is to find.
#[derive(Debug)]
pub(super) struct Surroundings {
    signals: OwnedFd,
    mask: sigset_t,
    fds: Rlimit,
}

impl Surroundings {
    /// Blocks the signals that are taken from the fd, takes in orphans, and allows as many fds as
    /// can be: each session and each preserved file takes one.
    pub(super) fn enter() -> Result<Self, Errno> {
        set_child_subreaper(Some(rustix::process::getpid()))?;
        let fds = getrlimit(Resource::Nofile);
        let many = Rlimit { current: Some(MANY_FDS), maximum: Some(MANY_FDS) };
        // Only root may have more than was allowed.
        if setrlimit(Resource::Nofile, many).is_err() {
            setrlimit(Resource::Nofile, Rlimit { current: fds.maximum, ..fds })?;
        }
        let set = signal_set(FORWARDED.into_iter().chain([libc::SIGCHLD]));
        let mask = set_mask(libc::SIG_BLOCK, &set)?;
        Ok(Self { signals: signalfd(&set)?, mask, fds })
    }

    /// Takes the signals that came, and passes on to the program what is meant for it. That a child
    /// has ended is seen by [`reap`].
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

    /// Starts the program under the filter.
    pub(super) fn start(
        &self,
        program: &Program,
        environment: &[(&str, String)],
    ) -> Result<(Pid, Listener), Error> {
        let pair =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.map_err(|errno| Error::Supervise { what: "a socket", errno })?;
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
        // SAFETY: what runs between fork and exec makes system calls only: it allocates nothing and
        // takes no lock. It owns all that it uses.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn();
        drop(command);
        let listener = receive_fd(ours.as_fd());
        match (child, listener) {
            (Ok(child), Some(listener)) => {
                let pid = Pid::from_child(&child);
                Ok((pid, Listener::new(listener)))
            }
            // It came as far as exec.
            (Err(source), Some(_)) => Err(Error::Start { program: program.path.clone(), source }),
            (Err(source), None) => Err(Error::Filter { source }),
            (Ok(_), None) => {
                Err(Error::Filter { source: io::Error::other("it did not arrive here") })
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
        // Neither has failed with these values before.
        let _ = set_mask(libc::SIG_SETMASK, &self.mask);
        let _ = setrlimit(Resource::Nofile, self.fds);
    }
}

fn forward(bytes: &[u8; size_of::<signalfd_siginfo>()], first: Pid) {
    // SAFETY: signalfd writes whole signalfd_siginfo, which are plain numbers of any value.
    let info: signalfd_siginfo = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
    let number = info.ssi_signo as c_int;
    let from_a_process = info.ssi_code <= 0;
    if number == libc::SIGCHLD || !from_a_process {
        return;
    }
    if let Some(signal) = Signal::from_named_raw(number) {
        // It may have ended: then there is nobody to tell.
        let _ = kill_process(first, signal);
    }
}

fn signal_set(signals: impl Iterator<Item = c_int>) -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was just initialized.
    let mut set: sigset_t = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is initialized, and every number above is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Changes the mask of this thread and returns the one before.
fn set_mask(how: c_int, set: &sigset_t) -> Result<sigset_t, Errno> {
    let mut before = signal_set([].into_iter());
    // SAFETY: both sets are initialized; one is read and the other written.
    let error = unsafe { libc::pthread_sigmask(how, set, &raw mut before) };
    if error == 0 { Ok(before) } else { Err(Errno::from_raw_os_error(error)) }
}

/// An fd that tells of signals instead of their handlers.
fn signalfd(set: &sigset_t) -> Result<OwnedFd, Errno> {
    // SAFETY: -1 asks for a new fd; the set is only read.
    let fd = unsafe { libc::signalfd(-1, set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: the fd was just made, and nobody else knows it.
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

/// Buries the dead; says how `first` ended, if it did.
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

/// Ends all that is left of the program, and waits until it is gone. Who loses its parent becomes
/// a child of this process, so that killing children reaches everybody in the end.
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

/// The children of this process, those of others that it took in among them.
fn children() -> Vec<Pid> {
    let me = rustix::process::getpid();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let pids = numbers.filter_map(Pid::from_raw);
    pids.filter(|pid| parent(*pid) == Some(me)).collect()
}

fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // pid (name) state parent: the name may have anything in it.
    let (_, rest) = stat.rsplit_once(')')?;
    Pid::from_raw(rest.split_whitespace().nth(1)?.parse().ok()?)
}
