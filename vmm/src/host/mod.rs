//! `perennial host`: owns the LUO device, every session, the VMs, the API and the live update.
//!
//! ```text
//!   start: modules, mounts -> LUO -> manifest? --no--> cold: boot the VMs of the configuration
//!                                |         \--yes-> restore and resume its VMs, then finish their sessions
//!                                \--unreachable, and VMs may be there--> start none of them
//!   then:  serve the API, watch the VMs, reap; until power-off, or a live update that jumps
//! ```
//!
//! After a handover, the host starts as after a live update: it finds the manifest with the keeper that
//! it inherits, or in the pool.
//!
//! One thread does all of this in one loop, so no other command runs during a live update.

pub mod alone;
mod arrival;
pub mod backend;
mod boots;
mod clients;
mod defects;
pub mod dhcp;
mod errands;
mod error;
mod events;
pub mod format;
#[cfg(test)]
mod frozen;
pub mod init;
mod instance;
mod kept_disks;
pub mod kernel_entry;
pub mod kvm_pages;
mod late;
mod limits;
pub mod modules;
mod mounts;
mod network;
mod orphans;
mod port;
mod preflight;
mod recover;
pub mod rehearsal;
mod rehearsals;
mod report;
mod restores;
mod saved;
mod serve;
pub mod service;
mod service_stop;
mod start;
mod status;
mod stop;
mod survival;
mod waits;
mod watchdog;

pub use error::HostError;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use luo::builtin::keeper::Keeper;
use luo::{Incoming, Orchestrator};
use signal_hook::consts::SIGTERM;

use crate::api::UpdateCall;
use crate::api::report::{Replaced, Report};
use crate::causes::chain;
use crate::config::{self, Config, HostSection};
use crate::guests::confinement::Confinement;
use crate::guests::ram::{self, RamSource};
use crate::guests::{Guest, GuestError, Life};
use crate::link::Event;
use crate::live_update::arrival::{Arrival, NotSeen};
use crate::live_update::breakpoint;
use crate::live_update::carry::Carried;
use crate::live_update::incoming::Late;
use crate::live_update::next_host::{self, Left, NextHost};
use crate::live_update::next_kernel::{self, Files, Loaded, NextKernel};
use crate::live_update::outgoing::Destination;
use crate::live_update::rehearsal::Rehearsal;
use crate::live_update::{Observer, Step, UpdateError, outgoing, pass_on};
use crate::look;
use crate::machine::VmName;
use crate::machine::claims::{Claims, FilesSeen};
use crate::{open_files, signals};
use arrival::{Destiny, LastHost};
use backend::{ChosenLuo, NoLuo};
use defects::guard;
use instance::Instance;
use kept_disks::KeptDisks;
use kernel_entry::KernelEntry;
use mounts::Unmounted;
use restores::Restores;
use watchdog::Watchdog;

/// Path of the configuration in the image of a Perennial host.
pub const IMAGE_CONFIG: &str = "/etc/perennial.toml";
/// API socket of a host whose configuration cannot be used.
pub const DEFAULT_SOCKET: &str = "/run/perennial.sock";
/// How long a handover waits for the configuration file.
const CONFIG_WITHIN: Duration = Duration::from_secs(2);
/// Control port of a host whose configuration cannot be used.
pub const DEFAULT_CONTROL_PORT: &str = "perennial.control";

/// The host's state.
pub struct Host {
    config: Config,
    config_text: String,
    /// The file from which the next program reads its configuration. `None` for `perennial run`.
    config_path: Option<PathBuf>,
    config_error: Option<Vec<String>>,
    unmounted: Vec<Unmounted>,
    luo: ChosenLuo,
    /// Directory of the pool in this host's own configuration, even if `config` is the old host's.
    pool: Option<PathBuf>,
    kernel_entry: KernelEntry,
    vms: Vec<Guest>,
    confinement: Arc<Confinement>,
    /// What was replaced to start this host: kernel or program. `None` after a cold boot.
    replaced: Option<Replaced>,
    number: u32,
    report: Option<Report>,
    /// Sessions that could not be finished.
    unfinished: Vec<Incoming>,
    /// What is left of the last host's sessions.
    last_host: LastHost,
    /// What may still become of preserved VMs that were late.
    late: Vec<Late>,
    /// Restores that clients have asked for.
    restores: Restores,
    /// The disks of VMs that are preserved or withheld.
    kept_disks: KeptDisks,
    /// What this host carries on without knowing what it is.
    carried: Carried,
    /// The next kernel, which systemd was asked to enter. Kept so that its image stays loaded; the image
    /// outlives this process.
    next: Option<Loaded>,
    /// VMs that the live update which systemd was asked for leaves out.
    left_out: Vec<VmName>,
    /// The rehearsal that runs.
    rehearsal: Option<Rehearsal>,
    /// The files of the next kernel that were rehearsed, while the update to them is carried out.
    rehearsed: Option<Files>,
    started_ticks: u64,
    /// Whether this is the host of `perennial run`, which ends with its VM.
    is_alone: bool,
    /// Says that a host runs on this machine. `None` if that cannot be said, and for `perennial run`.
    instance: Option<Instance>,
    /// The hardware watchdog. It is stopped when this is dropped: when the host ends on purpose.
    watchdog: Option<Watchdog>,
}

