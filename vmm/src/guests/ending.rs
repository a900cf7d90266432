//! The end of a VM's process and of its RAM, on a thread: both take time that grows with the RAM, seconds for tens of
//! GiB, and a process that is stuck in the kernel does not end at all. The host's loop serves all else meanwhile.
//!
//! Until then the VM's disks, ports and room in a pool are in use, so the VM does not boot before, and the reply to its
//! `stop` comes after that.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::Pid;

use super::elsewhere::Elsewhere;
use super::guest::{Guest, Life};

/// A process that was killed, and what the VM had with it.
#[derive(Debug)]
pub(super) struct Ending {
    pid: Pid,
    work: Elsewhere<()>,
}

impl Guest {
    /// Ends the VM's process, if it has one. The VM's life is `life` from now on.
    pub fn end_with(&mut self, life: Life) {
        if let Life::Live(live) = std::mem::replace(&mut self.life, life) {
            live.process.kill();
            self.let_end(live.process.pid(), live);
        }
    }

    /// Drops what a killed process `pid` was for, on a thread. If there is none, that takes place here.
    pub(super) fn let_end(&mut self, pid: Pid, all: impl Send + 'static) {
        let what = format!("ending the process of VM `{}` and freeing its RAM", self.name());
        match Elsewhere::begin("end", what, move || drop(all)) {
            Ok(work) => self.ending.push(Ending { pid, work }),
            Err(error) => tracing::warn!("cannot start a thread: {error}"),
        }
    }

    /// Whether no process of the VM's past is left.
    pub fn is_gone(&self) -> bool {
        self.ending.is_empty()
    }

    /// Notes the processes that have ended, and a guest that runs on.
    pub fn note_ends(&mut self) {
        if let Life::Live(live) = &mut self.life {
            live.note_resumed();
        }
        self.ending.retain(|ending| ending.work.take().is_none());
    }

    /// What becomes readable when a process has ended.
    pub fn ending_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ending.iter().map(|ending| ending.work.as_fd())
    }

    /// The IDs of all processes of the VM, also of those that are ending.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.pid().into_iter().chain(self.ending.iter().map(|ending| ending.pid))
    }
}
