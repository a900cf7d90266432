//! Ends VMs: asks their guests to shut down, and pulls the plug of those that have not by their deadline.
//!
//! ```text
//!   stop       ask the guest ---it shuts down---> reply
//!   power-off  ask all guests, one deadline      /
//!   SIGTERM          \\--deadline, or `now`--> pull the plug
//! ```
//!
//! Nobody waits meanwhile: the main loop serves all else, and looks after each round at what has ended.

use std::time::{Duration, Instant};

use super::{Host, HostError, find, index_of};
use crate::api::{Answer, Ended, Line};
use crate::causes::chain;
use crate::guests::{Guest, Life};
use crate::machine::VmName;

/// Most requests of one client that wait for the end of a VM. The number of clients is limited as well, and no client can
/// take the places of others.
const MOST_WAITING: usize = 64;

/// The requests that wait for ends. `C` tells which client a reply is for.
pub(super) struct Stops<C> {
    waiting: Vec<Waiting<C>>,
    /// The VMs whose plug was pulled in this round of the main loop.
    pulled: Vec<VmName>,
    /// The requests that wait for the end of the host. `None` if the host is not to end.
    ending: Option<Vec<(C, u64)>>,
}

struct Waiting<C> {
    client: C,
    id: u64,
    vm: VmName,
    /// How the VM ended, when it has. Its process may still be ending.
    ended: Option<Ended>,
}

impl<C> Default for Stops<C> {
    fn default() -> Self {
        Self { waiting: Vec::new(), pulled: Vec::new(), ending: None }
    }
}

impl<C: Copy + PartialEq> Stops<C> {
    /// Whether `client` waits for a reply.
    pub(super) fn is_waiting(&self, client: C) -> bool {
        let ending = self.ending.iter().flatten().any(|(whom, _)| *whom == client);
        ending || self.waiting.iter().any(|waiting| waiting.client == client)
    }

    /// Forgets the requests for the end of a VM whose clients are gone. The VMs end all the same.
    pub(super) fn forget(&mut self, is_gone: impl Fn(C) -> bool) {
        self.waiting.retain(|waiting| !is_gone(waiting.client));
    }

    /// Whether the host ends when its VMs have.
    pub(super) fn host_ends(&self) -> bool {
        self.ending.is_some()
    }

    /// Begins to stop a VM. The reply to request `id` comes from [`round`](Self::round).
    pub(super) fn stop(
        &mut self,
        host: &mut Host,
        (client, id): (C, u64),
        vm: VmName,
        within_s: u32,
    ) -> Result<(), HostError> {
        let own = self.waiting.iter().filter(|waiting| waiting.client == client).count();
        // A plug that is pulled at once does not wait.
        if within_s > 0 && own >= MOST_WAITING {
            return Err(HostError::TooManyWait(MOST_WAITING));
        }
        if within_s != 0 {
            host.check_free(&vm)?;
        }
        let guest = find(&mut host.vms, &vm)?;
        let ended = guest.has_ended().then_some(Ended::WasStopped);
        if !guest.is_live() || within_s == 0 {
            host.pull(&vm)?;
            if ended.is_none() {
                self.pulled.push(vm.clone());
            }
        } else {
            find(&mut host.vms, &vm)?.shut_down(after(within_s))?;
            tracing::info!("VM `{vm}`: its guest was asked to shut down within {within_s} s");
        }
        self.waiting.push(Waiting { client, id, vm, ended });
        Ok(())
    }

    /// Begins to stop all VMs and then the host, at the latest after `within_s`. `request` is the one to reply
    /// to.
    pub(super) fn end_host(&mut self, host: &mut Host, request: Option<(C, u64)>, within_s: u32) {
        self.ending.get_or_insert_default().extend(request);
        host.end_late(None);
        host.give_up_errands();
        for vm in &mut host.vms {
            vm.end_boot();
            let Life::Live(live) = &vm.life else { continue };
            let name = vm.machine.name.clone();
            if within_s == 0 || !live.running {
                tracing::warn!("VM `{name}` is {}: the plug is pulled", vm.state());
                vm.stop();
            } else if let Err(error) = vm.shut_down(after(within_s)) {
                tracing::error!("{}: the plug is pulled", chain(&error).join(": "));
                vm.stop();
            }
        }
    }

