//! Restores of preserved VMs that a client has asked for. The main loop serves all else meanwhile.
//!
//! ```text
//!   restore                     begin --> Restoring --> live
//!   recover --with previous     look for a program that fits --> begin --> Restoring --> live
//!                                                     \--------------\---error, late---> preserved, as before
//! ```
//!
//! A restore has what the host held of the VM. So before the host ends, or leaves its VMs to another one, every restore is
//! given up, and the host holds the VM again.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use luo::Orchestrator;
use luo::builtin::keeper::Keeper;

use super::arrival::{finish, origin};
use super::defects::guard;
use super::{Host, HostError, find, index_of, mounts};
use crate::causes::chain;
use crate::guests::answers::readable;
use crate::guests::elsewhere::Elsewhere;
use crate::guests::{Guest, GuestError, Life};
use crate::link::MissingHints;
use crate::live_update::breakpoint;
use crate::live_update::incoming::{RestoredVm, Restoring, RestoringNext, restore_again};
use crate::live_update::next_host::NextHost;
use crate::machine::VmName;
use crate::open_files::{ReserveInUse, use_reserve};

/// How long an update that was undone waits for a VM that it has to restore. The restore goes on after that.
const UNDONE_WITHIN: Duration = Duration::from_secs(20);

/// What has begun when a VM was to be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// Its restore.
    Restore,
    /// Its boot: nothing was left of it, because no live update entered this kernel.
    Boot,
}

/// The restores that go on.
#[derive(Default)]
pub(super) struct Restores {
    /// What keeps a guest must not fail because other VMs have all the files.
    begun: Vec<(Restoring, ReserveInUse)>,
    /// VMs whose last process still has their disks.
    pub(super) awaited: Vec<VmName>,
    /// VMs for which a program of an earlier host is looked for.
    looks: Vec<(VmName, Elsewhere<Result<NextHost, HostError>>)>,
    /// Why no program was found, until the client is told.
    failed: Vec<(VmName, HostError)>,
}

impl Restores {
    fn has(&self, name: &VmName) -> bool {
        self.begun.iter().any(|(vm, _)| vm.name() == name) || self.is_to_begin(name)
    }

    /// Whether a restore of this VM begins when something else has ended.
    fn is_to_begin(&self, name: &VmName) -> bool {
        self.awaited.contains(name) || self.is_looking_for(name)
    }

    fn is_looking_for(&self, name: &VmName) -> bool {
        self.looks.iter().any(|(vm, _)| vm == name)
    }

    /// Whether threads of this process wait for programs that they have started.
    pub(super) fn asks_programs(&self) -> bool {
        !self.looks.is_empty()
    }

    /// What becomes readable when one of them can go on.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let looks = self.looks.iter().map(|(_, look)| look.as_fd());
        self.begun.iter().map(|(vm, _)| vm.as_fd()).chain(looks)
    }

    /// Returns when the first one is late.
    pub(super) fn due(&self) -> Option<Instant> {
        self.begun.iter().map(|(vm, _)| vm.deadline()).min()
    }
}

impl Host {
    /// Errors if a command is being carried out for this VM.
    pub(super) fn check_free(&self, name: &VmName) -> Result<(), GuestError> {
        match self.restores.is_to_begin(name) {
            true => Err(GuestError::Busy { name: name.clone(), done: "restored" }),
            false => self.vms[index_of(&self.vms, name)?].check_free(),
        }
    }

    /// Begins to restore a preserved VM, or looks again for one that is withheld because what the last host left could
    /// not be read. `force` continues its guest also if the host lacks hints of the guest's CPUID, or if something has
    /// written to its disks while it was preserved.
    pub(super) fn begin_restore(&mut self, name: &VmName, force: bool) -> Result<Begun, HostError> {
        self.check_free(name)?;
        self.begin_restore_with(name, force, None)
    }

