//! The VMs of the last host: resumes them, holds those that it cannot resume, tries them again, and boots the VMs of
//! the configuration if there was no last host.
//!
//! Nothing here ends what it could not use: a session is finished only when this process has every file of it, and a
//! VM whose state may still come is not booted.

use std::cmp::Reverse;
use std::path::Path;

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::Expect;
use luo::{Incoming, Orchestrator, SessionName};

use super::backend::{self, ChosenLuo};
use super::boots::forget_leftovers;
use super::{Found, Host, HostError, Look, find, init, report, start};
use crate::api::report::Replaced;
use crate::arch::x86_64::cpuid::CpuModel;
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::config::HostSection;
use crate::guests::held::Held;
use crate::guests::{Guest, Life};
use crate::live_update::arrival::{self, Arrival, NotSeen, entry_of};
use crate::live_update::breakpoint;
use crate::live_update::incoming;
use crate::live_update::index::{FileKind, IndexedFile, IndexedSession};
use crate::live_update::manifest::{vm_of_session, vm_session};
use crate::live_update::programs::{self, Program};
use crate::machine::{Boot, DiskBoot, Machine, VmName};

/// What is left of the last host's sessions, beside those of preserved VMs.
#[derive(Debug, Default)]
pub(super) struct LastHost {
    /// The keeper that has the sessions, after a handover.
    pub(super) keeper: Option<Keeper>,
    /// The host's own session, while it is not finished.
    session: Option<Incoming>,
    /// Why nothing of it can be read: the chain of causes. `None` if it was read, or there was no last host.
    pub(super) unseen: Option<Vec<String>>,
    /// What was replaced and why its VMs are lost: the chain of causes. `None` if they are not, or there was no last host.
    pub(super) lost: Option<(Replaced, Vec<String>)>,
}

impl LastHost {
    /// The last host of which nothing was looked at yet, with the reason why its VMs are lost, if they are.
    pub(super) fn new(lost: Option<(Replaced, Vec<String>)>) -> Self {
        Self { lost, ..Self::default() }
    }

    /// Why its VMs are lost, or cannot be read.
    pub(super) fn why(&self) -> Option<Vec<String>> {
        let lost = self.lost.as_ref().map(|(_, why)| why);
        lost.or(self.unseen.as_ref()).cloned()
    }
}

/// Where preserved VMs are to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destiny {
    /// They stay in this host.
    Stay,
    /// Another kernel, or the next process of this service.
    NextKernel,
    /// The next program in this process.
    NextProgram,
}

/// Whether the VM's memory is kept, also while the VM is being restored.
fn is_preserved(vm: &Guest) -> bool {
    matches!(vm.life, Life::Preserved { .. } | Life::Restoring(_))
}

/// The LUO that has the last host's sessions.
pub(super) fn origin<'a>(
    last_host: &'a LastHost,
    luo: &'a ChosenLuo,
) -> Option<&'a dyn Orchestrator> {
    match (&last_host.keeper, luo) {
        (Some(keeper), _) => Some(keeper),
        (None, Ok(luo)) => Some(luo.as_ref()),
        (None, Err(_)) => None,
    }
}

impl Host {
    /// Resumes the VMs that were found; else boots those of the configuration.
    pub(super) fn populate(&mut self, Found { arrival, keeper }: Found) {
        if init::is_pid_1()
            && let Some(name) = &self.config.host.hostname
        {
            init::set_hostname(name);
        }
        if let Err(error) = guest_mem::HugePages::set_advise(Path::new("/sys")) {
            tracing::warn!("{}", chain(&error).join(": "));
        }
        let is_cold = keeper.is_none() && self.luo.is_ok() && matches!(arrival, Ok(None));
        self.last_host.keeper = keeper;
        let has_arrived = self.see(arrival);
        if !has_arrived {
            self.boot_vms();
            self.report_unread();
        }
        // What was left is redeemed when this host has taken it over. If nothing was left, not before this host knows which VMs
        // were given up.
        if is_cold || self.last_host.lost.is_some() {
            self.redeem_if_none_is_withheld();
        }
        // They arrived in the order of their urgency. From now on no VM changes its place.
        let configured = &self.config.machines;
        let place = |vm: &Guest| configured.iter().position(|m| m.name == vm.machine.name);
        self.vms.sort_by_key(|vm| place(vm).unwrap_or(usize::MAX));
        self.apply_policies();
        if has_arrived {
            self.vms.iter_mut().for_each(Guest::did_not_arrive);
        }
        self.begin_awaited();
    }