/// The VMs that the last kernel or the last host left, before they are resumed.
struct Found {
    arrival: Look,
    keeper: Option<Keeper>,
}

/// What is known of the last host: nothing after a cold boot, and an error while it cannot be read.
type Look = Result<Option<Arrival>, NotSeen>;

impl Host {
    /// Reads the configuration, chooses a LUO, and looks for the VMs that the last kernel, or the last host
    /// of this process, left. As PID 1, loads modules and mounts file systems first. Starts no VM.
    fn look(
        config_path: &Path,
        started_ticks: u64,
        left: Option<Left>,
    ) -> Result<(Self, Found), HostError> {
        let replaced = match left {
            Some(_) => Replaced::Program,
            None => Replaced::Kernel,
        };
        let (sessions, lock) = left.map_or((None, None), |left| (Some(left.sessions), left.lock));
        let (text, parsed) = Config::read_with_text(config_path);
        // The VMs of a pool can be found only through the pool, so `[host]` is used even if the rest of
        // the configuration is wrong.
        let section = match &parsed {
            Ok(config) => config.host.clone(),
            Err(_) => HostSection::salvage(&text),
        };
        let goes_on = init::is_pid_1() || replaced == Replaced::Program;
        let instance = start::lock(&section, lock, goes_on)?;
        if replaced == Replaced::Program {
            next_host::end_old_vm_processes();
        }
        let inherited = start::inherit(sessions);
        breakpoint::reach("look", None);
        let machines = parsed.as_ref().map_or(&[][..], |config| &config.machines);
        let kernel_entry =
            KernelEntry::read_patiently(Path::new("/"), inherited.ticket, section.lock.as_deref());
        let fresh = matches!(&kernel_entry, Ok(e) if e.ticket().is_none());
        let is_first = replaced == Replaced::Kernel;
        if let Some(ticket) = inherited.ticket {
            // The last host may have had another lock, which names another place for notes.
            kernel_entry.iter().for_each(|entry| entry.note_arrival(ticket));
        }
        let mut unprepared = start::prepare(&section, fresh && is_first, is_first);
        let (kernel_entry, luo, arrival) =
            start::find_vms(&section, machines, kernel_entry, inherited.keeper.as_ref());
        let replaced = match kernel_entry.is_handed_over() {
            true => Replaced::Program,
            false => replaced,
        };
        let lost = start::lost(replaced, &kernel_entry, &luo, &arrival);
        let (config, config_text, config_error) = start::choose_config(text, parsed, &arrival)?;
        if config_error.is_some() && unprepared.is_empty() {
            unprepared = start::prepare(&config.host, false, false);
        }
        // A missing module or mount does not stop the start. A VM that needs it reports an error.
        let wrong: Vec<String> =
            config_error.into_iter().flatten().chain(unprepared.errors).collect();
        let config_error = (!wrong.is_empty()).then_some(wrong);
        // An earlier report would say that VMs run which are lost or cannot be read now.
        let has_news = lost.is_some() || !matches!(arrival, Ok(None));
        let kept_report = if has_news { None } else { report::kept(&section) };
        let lost = lost.map(|why| (replaced, why));
        let host = Self {
            confinement: Confinement::among_others(&config.host),
            config,
            config_text,
            config_path: Some(config_path.to_owned()),
            config_error,
            unmounted: unprepared.unmounted,
            luo,
            pool: section.pool,
            kernel_entry,
            vms: Vec::new(),
            replaced: (!matches!(arrival, Ok(None))).then_some(replaced),
            number: 0,
            report: kept_report,
            unfinished: Vec::new(),
            last_host: LastHost::new(lost),
            late: Vec::new(),
            restores: Restores::default(),
            kept_disks: KeptDisks::default(),
            carried: Carried::default(),
            next: None,
            left_out: Vec::new(),
            rehearsal: None,
            rehearsed: None,
            watchdog: None,
            started_ticks,
            is_alone: false,
            instance,
        };
        Ok((host, Found { arrival, keeper: inherited.keeper }))
    }

