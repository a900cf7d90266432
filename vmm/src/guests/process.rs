//! The process of one VM, for the host: starts it, sends it requests, and ends it.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::time::Timespec;

use super::conversation::{Conversation, ProcessError};
use crate::link::Channel;

/// How long a VM's process may take to answer, before it counts as hung. Long enough for hosts whose
/// CPUs are emulated.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long the host waits for a killed process to end. Only a process that is stuck in the kernel, for
/// example on a disk that does not answer, takes longer.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A running VM process. Dropping this kills the process and waits for its end, so that its RAM, disks
/// and ports are free for the next process.
#[derive(Debug)]
pub struct VmProcess {
    pid: Pid,
    /// Refers to the process even after it was reaped and its pid given to another process.
    pidfd: OwnedFd,
    conversation: Conversation,
}

impl VmProcess {
    /// Starts this program again as `perennial vmm`. The link is its standard input.
    pub fn spawn() -> Result<Self, ProcessError> {
        let (here, there) = Channel::pair().map_err(ProcessError::Spawn)?;
        here.set_timeout(Some(ANSWER_WITHIN)).map_err(ProcessError::Spawn)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("perennial").arg("vmm").stdin(Stdio::from(there.into_fd()));
        // The environment is for the host only: systemd's sockets, and what the last host left.
        command.env_clear();
        let child = command.spawn().map_err(ProcessError::Spawn)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
            // The process need not be killed: it has no VM yet, and ends when its link is closed.
            ProcessError::Spawn(errno.into())
        })?;
        Ok(Self { pid, pidfd, conversation: Conversation::new(here) })
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
