//! The process of one VM, for the host: starts it, sends it requests, and ends it.

#![expect(unsafe_code, reason = "rustix counts unshare as unsafe")]

use std::cell::OnceCell;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use rustix::time::Timespec;

use super::confinement::{Confinement, User};
use super::conversation::{Conversation, ProcessError, unexpected};
use crate::link::{Channel, Reply, Request, Role};

/// How long a VM's process may take to answer, before it counts as hung. Long enough for hosts whose
/// CPUs are emulated.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long the host waits for a killed process to end. Only a process that is stuck in the kernel, for
/// example on a disk that does not answer, takes longer.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The name and the argument of a VM's process.
const NAME: &str = "perennial";
const COMMAND: &str = "vmm";

/// A running VM process. Dropping this kills the process and waits for its end, so that its RAM, disks
/// and ports are free for the next process.
#[derive(Debug)]
pub struct VmProcess {
    pid: Pid,
    /// Refers to the process even after it was reaped and its pid given to another process.
    pidfd: OwnedFd,
    conversation: Conversation,
    user: User,
    missing: OnceCell<Vec<String>>,
}

impl VmProcess {
    /// Starts this program again as `perennial vmm`, and lets it confine itself. The link is its standard
    /// input. It logs as much as this process.
    pub fn spawn(confinement: &Arc<Confinement>) -> Result<Self, ProcessError> {
        let user = confinement.take_user().ok_or(ProcessError::NoUser)?;
        let (here, there) = Channel::pair().map_err(ProcessError::Spawn)?;
        here.set_timeout(Some(ANSWER_WITHIN)).map_err(ProcessError::Spawn)?;
        let mut command = Command::new("/proc/self/exe");
        let level = tracing::level_filters::LevelFilter::current().to_string();
        let arguments = [COMMAND, "--log", &level];
        command.arg0(NAME).args(arguments).stdin(Stdio::from(there.into_fd()));
        // The environment is for the host only: systemd's sockets, and what the last host left.
        command.env_clear();
        let child = spawn_in_pid_namespace(command).map_err(ProcessError::Spawn)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
            // The process need not be killed: it has no VM yet, and ends when its link is closed.
            ProcessError::Spawn(errno.into())
        })?;
        let conversation = Conversation::new(here);
        conversation.send(Request::Confine { user: user.id() }, &[])?;
        let missing = OnceCell::new();
        Ok(Self { pid, pidfd, conversation, user, missing })
    }

    /// Sends the request that builds the machine, when the process is confined. Errors if the confinement is
    /// incomplete and the host requires a complete one.
    pub fn build(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        let missing = match self.conversation.reply()? {
            Reply::Confined { missing } => missing,
            other => return Err(unexpected("confine itself", &other)),
        };
        self.user.confinement().accept(&missing)?;
        let _ = self.missing.set(missing);
        self.conversation.send(request, fds)
    }

    /// The parts of the confinement that are missing. Empty until the process is confined.
    pub fn missing(&self) -> &[String] {
        self.missing.get().map_or(&[], Vec::as_slice)
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }
}

/// Gives access to the requests, replies and events of the process.
impl Deref for VmProcess {
    type Target = Conversation;

    fn deref(&self) -> &Conversation {
        &self.conversation
    }
}

impl AsFd for VmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.conversation.as_fd()
    }
}

/// Starts `command` as the first process of a PID namespace, or in the host's namespace if the host may not make
/// one; the process itself reports that as missing.
fn spawn_in_pid_namespace(mut command: Command) -> io::Result<Child> {
    // On a thread of its own, because the namespace becomes that of all later children of the thread, and
    // dies with the first one.
    let spawn = move || {
        // SAFETY: only UnshareFlags::FILES is unsafe, and it is not used.
        let _ = unsafe { unshare_unsafe(UnshareFlags::NEWPID) };
        command.spawn()
    };
    let thread = thread::Builder::new().name("spawn".to_owned()).spawn(spawn)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that starts it panicked")))
}

/// Whether this process was started by [`VmProcess::spawn`]. It is then not the host even with the ID 1, which
/// it has in its own namespace.
pub fn is_vm_process() -> bool {
    // It may have options after the command.
    std::env::args_os().take(2).eq([NAME, COMMAND])
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        // Errors if the process has ended already. The host's main loop may even have reaped it.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let mut gone = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match rustix::io::retry_on_intr(|| poll(&mut gone, Some(&GONE_WITHIN))) {
            Ok(0) => tracing::error!(
                "process {} was killed and does not end: it may keep a VM's memory, disks and \
                 ports busy",
                self.pid
            ),
            _ => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
            }
        }
    }
}