    /// Takes over what the last host left. Returns whether that could be read.
    fn see(&mut self, look: Look) -> bool {
        match look {
            Ok(Some(arrival)) => {
                self.last_host.unseen = None;
                let is_in_luo = self.last_host.keeper.is_none();
                self.take_over(arrival);
                // Not before: a host that is started again until now finds all VMs that did not run yet.
                if is_in_luo {
                    self.kernel_entry.redeem();
                }
                true
            }
            Ok(None) => false,
            Err(NotSeen { session, error }) => {
                let why = chain(&*error);
                tracing::error!("what the last host left cannot be read: {}", why.join(": "));
                self.last_host.session = session;
                self.last_host.unseen = Some(why);
                false
            }
        }
    }

    /// The new host's half of a live update, or of a handover.
    fn take_over(&mut self, arrival: Arrival) {
        let Some(luo) = origin(&self.last_host, &self.luo) else { return };
        // The VMs open them now.
        self.kept_disks.release_all();
        let (mut entries, opaque) = arrival.entries();
        let mut opaque: Vec<_> = opaque.into_iter().filter_map(named).collect();
        let is_wanted = |name: &SessionName| {
            let given_up = vm_of_session(name).is_some_and(|vm| self.is_given_up(&vm));
            if given_up {
                tracing::warn!("`{name}` was given up: its memory is freed");
                drop(luo.retrieve_session(name));
            }
            !given_up
        };
        entries.retain(|entry| is_wanted(&vm_session(&entry.machine.name)));
        opaque.retain(|(name, _)| is_wanted(name));
        entries.sort_by_key(|entry| Reverse(self.config.priority(&entry.machine.name)));
        let opened = tsc::now();
        let hints = self.config.host.missing_hints;
        let (arrived, late) = incoming::resume_all(luo, &entries, &self.confinement, hints);
        let resumed = tsc::now();
        let backend = luo.backend();
        let opaque: Vec<_> =
            opaque.into_iter().map(|(name, files)| hold(luo, name, files)).collect();
        let manifest = arrival.manifest.as_ref();
        let boots = manifest.iter().flat_map(|manifest| &manifest.boots);
        // The others an operator has given up since, and perhaps booted.
        let mut boots: Vec<_> = boots.filter(|vm| !self.is_given_up(&vm.name)).cloned().collect();
        self.number = manifest.map_or(self.number, |manifest| manifest.number);
        self.report = Some(self.make_report(manifest, backend, &arrived, (opened, resumed)));
        self.late.extend(late);
        breakpoint::reach("finish", None);
        for vm in arrived {
            self.unfinished.extend(vm.session.and_then(finish));
            self.put(vm.vm);
        }
        self.carried.manifests.extend(arrival.unread);
        self.last_host.session = Some(arrival.session);
        let held =
            opaque.iter().map(|held| held.as_ref().map_or_else(|(name, _)| name, Held::name));
        let held: Vec<_> = held.filter_map(vm_of_session).collect();
        self.hold_opaque(opaque);
        self.report_opaque(&held);
        self.choose_programs();
        if let Err(error) = self.settle(Destiny::Stay) {
            tracing::error!("{}", chain(&error).join(": "));
        }
        self.finish_the_rest();
        breakpoint::reach("report", None);
        // Those that have a state were put in their places above.
        let has_state = |vm: &Guest, name: &VmName| vm.machine.name == *name && !vm.is_withheld();
        boots.retain(|machine| !self.vms.iter().any(|vm| has_state(vm, &machine.name)));
        let names: Vec<_> = boots.iter().map(|machine| machine.name.clone()).collect();
        for machine in boots {
            tracing::info!("VM `{}` was about to boot again: it does so now", machine.name);
            let mut vm = Guest::new(machine, &self.confinement);
            vm.boot_soon();
            self.put(vm);
        }
        self.report_boots(&names);
        self.keep_report();
        let known: Vec<VmName> = self.vms.iter().map(|vm| vm.machine.name.clone()).collect();
        let new = self.config.machines.iter().filter(|m| !known.contains(&m.name));
        let new = new.cloned().map(|machine| Guest::new(machine, &self.confinement));
        self.vms.extend(new);
    }