    /// Offers the API. If that fails, a host that has VMs, or is PID 1, goes on, and listens where the last host
    /// did, or at [`DEFAULT_SOCKET`].
    fn listen(&mut self, server: &mut serve::Server, found: &Found) -> Result<(), HostError> {
        let Err(error) = server.listen(&self.config.host) else { return Ok(()) };
        let holds = matches!(&self.luo, Err(none) if none.may_hold_vms);
        let cold = matches!(found.arrival, Ok(None));
        if !(init::is_pid_1() || !cold || holds) {
            return Err(error);
        }
        let why = chain(&error);
        tracing::error!("{}", why.join(": "));
        self.config_error.get_or_insert_default().extend(why);
        let old = start::config_of_old_host(&found.arrival);
        let old = old.and_then(|text| Config::parse(text).ok()?.host.socket);
        for socket in old.into_iter().chain([DEFAULT_SOCKET.into()]) {
            let section = HostSection { socket: Some(socket), ..HostSection::default() };
            match server.listen(&section) {
                Ok(()) => break,
                Err(error) => tracing::error!("{}", chain(&error).join(": ")),
            }
        }
        Ok(())
    }

    fn vm(&mut self, name: &VmName) -> Result<&mut Guest, GuestError> {
        find(&mut self.vms, name)
    }

    /// Begins to boot a VM, because a client has asked for it.
    fn begin_boot(&mut self, name: &VmName) -> Result<(), GuestError> {
        mounts::try_again(&mut self.unmounted);
        let index = index_of(&self.vms, name)?;
        if !self.vms[index].is_live() {
            self.check_claims(index)?;
        }
        let ram = ram_beside(self.promised_to_rehearsal(), &self.luo, &self.vms, index);
        self.vms[index].boot_by_command(ram)
    }

    /// Errors if a VM that has a process or boots, or whose memory is kept, has a file of VM `index`.
    fn check_claims(&self, index: usize) -> Result<(), GuestError> {
        let others = self.vms.iter().enumerate().filter(|(other, _)| *other != index);
        let has_files = |vm: &Guest| {
            let is_at_rest = vm.is_at_rest() && vm.is_gone();
            !is_at_rest || !matches!(vm.life, Life::Stopped | Life::Failed(_))
        };
        let others = others.map(|(_, vm)| vm).filter(|vm| has_files(vm)).map(|vm| &vm.machine);
        let (vm, mut claims) = (&self.vms[index], Claims::default());
        let files = FilesSeen::of(others.clone().chain([&vm.machine]));
        for other in others {
            // What two others have is not this VM's matter.
            let _ = claims.add_files(other, &files);
        }
        claims.add_files(&vm.machine, &files).map_err(|source| vm.claimed(source))
    }

    /// Handles an event of the process of VM `index`, or the end of the process (`None`).
    fn on_event(&mut self, index: usize, event: Option<Event>) {
        let has_ended = match &event {
            Some(Event::Crashed(why)) => Some(why.as_str()),
            None => Some("its process ended"),
            Some(_) => None,
        };
        if has_ended.is_some_and(|why| self.restore_unresumed(index, why)) {
            return;
        }
        self.vms[index].on_event(event);
        self.boot_if_due(index);
    }

    /// Boots the VMs again whose time has come, and goes on with those that boot.
    fn boot_due(&mut self) {
        for index in 0..self.vms.len() {
            guard(|| self.boot_if_due(index));
        }
    }

    fn boot_if_due(&mut self, index: usize) {
        let vm = &self.vms[index];
        if vm.booting().is_some() || vm.boot_due().is_some_and(|due| due <= Instant::now()) {
            let ram = ram_beside(self.promised_to_rehearsal(), &self.luo, &self.vms, index);
            self.vms[index].boot_if_due(ram);
        }
    }

    /// Returns when the next VM boots again, or has failed to.
    fn next_boot(&self) -> Option<Instant> {
        self.vms.iter().filter_map(Guest::boot_due).min()
    }

