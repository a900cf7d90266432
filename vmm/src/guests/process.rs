//! The process of one VM, for the host: starts it, sends it requests, and ends it.

use std::cell::OnceCell;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::process::Pid;

use super::confinement::{Confinement, User};
use super::conversation::{ANSWER_WITHIN, Conversation, ProcessError, unexpected};
use crate::confine::{self, Process};
use crate::link::{Channel, Reply, Request, Role};

/// The subcommand of a VM's process.
const COMMAND: &str = "vmm";

/// A running VM process. Dropping this kills the process and waits for its end, so that its RAM, disks
/// and ports are free for the next process.
#[derive(Debug)]
pub struct VmProcess {
    process: Process,
    conversation: Conversation,
    user: User,
    missing: OnceCell<Vec<String>>,
}

impl VmProcess {
    /// Starts this program again as `perennial vmm`, and lets it confine itself. The link is its standard
    /// input. It logs as much as this process.
    pub fn spawn(confinement: &Arc<Confinement>) -> Result<Self, ProcessError> {
        Self::spawn_from(None, confinement)
    }

    /// The same, from another program than the running one.
    pub fn spawn_from(
        program: Option<BorrowedFd<'_>>,
        confinement: &Arc<Confinement>,
    ) -> Result<Self, ProcessError> {
        let user = confinement.take_user().ok_or(ProcessError::NoUser)?;
        let (here, there) = Channel::pair().map_err(ProcessError::Spawn)?;
        here.set_timeout(Some(ANSWER_WITHIN)).map_err(ProcessError::Spawn)?;
        let holds = "a VM's memory, disks and ports";
        let process = match program {
            None => Process::spawn(COMMAND, &[], there.into_fd(), None, holds),
            Some(program) => {
                let path = format!("/proc/self/fd/{}", program.as_raw_fd());
                Process::spawn_from(&path, COMMAND, &[], there.into_fd(), None, holds)
            }
        };
        let process = process.map_err(ProcessError::Spawn)?;
        let conversation = Conversation::new(here);
        conversation.send(Request::Confine { user: user.id() }, &[])?;
        let missing = OnceCell::new();
        Ok(Self { process, conversation, user, missing })
    }

    /// Sends the request that builds the machine, when the process is confined. Errors if the confinement is
    /// incomplete and the host requires a complete one.
    pub fn build(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        self.confined(self.conversation.reply()?)?;
        self.conversation.send(request, fds)
    }

    /// Takes the answer to the first request, [`Request::Confine`]. Errors if the confinement is incomplete and the host
    /// requires a complete one.
    pub fn confined(&self, reply: Reply) -> Result<(), ProcessError> {
        let missing = match reply {
            Reply::Confined { missing } => missing,
            other => return Err(unexpected("confine itself", &other)),
        };
        self.user.confinement().accept(&missing)?;
        let _ = self.missing.set(missing);
        Ok(())
    }

    /// Kills the process and does not wait for its end, as dropping this does: so that several end at the same time.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Returns an fd that is readable when the process has ended, also after this value is dropped.
    pub(super) fn end(&self) -> io::Result<OwnedFd> {
        self.process.end()
    }

    /// A process that does nothing, with a link whose other end a test has.
    #[cfg(test)]
    pub(crate) fn idle(confinement: &Arc<Confinement>) -> (Self, Channel) {
        let (here, there) = Channel::pair().unwrap();
        let (process, user) = (Process::idle(), confinement.take_user().unwrap());
        let conversation = Conversation::new(here);
        conversation.send(Request::Confine { user: user.id() }, &[]).unwrap();
        (Self { process, conversation, user, missing: OnceCell::new() }, there)
    }

    /// The parts of the confinement that are missing. Empty until the process is confined.
    pub fn missing(&self) -> &[String] {
        self.missing.get().map_or(&[], Vec::as_slice)
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.process.pid()
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

/// Whether this process was started by [`VmProcess::spawn`]. It is then not the host even with the ID 1, which
/// it has in its own namespace.
pub fn is_vm_process() -> bool {
    confine::was_started_as(COMMAND)
}