    /// Whether an operator gave up the state that the last host left of a VM.
    fn is_given_up(&self, name: &VmName) -> bool {
        let known = self.vms.iter().find(|vm| vm.machine.name == *name);
        match known.map(|vm| &vm.life) {
            Some(Life::Withheld(_)) => false,
            Some(_) => true,
            // "Given up" is a decision about the state that came with this kernel, or that waited in the pool. A VM that this
            // process has from the last host is newer than that decision.
            None => !self.came_by_exec() && self.kernel_entry.is_given_up(name),
        }
    }

    /// Whether this process has its VMs from the last host by an exec. Otherwise somebody may have given them up since they
    /// were handed over.
    fn came_by_exec(&self) -> bool {
        self.replaced == Some(Replaced::Program) && !self.kernel_entry.is_noted()
    }

    /// Replaces the VM of this name, or adds it. VMs never change their places: the main loop counts on that.
    fn put(&mut self, vm: Guest) {
        match self.vms.iter_mut().find(|known| known.machine.name == vm.machine.name) {
            Some(known) => *known = vm,
            None => self.vms.push(vm),
        }
    }

    /// Holds sessions for which no manifest has an entry that this program can read.
    fn hold_opaque(&mut self, opaque: Vec<Result<Held, (SessionName, luo::Error)>>) {
        let unread = self.carried.manifests.iter().flat_map(|unread| unread.why.iter());
        let mut why: Vec<String> = unread.cloned().collect();
        why.insert(0, "this program cannot read the manifest that describes the VM".to_owned());
        for held in opaque {
            let (name, life) = match held {
                Ok(held) => {
                    let Some(name) = vm_of_session(held.name()) else {
                        match Program::of(held) {
                            Ok(program) => self.carried.programs.push(program),
                            Err(other) => self.carried.sessions.push(other),
                        }
                        continue;
                    };
                    tracing::error!("VM `{name}` is preserved: {}", why.join(": "));
                    let machine = self.machine_of(&name, &held);
                    (machine, Life::Preserved { held, entry: None, why: why.clone() })
                }
                Err((session, error)) => {
                    tracing::error!("{error}");
                    let configured = self.config.machines.iter();
                    let of_session = |m: &&Machine| vm_session(&m.name) == session;
                    match configured.clone().find(of_session) {
                        Some(machine) => (machine.clone(), Life::Failed(chain(&error))),
                        None => continue,
                    }
                }
            };
            let mut vm = Guest::new(name, &self.confinement);
            vm.life = life;
            self.put(vm);
        }
    }

    /// Returns the configuration's description of a VM whose own cannot be read; else what is known of it.
    fn machine_of(&self, name: &VmName, held: &Held) -> Machine {
        let configured = self.config.machines.iter().find(|machine| machine.name == *name);
        configured.cloned().unwrap_or_else(|| Machine {
            name: name.clone(),
            ram_bytes: held
                .files()
                .iter()
                .filter(|f| f.kind == FileKind::Ram)
                .map(|f| f.bytes)
                .sum(),
            cpus: 0,
            cpu: CpuModel::default(),
            boot: Boot::Disk(DiskBoot::default()),
            devices: Vec::new(),
        })
    }