    /// Gives every VM the policy and the priority that the configuration has for it.
    fn apply_policies(&mut self) {
        self.vms.iter_mut().for_each(|vm| vm.follow(&self.config));
    }

    /// Ends a VM at once. A withheld VM is marked as given up: no host restores its old state in this boot.
    fn pull(&mut self, name: &VmName) -> Result<(), HostError> {
        self.give_up_restores(Some(name));
        let vm = find(&mut self.vms, name)?;
        if let Life::Withheld(_) = vm.life {
            self.kernel_entry
                .give_up(name)
                .map_err(|source| HostError::GiveUp { name: name.clone(), source })?;
        }
        let was_preserved = matches!(vm.life, Life::Preserved { .. } | Life::Withheld(_));
        self.end_late(Some(name));
        self.give_up_preserved(name);
        find(&mut self.vms, name)?.stop();
        self.finish_the_rest();
        if was_preserved {
            self.kept_disks.give_up(name);
            self.update_report(name);
        }
        Ok(())
    }

    /// Enters a next kernel whose host may reach the VMs that this host cannot reach. Leaves the VMs
    /// untouched. Returns only on an error.
    fn pass_on(
        &self,
        none: &NoLuo,
        next: &NextKernel,
        stop_before: Option<Step>,
        observer: Observer<'_>,
    ) -> Result<std::convert::Infallible, HostError> {
        let Some(ticket) = self.kernel_entry.ticket_to_pass_on() else {
            return Err(HostError::NoLuo(none.clone()));
        };
        match self.kernel_entry.any_given_up() {
            Some(vm) => Err(HostError::GivenUp(vm)),
            None => pass_on::run(ticket, next, stop_before, observer).map_err(HostError::PassOn),
        }
    }

    /// Replaces the kernel: a live update. Returns only if it did not take place.
    fn update(
        &mut self,
        call: UpdateCall,
        observer: Observer<'_>,
    ) -> Result<std::convert::Infallible, HostError> {
        self.finish_the_rest();
        self.check_can_leave(&call.without)?;
        if let (true, Err(none)) = (self.is_alone, &self.luo) {
            // The reason, instead of what the call or the configuration lacks.
            return Err(HostError::NoLuo(none.clone()));
        }
        self.check_none_pending()?;
        self.settle(Destiny::NextKernel)?;
        let next = self.next_kernel(&call)?;
        let luo = match &self.luo {
            Ok(luo) => luo,
            Err(none) => return self.pass_on(none, &next, call.stop_before, observer),
        };
        let destination = Destination::Kernel { next, kept: self.kept_disks.shown() };
        let plan = outgoing::Plan {
            stop_before: call.stop_before,
            verify_frames: call.verify_frames,
            without: call.without,
            ..self.plan(destination, observer)
        };
        let left = outgoing::run(luo.as_ref(), &self.vms, &self.unfinished, &plan);
        left.map_err(|undone| HostError::Update(self.restore_saved(*undone)))
    }