    /// The same, by a process of another program.
    fn begin_restore_with(
        &mut self,
        name: &VmName,
        force: bool,
        program: Option<&NextHost>,
    ) -> Result<Begun, HostError> {
        let reserve = use_reserve();
        mounts::try_again(&mut self.unmounted);
        let hints = if force { MissingHints::Accept } else { self.config.host.missing_hints };
        // What a handover has brought is here already.
        let is_unread = self.kernel_entry.is_unread() && self.replaced.is_none();
        let index = index_of(&self.vms, name)?;
        let is_unseen = self.last_host.unseen.is_some() || self.vms[index].is_withheld();
        if is_unread || is_unseen || self.is_out_of_reach() {
            self.reach_again()?;
            self.look_again()?;
            if let Err(error) = self.find_orphans() {
                // Perhaps about another VM.
                tracing::error!("{}", chain(&error).join(": "));
            }
            self.begin_awaited();
            return self.found_late(name);
        }
        self.end_late(Some(name));
        let vm = &mut self.vms[index];
        let Life::Preserved { held, .. } = &mut vm.life else {
            let remedy = "only a preserved VM can be restored";
            let name = name.clone();
            return Err(GuestError::WrongState { name, state: vm.state(), remedy }.into());
        };
        if let Some(luo) = origin(&self.last_host, &self.luo) {
            let not_held = |source| HostError::NotHeld { what: name.to_string(), source };
            held.retrieve(luo).map_err(not_held)?;
        }
        if !force {
            self.kept_disks.check_unchanged(name)?;
        }
        self.read_manifests();
        self.complete_orphan(index);
        let vm = &mut self.vms[index];
        let left = match std::mem::replace(&mut vm.life, Life::Stopped) {
            Life::Preserved { held, entry: Some(entry), why } => {
                vm.life = Life::Restoring(why);
                (held, *entry)
            }
            life => {
                vm.life = life;
                return self.still_preserved(index).map(|()| Begun::Restore);
            }
        };
        self.kept_disks.release(name);
        // Without LUO, the VM came in a keeper's sessions, so its RAM is memfds, as a new keeper makes.
        let own = Keeper::start();
        let luo: &dyn Orchestrator = self.luo.as_deref().unwrap_or(&own);
        match restore_again(luo, left, &self.confinement, hints, program) {
            Ok(restoring) => {
                self.restores.begun.push((restoring, reserve));
                Ok(Begun::Restore)
            }
            Err(vm) => {
                self.put_restored(*vm);
                self.still_preserved(index).map(|()| Begun::Restore)
            }
        }
    }

    /// Returns what has become of a VM that was withheld, after a look at what the last host left.
    pub(super) fn found_late(&self, name: &VmName) -> Result<Begun, HostError> {
        let index = index_of(&self.vms, name)?;
        self.still_preserved(index)?;
        let (vm, name) = (&self.vms[index], name.clone());
        match (&vm.life, &self.last_host.lost) {
            (Life::Stopped, Some((_, why))) if vm.boots_at_start() => {
                Err(GuestError::LostAndBoots { name, why: why.join(": ") }.into())
            }
            (Life::Stopped, None) if vm.boots_at_start() => Ok(Begun::Boot),
            (Life::Stopped, _) => Err(GuestError::NothingLeft(name).into()),
            (Life::Withheld(why), _) => {
                Err(GuestError::StillPreserved { name, why: why.join(": ") }.into())
            }
            _ => Ok(Begun::Restore),
        }
    }

    /// Begins to look for a program of an earlier host, by which the VM is restored then.
    pub(super) fn begin_look(
        &mut self,
        name: &VmName,
        look: Elsewhere<Result<NextHost, HostError>>,
    ) {
        self.restores.looks.push((name.clone(), look));
    }

    /// Restores a preserved VM as soon as the host waits for its last process no longer.
    pub(super) fn restore_when_gone(&mut self, name: &VmName) {
        self.restore_soon(name);
        self.begin_awaited();
    }

    /// The same from the next [`begin_awaited`](Self::begin_awaited) on.
    pub(super) fn restore_soon(&mut self, name: &VmName) {
        self.restores.awaited.push(name.clone());
    }

    /// Begins the restores of VMs whose last process has ended.
    pub(super) fn begin_awaited(&mut self) {
        // One at a time, here and below, so that a defect in one costs no other.
        for _ in 0..self.restores.awaited.len() {
            let name = self.restores.awaited.remove(0);
            if find(&mut self.vms, &name).is_ok_and(|vm| !vm.is_let_go()) {
                self.restores.awaited.push(name);
            } else if let Err(error) = self.begin_restore(&name, false) {
                tracing::error!("VM `{name}` stays preserved: {}", chain(&error).join(": "));
            }
        }
    }

    /// Takes the restores on as far as they are ready now.
    pub(super) fn go_on_with_restores(&mut self) {
        self.begin_awaited();
        for _ in 0..self.restores.looks.len() {
            let (name, look) = self.restores.looks.remove(0);
            let begun = match look.take() {
                None => {
                    self.restores.looks.push((name, look));
                    continue;
                }
                Some(Ok(found)) => found.and_then(|program| {
                    self.begin_restore_with(&name, false, Some(&program)).map(drop)
                }),
                Some(Err(panicked)) => Err(HostError::NoFitProgram { why: panicked.to_string() }),
            };
            if let Err(error) = begun {
                self.restores.failed.push((name, error));
            }
        }
        let fds: Vec<_> = self.restores.begun.iter().map(|(vm, _)| vm.as_fd()).collect();
        let ready = readable(&fds, Instant::now());
        for index in 0..self.restores.begun.len() {
            let (vm, reserve) = self.restores.begun.remove(0);
            let name = vm.name().clone();
            let went_on = guard(|| {
                breakpoint::reach("restoring", Some(&name));
                match vm.go_on(ready.contains(&index), &self.confinement) {
                    RestoringNext::Waits(vm) => self.restores.begun.push((vm, reserve)),
                    RestoringNext::Ended(vm) => self.put_restored(*vm),
                }
            });
            if went_on.is_none() {
                self.lose_restoring(&name);
            }
        }
    }

