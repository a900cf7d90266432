//! The process of one VM, as the host sees it: started, asked, and ended.

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

/// How long a VM's process may take to answer. Generous: it bounds a process that hangs, on hosts
/// that emulate their CPUs too.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long a killed process may take to be gone. Only one that is stuck in the kernel, on a disk
/// that does not answer, takes longer; it ends when it can.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A running VM process. Dropping it ends the process: what it held (RAM, disks, ports) is free for
/// the next one.
#[derive(Debug)]
pub struct VmProcess {
    pid: Pid,
    /// Names the process even when it has been reaped and its number given to another.
    pidfd: OwnedFd,
    conversation: Conversation,
}

impl VmProcess {
    /// Starts a process of this very binary. The link is its standard input.
    pub fn spawn() -> Result<Self, ProcessError> {
        let (here, there) = Channel::pair().map_err(ProcessError::Spawn)?;
        here.set_timeout(Some(ANSWER_WITHIN)).map_err(ProcessError::Spawn)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("perennial").arg("vmm").stdin(Stdio::from(there.into_fd()));
        // What is in the environment is for the host: where systemd listens, what the last host left.
        command.env_clear();
        let child = command.spawn().map_err(ProcessError::Spawn)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
            // Nobody else knows of it; it has been given nothing yet, and ends with its link.
            ProcessError::Spawn(errno.into())
        })?;
        Ok(Self { pid, pidfd, conversation: Conversation::new(here) })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }
}

/// What is said to the process and what it says.
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
        // That it has ended already is as good; then the main loop may have reaped it, too.
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