    /// Pulls the plug of each VM whose deadline has passed. Returns the replies to the requests whose VM has
    /// ended.
    pub(super) fn round(&mut self, host: &mut Host) -> Vec<(C, Line)> {
        let now = Instant::now();
        for vm in &mut host.vms {
            if vm.stopping().is_some_and(|deadline| deadline <= now) {
                let name = &vm.machine.name;
                tracing::warn!(
                    "VM `{name}`: its guest did not shut down in time: the plug is pulled"
                );
                self.pulled.push(name.clone());
                vm.stop();
            }
        }
        let pulled = std::mem::take(&mut self.pulled);
        let mut replies = Vec::new();
        self.waiting.retain_mut(|Waiting { client, id, vm, ended }| {
            let guest = host.vms.iter().find(|guest| guest.machine.name == *vm);
            if guest.is_some_and(|guest| guest.stopping().is_some()) {
                return true;
            }
            let ended = *ended.get_or_insert(match guest.map(|guest| &guest.life) {
                _ if pulled.contains(vm) => Ended::Pulled,
                Some(Life::Failed(_)) => Ended::Failed,
                _ => Ended::ByGuest,
            });
            // Whoever has stopped a VM may use its disks.
            let line = match guest.map(|guest| (guest.is_gone(), guest.check_none_lingers())) {
                Some((false, Ok(()))) => return true,
                Some((_, Err(lingers))) => HostError::from(lingers).reply(*id),
                _ => Line::ok(*id, &Answer::Ended { ended }),
            };
            replies.push((*client, line));
            false
        });
        if let Some(requests) = &self.ending
            && self.has_ended(host)
        {
            let done = |&(client, id)| (client, Line::ok(id, &Answer::Done {}));
            replies.extend(requests.iter().map(done));
        }
        replies
    }

    /// Whether the host is to end and all of its VMs have ended.
    pub(super) fn has_ended(&self, host: &Host) -> bool {
        self.ending.is_some() && host.none_is_ending()
    }
}

impl Host {
    /// Ends those of these VMs that have a process, so that the others can be kept. They have failed for this reason, or are
    /// preserved if the guest has not run since its state was saved in an earlier attempt. Returns whether there is one.
    pub(super) fn fail(&mut self, names: &[VmName], why: &[String]) -> bool {
        let is_meant = |vm: &&mut Guest| vm.is_live() && names.contains(&vm.machine.name);
        let mut any = false;
        for vm in self.vms.iter_mut().filter(is_meant) {
            any = true;
            if let Life::Live(live) = &mut vm.life
                && let Some((held, entry)) = live.take_unresumed()
            {
                let (entry, why) = (Some(Box::new(entry)), why.to_vec());
                vm.end_with(Life::Preserved { held, entry, why });
                continue;
            }
            tracing::error!("VM `{}` is ended, so that the others can be kept", vm.machine.name);
            vm.end_with(Life::Failed(why.to_vec()));
        }
        any
    }

    /// Errors if a VM that is not left out cannot leave now. Errors if there is no VM of a name that is to be left out.
    pub(super) fn check_can_leave(&self, without: &[VmName]) -> Result<(), HostError> {
        without.iter().try_for_each(|name| index_of(&self.vms, name).map(drop))?;
        self.check_none_stops(without)?;
        self.check_none_is_busy(without)
    }

    /// Returns when the first plug is pulled, if no guest shuts down before.
    pub(super) fn stop_deadline(&self) -> Option<Instant> {
        self.vms.iter().filter_map(|vm| vm.stopping()).min()
    }

    /// Whether no VM is stopping, and the host waits for no process of a VM that has ended.
    pub(super) fn none_is_ending(&self) -> bool {
        self.stop_deadline().is_none() && self.vms.iter().all(Guest::is_let_go)
    }

    /// Ends the VMs that are stopping at `latest`.
    pub(super) fn hasten_stops(&mut self, latest: Instant) {
        for vm in &mut self.vms {
            if let Life::Live(live) = &mut vm.life {
                live.stopping = live.stopping.map(|deadline| deadline.min(latest));
            }
        }
    }

    /// Errors if a VM that is not left out is stopping: the next host would not know its deadline.
    fn check_none_stops(&self, without: &[VmName]) -> Result<(), HostError> {
        let mut staying = self.vms.iter().filter(|vm| !without.contains(&vm.machine.name));
        match staying.find(|vm| vm.stopping().is_some()) {
            Some(vm) => Err(HostError::Stopping(vm.machine.name.clone())),
            None => Ok(()),
        }
    }
}

pub(super) fn after(seconds: u32) -> Instant {
    Instant::now() + Duration::from_secs(seconds.into())
}
