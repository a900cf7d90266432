//! Commands for one VM that take as long as the VM's process does: pauses, resumes, dumps and boots. The process may hang,
//! so the main loop does not wait for it: it serves all else, and replies when the command has ended or is late.
//!
//! While such a command is carried out, another one for the same VM is refused, and so is a live update or a handover
//! with the VM. `stop --now` ends the VM, and the command with it. A command goes on if its client leaves.

use std::path::PathBuf;
use std::time::Instant;

use super::{Host, HostError, find};
use crate::api::{Answer, Line, hex};
use crate::guests::errand::Done;
use crate::guests::{Guest, GuestError};
use crate::machine::VmName;

/// A command for one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Errand {
    Pause,
    Resume,
    Dump(Option<PathBuf>),
    Boot,
}

/// The commands that are carried out. `C` tells which client a reply is for.
pub(super) struct Errands<C> {
    waiting: Vec<Waiting<C>>,
}

struct Waiting<C> {
    request: (C, u64),
    vm: VmName,
    errand: Errand,
}

impl<C> Default for Errands<C> {
    fn default() -> Self {
        Self { waiting: Vec::new() }
    }
}

impl<C: Copy + PartialEq> Errands<C> {
    /// Whether `client` waits for a reply.
    pub(super) fn is_waiting(&self, client: C) -> bool {
        self.waiting.iter().any(|waiting| waiting.request.0 == client)
    }

    /// Begins a command for a VM. The reply comes from [`round`](Self::round). A VM has one at a time, so the number of
    /// commands is bounded.
    pub(super) fn begin(
        &mut self,
        host: &mut Host,
        request: (C, u64),
        vm: VmName,
        errand: Errand,
    ) -> Result<(), HostError> {
        host.check_free(&vm)?;
        match &errand {
            Errand::Pause => host.vm(&vm)?.begin_pause()?,
            Errand::Resume => host.vm(&vm)?.begin_resume()?,
            Errand::Dump(path) => host.vm(&vm)?.begin_dump(path.clone())?,
            Errand::Boot => host.begin_boot(&vm)?,
        }
        self.waiting.push(Waiting { request, vm, errand });
        Ok(())
    }

    /// Returns the replies to the commands that have ended or are late.
    pub(super) fn round(&mut self, host: &mut Host) -> Vec<(C, Line)> {
        let mut replies = Vec::new();
        self.waiting.retain(|Waiting { request: (client, id), vm, errand }| {
            let ended = match find(&mut host.vms, vm) {
                Ok(vm) => errand.end(vm),
                Err(unknown) => Some(Err(unknown)),
            };
            let Some(ended) = ended else { return true };
            let line = match ended {
                Ok(answer) => Line::ok(*id, &answer),
                Err(error) => HostError::from(error).reply(*id),
            };
            replies.push((*client, line));
            false
        });
        replies
    }

    /// Returns replies to the commands that are left, because the host leaves its VMs to another one.
    pub(super) fn end(&mut self, host: &mut Host) -> Vec<(C, Line)> {
        let reply = |Waiting { request: (client, id), vm, errand }| {
            let error = match find(&mut host.vms, &vm) {
                Ok(vm) => vm.dropped(errand.participle()),
                Err(unknown) => unknown,
            };
            (client, HostError::from(error).reply(id))
        };
        self.waiting.drain(..).map(reply).collect()
    }
}

impl Errand {
    /// Returns the end of the command, if it has ended.
    fn end(&self, vm: &mut Guest) -> Option<Result<Answer, GuestError>> {
        let ended = match self {
            Self::Boot => vm.end_of_boot(),
            _ => vm.go_on_with_errand(),
        };
        let goes_on = match self {
            Self::Boot => vm.boots_by_command(),
            _ => vm.has_errand(),
        };
        match ended {
            None if goes_on => None,
            None => Some(Err(vm.dropped(self.participle()))),
            Some(Ok(Done::AsAsked)) => Some(Ok(Answer::Done {})),
            Some(Ok(Done::Document(bytes))) => Some(Ok(Answer::Document { document: hex(&bytes) })),
            Some(Err(error)) => Some(Err(error)),
        }
    }

    fn participle(&self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Dump(_) => "dumped",
            Self::Boot => "booted",
        }
    }
}

impl Host {
    /// Returns when the first command for a VM is late.
    pub(super) fn errands_due(&self) -> Option<Instant> {
        let errands = self.vms.iter().filter_map(Guest::errand_due);
        errands.chain(self.restores.due()).min()
    }

    /// Gives up the commands that are carried out for VMs, because the host ends. A guest that was to be paused runs on, and
    /// a VM that was to be restored is preserved. One that is being booted boots by the next host, if there is one.
    pub(super) fn give_up_errands(&mut self) {
        self.vms.iter_mut().for_each(Guest::give_up_errand);
        self.give_up_restores(None);
    }

    /// Errors if a command is carried out for a VM that is to leave. A preserved VM cannot be left out.
    pub(super) fn check_none_is_busy(&self, without: &[VmName]) -> Result<(), HostError> {
        let can_stay = |vm: &Guest| vm.is_live() || vm.boots_by_command();
        let leaves = |vm: &&Guest| !(can_stay(vm) && without.contains(&vm.machine.name));
        for vm in self.vms.iter().filter(leaves) {
            if let Err(GuestError::Busy { name, done }) = self.check_free(&vm.machine.name) {
                return Err(HostError::Busy { vm: name, done });
            }
        }
        Ok(())
    }
}