    /// Fails a VM whose restore a defect has ended: nothing is left of what the host held.
    fn lose_restoring(&mut self, name: &VmName) {
        if let Ok(vm) = find(&mut self.vms, name)
            && let Life::Restoring(_) = vm.life
        {
            vm.life = Life::Failed(vec!["a defect of this host has ended its restore".to_owned()]);
            self.update_report(name);
        }
    }

    /// Returns what has become of the restore of a VM. `None` if it goes on.
    pub(super) fn end_of_restore(&mut self, name: &VmName) -> Option<Result<(), HostError>> {
        if self.restores.has(name) {
            return None;
        }
        if let Some(index) = self.restores.failed.iter().position(|(vm, _)| vm == name) {
            return Some(Err(self.restores.failed.remove(index).1));
        }
        Some(self.is_restored(name))
    }

    fn is_restored(&self, name: &VmName) -> Result<(), HostError> {
        let index = index_of(&self.vms, name)?;
        self.still_preserved(index)?;
        let vm = &self.vms[index];
        match &vm.life {
            Life::Live(_) => Ok(()),
            Life::Failed(why) => {
                Err(GuestError::Lost { name: name.clone(), why: why.join(": ") }.into())
            }
            _ => Err(vm.dropped("restored").into()),
        }
    }

    /// Restores a preserved VM of an update that was undone. Waits for that, but not for long: the restore goes on if it
    /// takes longer.
    pub(super) fn restore_now(&mut self, name: &VmName) -> Result<(), HostError> {
        let deadline = Instant::now() + UNDONE_WITHIN;
        self.wait_until_let_go(name, deadline);
        self.begin_restore(name, false)?;
        loop {
            if let Some(ended) = self.end_of_restore(name) {
                return ended;
            }
            if Instant::now() >= deadline {
                let why = format!("it is not restored after {UNDONE_WITHIN:?}, and still may be");
                return Err(GuestError::StillPreserved { name: name.clone(), why }.into());
            }
            readable(&self.restores.fds().collect::<Vec<_>>(), deadline);
            self.go_on_with_restores();
        }
    }

    /// Waits until the VM's last process has ended, or the host waits for it no longer.
    fn wait_until_let_go(&mut self, name: &VmName, deadline: Instant) {
        while let Ok(vm) = find(&mut self.vms, name)
            && !vm.is_let_go()
            && Instant::now() < deadline
        {
            readable(&vm.ending_fds().collect::<Vec<_>>(), deadline);
            vm.note_ends();
        }
    }

    /// Gives up the restores of this VM or of all: the VMs are preserved as before.
    pub(super) fn give_up_restores(&mut self, vm: Option<&VmName>) {
        let is_meant = |name: &VmName| vm.is_none_or(|vm| vm == name);
        self.restores.looks.retain(|(name, _)| !is_meant(name));
        self.restores.awaited.retain(|name| !is_meant(name));
        for _ in 0..self.restores.begun.len() {
            let (restoring, reserve) = self.restores.begun.remove(0);
            match is_meant(restoring.name()) {
                true => self.put_restored(restoring.give_up(&self.confinement)),
                false => self.restores.begun.push((restoring, reserve)),
            }
        }
    }

    /// Puts a VM in its place that is live, lost or still preserved after an attempt to restore it.
    fn put_restored(&mut self, RestoredVm { vm: restored, session, .. }: RestoredVm) {
        let name = restored.machine.name.clone();
        let Ok(vm) = find(&mut self.vms, &name) else { return };
        *vm = restored;
        vm.follow(&self.config);
        self.unfinished.extend(session.and_then(finish));
        self.finish_the_rest();
        self.update_report(&name);
    }

    /// Errors if the VM is still preserved.
    fn still_preserved(&self, index: usize) -> Result<(), HostError> {
        let vm: &Guest = &self.vms[index];
        let Life::Preserved { why, .. } = &vm.life else { return Ok(()) };
        let (name, why) = (vm.machine.name.clone(), why.join(": "));
        Err(GuestError::StillPreserved { name, why }.into())
    }
}
