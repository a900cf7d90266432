//! The end of a VM's process and of its RAM, on a thread: both take time that grows with the RAM, seconds for tens of
//! GiB, and a process that is stuck in the kernel does not end at all. The host's loop serves all else meanwhile.
//!
//! Until then the VM's disks, ports and room in a pool are in use, so the VM does not boot before, and the reply to its
//! `stop` comes after that.
//!
//! ```text
//!   killed --> its RAM is freed, its end is waited for ---it ends--> gone
//!                                                \--too late--> lingers --it ends--> gone
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::Pid;

use super::elsewhere::Elsewhere;
use super::guest::{Guest, GuestError, Life};
use super::process::VmProcess;
use crate::answer::ends_within;

/// A process that was killed, and what the VM had with it.
#[derive(Debug)]
pub(super) struct Ending {
    pid: Pid,
    /// Readable when the process has ended. `None` if the host had no file for it.
    end: Option<OwnedFd>,
    /// Frees what the VM had, and waits for the end of the process. `None` when that is done.
    work: Option<Elsewhere<()>>,
}

impl Ending {
    /// Whether the process has not ended in time. The host waits for it no longer, but its files are in use.
    fn lingers(&self) -> bool {
        self.work.is_none()
    }

    /// What becomes readable when something of it has ended.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.work {
            Some(work) => Some(work.as_fd()),
            None => self.end.as_ref().map(AsFd::as_fd),
        }
    }

    /// Whether the process has ended, and what the VM had with it is free.
    fn is_over(&mut self) -> bool {
        self.work.take_if(|work| work.take().is_some());
        let has_ended = |end| !matches!(ends_within(end, Duration::ZERO), Ok(false));
        self.lingers() && self.end.as_ref().is_none_or(has_ended)
    }
}

impl Guest {
    /// Ends the VM's process, if it has one. The VM's life is `life` from now on.
    pub fn end_with(&mut self, life: Life) {
        if let Life::Live(live) = std::mem::replace(&mut self.life, life) {
            self.let_end(live, |live| &live.process);
        }
    }

    /// Kills the `process` of what the VM had, and drops `all` of that on a thread. If there is none, that takes place here.
    pub(super) fn let_end<T: Send + 'static>(&mut self, all: T, process: fn(&T) -> &VmProcess) {
        let killed = process(&all);
        killed.kill();
        let (pid, end) = (killed.pid(), killed.end());
        let end = end.inspect_err(|error| tracing::warn!("cannot watch process {pid}: {error}"));
        let what = format!("ending the process of VM `{}` and freeing its RAM", self.name());
        let work = Elsewhere::begin("end", what, move || drop(all));
        let work = work.inspect_err(|error| tracing::warn!("cannot start a thread: {error}"));
        self.ending.push(Ending { pid, end: end.ok(), work: work.ok() });
    }

    /// Whether no process of the VM's past is left.
    pub fn is_gone(&self) -> bool {
        self.ending.is_empty()
    }

    /// Whether the host waits for no process of the VM's past. Those that are left linger.
    pub fn is_let_go(&self) -> bool {
        self.ending.iter().all(Ending::lingers)
    }

    /// Errors if a process of the VM's past is left, and the host does not wait for it any longer.
    pub fn check_none_lingers(&self) -> Result<(), GuestError> {
        match self.ending.first() {
            Some(Ending { pid, .. }) if self.is_let_go() => {
                Err(GuestError::Lingers { name: self.name(), pid: pid.as_raw_pid() })
            }
            _ => Ok(()),
        }
    }

    /// Notes the processes that have ended, and a guest that runs on.
    pub fn note_ends(&mut self) {
        if let Life::Live(live) = &mut self.life {
            live.note_resumed();
        }
        self.ending.retain_mut(|ending| !ending.is_over());
    }

    /// What becomes readable when a process has ended.
    pub fn ending_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ending.iter().filter_map(Ending::fd)
    }

    /// The IDs of the processes of the VM that the next host has to end. It would wait in vain for one that lingers.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        let ending = self.ending.iter().filter(|ending| !ending.lingers());
        self.pid().into_iter().chain(ending.map(|ending| ending.pid))
    }
}