    /// Takes the files of preserved VMs out of the last host's sessions, as far as they have to leave them to go to
    /// `destiny`. Errors if something cannot be taken now.
    pub(super) fn settle(&mut self, destiny: Destiny) -> Result<(), HostError> {
        if destiny != Destiny::Stay {
            self.end_late(None);
        }
        if let Err(error) = self.reach_again() {
            // The next host may reach them.
            tracing::error!("{}", chain(&error).join(": "));
        }
        self.look_again()?;
        if destiny != Destiny::Stay {
            self.find_orphans()?;
        }
        let Some(luo) = origin(&self.last_host, &self.luo) else { return Ok(()) };
        // Sessions that outlive this process protect the VMs from its end. They need not move to stay or to go.
        let stays = luo.backend().outlives_process() && destiny != Destiny::NextProgram;
        let of_vms = self.vms.iter_mut().filter_map(|vm| match &mut vm.life {
            Life::Preserved { held, .. } => Some(held),
            _ => None,
        });
        let (leaving, mut failed) = (destiny != Destiny::Stay, None);
        for held in of_vms.chain(&mut self.carried.sessions) {
            let taken = held.collect(luo, leaving);
            if let Err(source) = taken.and_then(|()| if stays { Ok(()) } else { held.release() }) {
                failed =
                    failed.or(Some(HostError::NotHeld { what: held.name().to_string(), source }));
            }
        }
        self.carried.programs.retain_mut(|program| match program.take(luo, stays) {
            Err(error) if leaving => {
                let why = chain(&error).join(": ");
                tracing::warn!("{} is lost: {why}", program.describe());
                false
            }
            Err(source) => {
                let what = program.describe();
                failed.get_or_insert(HostError::NoProgramNow { what, source });
                true
            }
            Ok(()) => true,
        });
        let session = self.last_host.session.as_ref();
        for unread in self.carried.manifests.iter_mut().filter(|unread| unread.fd.is_none()) {
            // What it says is of interest when a VM is restored.
            let _ = unread.read(session);
            if unread.fd.is_none() && session.is_some() && (unread.may_pass || !leaving) {
                failed = failed.or(Some(HostError::NoManifest { why: unread.why.join(": ") }));
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if !stays {
            self.finish_last_host();
            self.last_host.keeper = None;
        }
        Ok(())
    }

    /// Finishes the last host's session: nothing of it can come any more. Redeems the ticket before: until then a host that
    /// is started again finds all VMs that did not run yet, and after the end of the session it would miss them.
    fn finish_last_host(&mut self) {
        let Some(session) = self.last_host.session.take() else { return };
        if self.last_host.keeper.is_none() {
            self.kernel_entry.redeem();
        }
        self.unfinished.extend(finish(session));
    }

    /// Whether this host could not reach the pool with the VMs of the last kernel.
    pub(super) fn is_out_of_reach(&self) -> bool {
        self.kernel_entry.ticket().is_some()
            && self.luo.as_ref().is_err_and(|none| none.may_hold_vms)
    }

    /// Looks again for the pool with the VMs of the last kernel, if this host could not reach it, and for whatever may
    /// have them, if this host does not know how its kernel was entered. Errors if it still cannot.
    pub(super) fn reach_again(&mut self) -> Result<(), HostError> {
        self.reach_again_by(backend::choose)
    }

    /// The same, by this way to choose a LUO.
    fn reach_again_by(
        &mut self,
        choose: impl FnOnce(&HostSection, &[Machine], Expect) -> ChosenLuo,
    ) -> Result<(), HostError> {
        let was_unread = self.kernel_entry.is_unread();
        if was_unread && self.replaced.is_some() {
            self.choose_late(choose);
            return Ok(());
        }
        if was_unread {
            let read = self.kernel_entry.read_again();
            read.map_err(|error| HostError::NotSeen { why: chain(&error).join(": ") })?;
        }
        if !was_unread && !self.is_out_of_reach() {
            return Ok(());
        }
        let expect = self.kernel_entry.expect();
        let (luo, look) = start::look_into(self.choose_by(choose), expect);
        self.luo = luo;
        match &self.luo {
            Err(none) if none.may_hold_vms => Err(HostError::NotSeen { why: none.why.clone() }),
            // A host that began to hand over may have ended before it left anything.
            _ if (was_unread || self.kernel_entry.is_noted()) && matches!(look, Ok(None)) => {
                self.begin_cold(&look);
                Ok(())
            }
            _ => self.see_late(look),
        }
    }

    /// Chooses a LUO by this way, and by what the kernel's command line says.
    fn choose_by(
        &self,
        choose: impl FnOnce(&HostSection, &[Machine], Expect) -> ChosenLuo,
    ) -> ChosenLuo {
        let section = HostSection { pool: self.pool.clone(), ..self.config.host.clone() };
        choose(&section, &self.config.machines, self.kernel_entry.expect())
    }

    /// Chooses the LUO of a host that could not read the command line after a handover. What the handover has brought is here
    /// already, so the LUO is for the next update, and an error is only logged.
    fn choose_late(&mut self, choose: impl FnOnce(&HostSection, &[Machine], Expect) -> ChosenLuo) {
        match self.kernel_entry.read_again() {
            Ok(()) => self.luo = self.choose_by(choose),
            Err(error) => tracing::error!("{}", chain(&error).join(": ")),
        }
    }

    /// Chooses a LUO for an update, if this host could not do so after a handover.
    pub(super) fn choose_for_update(&mut self) {
        if self.kernel_entry.is_unread() && self.replaced.is_some() {
            self.choose_late(backend::choose);
        }
    }

    /// Boots the VMs that were withheld: nothing was left of them, as this host finds only now.
    fn begin_cold(&mut self, look: &Look) {
        let replaced =
            if self.kernel_entry.is_noted() { Replaced::Program } else { Replaced::Kernel };
        let lost = start::lost(replaced, &self.kernel_entry, &self.luo, look);
        self.last_host.lost = lost.map(|why| (replaced, why));
        let withheld = (0..self.vms.len()).filter(|index| self.vms[*index].is_withheld());
        let withheld: Vec<usize> = withheld.collect();
        withheld.iter().for_each(|index| self.vms[*index].life = Life::Stopped);
        for index in withheld {
            if let Ok(luo) = &self.luo {
                forget_leftovers(luo.as_ref(), &self.vms[index].machine.name);
            }
            if let Some(life) = self.left_in_luo(&self.vms[index].machine.clone()) {
                self.vms[index].life = life;
                continue;
            }
            // One that an operator has booted since may have its disk.
            match self.check_claims(index) {
                Ok(()) => self.vms[index].boot_at_start(),
                Err(error) => {
                    let why = chain(&error);
                    tracing::error!("{}", why.join(": "));
                    self.vms[index].did_not_boot(why);
                }
            }
        }
        self.redeem_if_none_is_withheld();
        // Until now the report said that they are preserved.
        self.report = report::kept(&self.config.host);
        self.report_unread();
    }

    /// Looks again at what the last host left, if it could not be read. Errors if it still cannot.
    pub(super) fn look_again(&mut self) -> Result<(), HostError> {
        if self.last_host.unseen.is_none() {
            return Ok(());
        }
        let look = match (self.last_host.session.take(), origin(&self.last_host, &self.luo)) {
            (Some(session), _) => arrival::read(session).map(Some),
            (None, Some(luo)) => arrival::look(luo),
            (None, None) => return Ok(()),
        };
        if let Ok(None) = look {
            // It has ended without this host, so there is nothing to wait for.
            self.last_host.unseen = None;
            self.withhold_none();
            return Ok(());
        }
        self.see_late(look)
    }

    /// Takes over what the last host left, after a look that failed before. VMs that were withheld and that it did not
    /// leave can be booted.
    fn see_late(&mut self, look: Look) -> Result<(), HostError> {
        if !self.see(look) {
            let why = self.last_host.unseen.iter().flatten().cloned().collect::<Vec<_>>();
            return Err(HostError::NotSeen { why: why.join(": ") });
        }
        self.withhold_none();
        self.apply_policies();
        Ok(())
    }

    /// Tries again to read the manifests that could not be read, and finds in them the entries of preserved VMs.
    pub(super) fn read_manifests(&mut self) {
        let session = self.last_host.session.as_ref();
        let mut read = Vec::new();
        self.carried.manifests.retain_mut(|unread| match unread.read(session) {
            Some(manifest) => {
                read.push(manifest);
                false
            }
            None => true,
        });
        for vm in &mut self.vms {
            if let Life::Preserved { held, entry: entry @ None, .. } = &mut vm.life
                && let Some(found) = entry_of(&held.indexed(), &read)
            {
                vm.machine = found.machine.clone();
                *entry = Some(Box::new(found));
            }
        }
    }

    /// Lets go of a preserved VM's session, even if it could not be retrieved until now.
    pub(super) fn give_up_preserved(&mut self, name: &VmName) {
        let Some(luo) = origin(&self.last_host, &self.luo) else { return };
        let Ok(vm) = find(&mut self.vms, name) else { return };
        if let Life::Preserved { held, .. } = &mut vm.life
            && let Err(error) = held.retrieve(luo)
        {
            tracing::warn!("{error}");
        }
    }

    /// Finishes what nobody needs any more: the last host's session and its manifests, when no VM is preserved. Tries
    /// again to finish the unfinished sessions.
    pub(super) fn finish_the_rest(&mut self) {
        self.choose_programs();
        let is_opaque = |vm: &Guest| matches!(vm.life, Life::Preserved { entry: None, .. });
        if !self.vms.iter().any(is_opaque) {
            self.carried.manifests.clear();
        }
        let withheld = self.vms.iter().filter(|vm| vm.is_withheld()).count();
        if self.last_host.unseen.is_some() && (withheld > 0 || self.vms.is_empty()) {
            return;
        }
        // What is still in a LUO that nobody has looked into can come yet, and be given up then.
        let is_gone = self.kernel_entry.ticket().is_some() || self.last_host.session.is_some();
        self.stop_waiting(is_gone);
        if !self.vms.iter().any(is_preserved) && self.carried.sessions.is_empty() {
            self.finish_last_host();
        }
        let sessions = std::mem::take(&mut self.unfinished);
        self.unfinished = sessions.into_iter().filter_map(finish).collect();
    }

    /// Waits no more for what the last host left, if it could not be read. `is_gone` says that nothing of that can come.
    fn stop_waiting(&mut self, is_gone: bool) {
        let waited = self.last_host.unseen.take().is_some();
        if waited && is_gone && self.last_host.keeper.is_none() {
            self.kernel_entry.redeem();
        }
    }

    /// Lets go of the programs of earlier hosts that nobody needs.
    fn choose_programs(&mut self) {
        let needs = |vm: &Guest| match &vm.life {
            // What it saves, its program can read.
            Life::Live(live) => live.program.is_some(),
            _ => is_preserved(vm),
        };
        programs::choose(&mut self.carried.programs, self.vms.iter().any(needs));
    }

    /// Leaves everything in the fd store as it is, if what the last host left still cannot be read. The documents of this
    /// host would replace those of the last one, which have the same names. Returns whether that is so.
    pub(super) fn leave_unseen(&mut self) -> bool {
        if self.last_host.unseen.is_none() {
            return false;
        }
        tracing::error!(
            "what the last host left stays in the fd store as it is, for a host that can read it: nothing else is put there"
        );
        for vm in self.vms.iter().filter(|vm| vm.is_live()) {
            tracing::error!("VM `{}` was booted since and ends with this host", vm.machine.name);
        }
        self.leave_in_store();
        true
    }

    /// Stores the documents again that name the preserved VMs. An attempt to leave has replaced them by its own, which
    /// were removed when it was undone.
    pub(super) fn put_back(&self) {
        if let Some(Err(error)) = self.last_host.session.as_ref().map(Incoming::put_back) {
            tracing::error!("{}", chain(&error).join(": "));
        }
    }

    /// Leaves preserved VMs in sessions that outlive this process, which is about to end.
    pub(super) fn leave_in_store(&mut self) {
        self.put_back();
        self.end_late(None);
        self.give_up_restores(None);
        for vm in &mut self.vms {
            if let Life::Preserved { .. } = vm.life {
                std::mem::forget(std::mem::replace(&mut vm.life, Life::Stopped));
            }
        }
        std::mem::forget(std::mem::take(&mut self.carried.sessions));
        std::mem::forget(std::mem::take(&mut self.carried.programs));
        std::mem::forget(self.last_host.session.take());
    }
}

/// Returns a session's name and files. `None`, and a line in the log, if no LUO can have a session of that name.
fn named(session: IndexedSession) -> Option<(SessionName, Vec<IndexedFile>)> {
    let IndexedSession { name, files } = session;
    let name = SessionName::new(name).map_err(|error| tracing::error!("{error}")).ok()?;
    Some((name, files))
}

/// Retrieves a session. Errors if there is no such session; any other failure may pass.
fn hold(
    luo: &dyn Orchestrator,
    name: SessionName,
    files: Vec<IndexedFile>,
) -> Result<Held, (SessionName, luo::Error)> {
    let mut held = Held::unretrieved(name, files);
    match held.retrieve(luo) {
        Err(error) if error.is_not_found() => Err((held.name().clone(), error)),
        _ => Ok(held),
    }
}

/// Finishes a session. Returns the session if that failed.
pub(super) fn finish(session: Incoming) -> Option<Incoming> {
    session
        .finish()
        .map_err(|failure| {
            tracing::error!("{}", chain(&failure.error).join(": "));
            failure.session
        })
        .err()
}

#[cfg(test)]
mod tests;
