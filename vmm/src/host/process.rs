//! The process of one VM, as the host sees it: started, asked, and ended.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::time::Timespec;

use crate::link::{Channel, Envelope, Event, FromVm, LinkError, Reply, Request, Role};
use crate::live_update::next_host;

/// How long a VM's process may take to answer. Generous: it bounds a process that hangs, on hosts
/// that emulate their CPUs too.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long a killed process may take to be gone. Only one that is stuck in the kernel, on a disk
/// that does not answer, takes longer; it ends when it can.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A VM's process could not be started or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It cannot be started.
    #[error("cannot start the VM's process")]
    Spawn(#[source] std::io::Error),
    /// The link to it failed.
    #[error("no answer to `{request}` from the VM's process")]
    Link {
        /// What was asked.
        request: &'static str,
        /// Why there is no answer.
        #[source]
        source: LinkError,
    },
    /// It answered that it cannot.
    #[error("the VM's process cannot {request}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its reasons, outermost first.
        #[source]
        source: Reasons,
    },
    /// It answered something else.
    #[error("the VM's process answered {reply} to `{request}`")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// What came.
        reply: String,
    },
}

/// A chain of causes that came from another process.
#[derive(Debug)]
pub struct Reasons {
    text: String,
    source: Option<Box<Reasons>>,
}

impl Reasons {
    fn new(mut chain: VecDeque<String>) -> Option<Box<Self>> {
        let text = chain.pop_front()?;
        Some(Box::new(Self { text, source: Self::new(chain) }))
    }
}

impl std::fmt::Display for Reasons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Reasons {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

/// A running VM process. Dropping it ends the process: what it held (RAM, disks, ports) is free for
/// the next one.
#[derive(Debug)]
pub struct VmProcess {
    pid: Pid,
    /// Names the process even when it has been reaped and its number given to another.
    pidfd: OwnedFd,
    channel: Channel,
    asked: RefCell<VecDeque<&'static str>>,
    events: RefCell<VecDeque<Event>>,
}

impl VmProcess {
    /// Starts a process of this very binary. The link is its standard input.
    pub fn spawn() -> Result<Self, ProcessError> {
        let (here, there) = Channel::pair().map_err(ProcessError::Spawn)?;
        here.set_timeout(Some(ANSWER_WITHIN)).map_err(ProcessError::Spawn)?;
        let child = Command::new("/proc/self/exe")
            .arg0("perennial")
            .arg("vmm")
            .env_remove(next_host::VARIABLE)
            .stdin(Stdio::from(there.into_fd()))
            .spawn()
            .map_err(ProcessError::Spawn)?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
            // Nobody else knows of it; it has been given nothing yet, and ends with its link.
            ProcessError::Spawn(errno.into())
        })?;
        Ok(Self {
            pid,
            pidfd,
            channel: here,
            asked: RefCell::default(),
            events: RefCell::default(),
        })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a request; [`reply`](Self::reply) waits for its answer. Several processes work at the
    /// same time when all are asked before the first is waited for.
    pub fn send(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        let name = verb(&request);
        let (roles, raw): (Vec<Role>, Vec<BorrowedFd<'_>>) = fds.iter().copied().unzip();
        self.channel
            .send(&Envelope { request, roles }, &raw)
            .map_err(|source| ProcessError::Link { request: name, source })?;
        self.asked.borrow_mut().push_back(name);
        Ok(())
    }

    /// Waits for the answer to the oldest request.
    pub fn reply(&self) -> Result<Reply, ProcessError> {
        let request = self.asked.borrow_mut().pop_front().unwrap_or("nothing");
        loop {
            let (message, _) = self
                .channel
                .receive::<FromVm>()
                .map_err(|source| ProcessError::Link { request, source })?;
            match message {
                FromVm::Event(event) => self.events.borrow_mut().push_back(event),
                FromVm::Reply(Reply::Failed(chain)) => {
                    let unsaid = || Box::new(Reasons { text: "no reason".into(), source: None });
                    let source = *Reasons::new(chain.into()).unwrap_or_else(unsaid);
                    return Err(ProcessError::Refused { request, source });
                }
                FromVm::Reply(reply) => return Ok(reply),
            }
        }
    }

    /// Sends a request without fds and waits for its answer. Answers to earlier requests that
    /// nobody waited for, because another VM failed first, are discarded.
    pub fn ask(&self, request: Request) -> Result<Reply, ProcessError> {
        while !self.asked.borrow().is_empty() {
            let _ = self.reply();
        }
        self.send(request, &[])?;
        self.reply()
    }

    /// Whether the process has said something that nobody has looked at yet.
    pub fn has_events(&self) -> bool {
        !self.events.borrow().is_empty()
    }

    /// The last thing that an ended process said unasked.
    pub fn last_words(&self) -> Option<Event> {
        while let Ok((message, _)) = self.channel.receive::<FromVm>() {
            if let FromVm::Event(event) = message {
                self.events.borrow_mut().push_back(event);
            }
        }
        self.events.borrow_mut().pop_back()
    }

    /// What the process said unasked, oldest first. Reads one more message if `readable`.
    pub fn events(&self, readable: bool) -> Result<Vec<Event>, ProcessError> {
        if readable {
            let request = "nothing";
            match self.channel.receive::<FromVm>() {
                Ok((FromVm::Event(event), _)) => self.events.borrow_mut().push_back(event),
                Ok((FromVm::Reply(reply), _)) => return Err(unexpected(request, &reply)),
                Err(source) => return Err(ProcessError::Link { request, source }),
            }
        }
        Ok(self.events.borrow_mut().drain(..).collect())
    }
}

/// The error for an answer that does not belong to its question.
pub fn unexpected(request: &'static str, reply: &Reply) -> ProcessError {
    ProcessError::Unexpected { request, reply: format!("{reply:?}") }
}

fn verb(request: &Request) -> &'static str {
    match request {
        Request::Boot { .. } => "boot the guest",
        Request::Restore { .. } => "restore the guest",
        Request::Resume => "resume the guest",
        Request::Pause => "pause the guest",
        Request::Save => "save the guest's state",
        Request::Sync => "sync the guest's disks",
    }
}

impl AsFd for VmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
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