    fn plan<'a>(
        &'a self,
        destination: Destination<'a>,
        observer: Observer<'a>,
    ) -> outgoing::Plan<'a> {
        let in_pool = self.luo.as_ref().is_ok_and(|luo| luo.backend().memory_is_dax_files());
        outgoing::Plan {
            destination,
            stop_before: None,
            verify_frames: false,
            without: self.left_out.clone(),
            budget: self.config.update.budget(),
            number: self.number + 1,
            config: self.config_text.clone(),
            pool: if in_pool { self.pool.clone() } else { None },
            carried: &self.carried,
            keeps_programs: true,
            observer,
        }
    }

    /// Returns the next kernel: the arguments of the call, completed from `[update]` of the configuration.
    fn next_kernel(&self, call: &UpdateCall) -> Result<NextKernel, HostError> {
        let defaults = &self.config.update;
        let kernel = call.kernel.as_ref().or(defaults.kernel.as_ref());
        let initramfs = call.initramfs.as_ref().or(defaults.initramfs.as_ref());
        Ok(NextKernel {
            kernel: kernel.ok_or(HostError::NothingToLoad("kernel"))?.clone(),
            initramfs: Some(initramfs.ok_or(HostError::NothingToLoad("initramfs"))?.clone()),
            cmdline: call.cmdline.as_ref().unwrap_or(&defaults.cmdline).clone(),
            forced: call.forced()?,
            rehearsed: self.rehearsed,
        })
    }

    /// Feeds the hardware watchdog of the configuration, unless it is fed already.
    fn feed_watchdog(&mut self) {
        if self.watchdog.is_none() {
            self.watchdog = survival::watchdog(&self.config.host);
        }
    }

    fn is_in_fd_store(&self) -> bool {
        self.luo.as_ref().is_ok_and(|luo| luo.backend().leaves_kexec_to_systemd())
    }

    /// Whether systemd performs the kexec of this update. An update that stops before a step is done here.
    fn is_left_to_systemd(&self, call: &UpdateCall) -> bool {
        self.is_in_fd_store() && call.stop_before.is_none()
    }

    /// Errors if systemd is about to enter the kernel that this host has loaded. The kernel holds one image: the next one
    /// would take its place, and be unloaded when its update is undone.
    fn check_none_pending(&self) -> Result<(), HostError> {
        match self.next.is_some() && service::is_kexec_pending() {
            true => Err(HostError::Pending),
            false => Ok(()),
        }
    }

    /// Takes all VMs along after all, unless the update that leaves some out takes place now: it may have been cancelled,
    /// and systemd stops only this service.
    fn forget_left_out(&mut self) {
        if self.left_out.is_empty() || service::is_ending() == Some(true) {
            return;
        }
        tracing::warn!(
            "systemd does not end the machine's run: the VMs go along that the last `update` left out"
        );
        self.left_out.clear();
    }

    /// Loads the next kernel and asks systemd to enter it. The guests run until systemd stops this host.
    fn update_through_systemd(&mut self, call: UpdateCall) -> Result<(), HostError> {
        self.check_can_leave(&call.without)?;
        self.check_none_pending()?;
        self.settle(Destiny::NextKernel)?;
        if call.verify_frames {
            return Err(HostError::FramesNotPinned);
        }
        self.luo.as_ref().map_err(|none| HostError::NoLuo(none.clone()))?;
        let kept = self.kept_disks.shown();
        let surroundings = self.surroundings().leaving_out(&call.without).keeping(&kept);
        let image = next_kernel::load(&self.next_kernel(&call)?, None, &surroundings)
            .map_err(UpdateError::NextKernel)?;
        let asked = service::ask_for_kexec();
        // The image stays loaded for a request that systemd has not answered: it may carry it out all the same.
        if matches!(asked, Ok(()) | Err(service::KexecError::Late)) {
            self.next = Some(image);
            self.left_out = call.without;
        }
        asked?;
        tracing::info!("live update {} begins: systemd was asked for it", self.number + 1);
        Ok(())
    }

    /// Replaces the program of this process, and every VM's process: a handover. Returns only if it did
    /// not take place.
    fn hand_over(
        &mut self,
        call: crate::api::HandoverCall,
        observer: Observer<'_>,
    ) -> Result<std::convert::Infallible, HostError> {
        let path = call.program.clone().map_or_else(next_host::own_program, Ok)?;
        self.check_disks(&call.without)?;
        // Before preserved VMs leave sessions that outlive this process, for a program that cannot be used.
        let program = NextHost::open(&path).map_err(|error| HostError::Handover(error.into()))?;
        self.hand_over_to(|host| Ok((program, host.next_configs())), call, observer)
    }

    /// Returns the texts of the configurations that a next program would find: that of the file, if it can be read, and that
    /// of this host, each with its name.
    ///
    /// None if this host itself cannot use its configuration: then the next one does as well as this one.
    fn next_configs(&self) -> Vec<(String, String)> {
        if self.config_error.is_some() {
            return Vec::new();
        }
        let path = self.config_path.as_slice();
        let read = look::at(path, CONFIG_WITHIN, |path| config::read_text(path).ok());
        let of_file = path.iter().zip(read).filter_map(|(path, text)| {
            let text = text.flatten().filter(|text| *text != self.config_text)?;
            Some((format!("the configuration {}", path.display()), text))
        });
        let own = ("the configuration of this host".to_owned(), self.config_text.clone());
        of_file.chain([own]).collect()
    }

    /// Replaces the program by the one that `choose` returns, which has to be able to use one of the configurations that
    /// `choose` returns, if there are any. Returns only if that did not take place.
    fn hand_over_to(
        &mut self,
        choose: impl FnOnce(&Self) -> Result<(NextHost, Vec<(String, String)>), HostError>,
        call: crate::api::HandoverCall,
        observer: Observer<'_>,
    ) -> Result<std::convert::Infallible, HostError> {
        self.finish_the_rest();
        self.check_can_leave(&call.without)?;
        // What the kexec is to do with this host's VMs, the next program would not know.
        self.check_none_pending()?;
        self.settle(Destiny::NextProgram)?;
        self.kept_disks.release_all();
        let own = Keeper::start();
        let (luo, keeper): (&dyn Orchestrator, _) = match &self.luo {
            Err(none) if none.may_hold_vms => return Err(HostError::Withheld),
            Err(none) if self.is_alone => return Err(HostError::NoLuo(none.clone())),
            Ok(luo) if luo.backend().survives_exec() => (luo.as_ref(), None),
            // The kernel's LUO returns preserved files only after a kexec.
            _ => (&own, Some(&own)),
        };
        let (program, configs) = choose(self)?;
        let plan = outgoing::Plan {
            destination: Destination::Host {
                program,
                keeper,
                lock: self.instance.as_ref().map(Instance::lock),
                configs,
            },
            stop_before: call.stop_before,
            // A keeper does not pin pages: the kernel may move the pages of a memfd at any time.
            verify_frames: false,
            without: call.without,
            budget: self.config.update.budget(),
            number: self.number,
            config: self.config_text.clone(),
            pool: None,
            carried: &self.carried,
            keeps_programs: true,
            observer,
        };
        if let Some(ticket) = luo.ticket() {
            self.kernel_entry.note_handover(ticket);
        }
        let left = outgoing::run(luo, &self.vms, &self.unfinished, &plan);
        self.kernel_entry.forget_handovers();
        left.map_err(|undone| HostError::Handover(self.restore_saved(*undone)))
    }
}

fn find<'a>(vms: &'a mut [Guest], name: &VmName) -> Result<&'a mut Guest, GuestError> {
    let index = index_of(vms, name)?;
    Ok(&mut vms[index])
}

fn index_of(vms: &[Guest], name: &VmName) -> Result<usize, GuestError> {
    let known = match vms.is_empty() {
        true => "none".to_owned(),
        false => {
            let names: Vec<_> = vms.iter().map(|vm| vm.machine.name.as_str()).collect();
            format!("`{}`", names.join("`, `"))
        }
    };
    let unknown = GuestError::Unknown { name: name.clone(), known };
    vms.iter().position(|vm| vm.machine.name == *name).ok_or(unknown)
}

/// Returns the source of RAM for VM `index`, which wants `wanted` bytes. It leaves memory for the RAM that the other VMs
/// have not touched yet. How much that is, a system call for each segment tells, so it is looked at only if all of their
/// RAM together may not fit.
fn ram_source<'a>(luo: &'a ChosenLuo, vms: &[Guest], index: usize, wanted: u64) -> RamSource<'a> {
    let ram = RamSource::new(luo.as_deref().ok());
    let others = vms.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, vm)| vm);
    let sold: u64 = others.clone().map(Guest::live_ram_bytes).sum();
    match ram::available_bytes() {
        Ok(available) if sold.saturating_add(wanted) <= available => ram,
        _ => ram.with_promised(others.map(Guest::untouched_bytes).sum()),
    }
}

/// Returns the source of RAM for VM `index`, which also leaves the bytes that a `rehearsal` may still take.
fn ram_beside<'a>(
    rehearsal: u64,
    luo: &'a ChosenLuo,
    vms: &[Guest],
    index: usize,
) -> RamSource<'a> {
    let ram = ram_source(luo, vms, index, vms[index].machine.ram_bytes);
    ram.with_promised(ram.promised() + rehearsal)
}

/// Runs the host until `power-off`, SIGTERM or SIGINT.
pub fn run(config_path: &Path, started_ticks: u64, left: Option<Left>) -> Result<(), HostError> {
    open_files::raise();
    // To PID 1 the kernel sends SIGINT for Ctrl-Alt-Del, which is nobody's decision to end all VMs.
    let end: &[i32] = if init::is_pid_1() { &[SIGTERM] } else { &signals::ENDING };
    let mut server = serve::Server::new(end)?;
    survival::prepare(Path::new("/"));
    let (mut host, found) = Host::look(config_path, started_ticks, left)?;
    host.feed_watchdog();
    let old = start::config_of_old_host(&found.arrival);
    survival::stop_watchdog_of_old_host(&host.config.host, old);
    host.listen(&mut server, &found)?;
    host.populate(found);
    open_files::keep_reserve();
    server.run(&mut host)
}
