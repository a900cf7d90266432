//! The old host's half of a live update or a handover, from the first check to the jump.
//!
//! Dropping a value undoes its step: the loaded image unloads itself, an outgoing session abandons what
//! it preserved, and `Paused` resumes every VM that it paused. So every `?` below leaves all guests
//! running, or [`saved`](Kept) if their process has ended. No step between pause and jump takes longer for a guest with more RAM.

use std::cmp::Reverse;
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_mem::KhugepagedStopped;
use kexec::LoadedImage;
use luo::builtin::HandOverError;
use luo::builtin::keeper::Keeper;
use luo::{Incoming, Orchestrator, Outgoing};
use rustix::process::Pid;

use super::blackout::Blackout;
use super::carry::{self, Carried};
use super::holes::{fill_holes, refuse_too_many_holes};
use super::index::{Index, IndexedSession};
use super::leaving::{Kept, Leaving, Paused, SavedState};
use super::manifest::{
    INDEX_TOKEN, MANIFEST_TOKEN, Manifest, STATE_TOKEN, UNDONE, host_session, vm_session,
};
use super::next_host::{
    HandoverFiles, Inherited, NextHost, NextHostError, OF_A_VM, Passed, refuse_if_told_to_end,
    refuse_unended_work,
};
use super::next_kernel::{self, NextKernel};
use super::preflight::{self, KeptDisk, Surroundings};
use super::programs::{self, Travelling};
use super::syncing::{sync, sync_ahead};
use super::{Observer, Step, UpdateError, begin, process_end};
use crate::arch::x86_64::tsc;
use crate::causes::panic_message;
use crate::guests::conversation::unexpected;
use crate::guests::first_states::travels;
use crate::guests::ledger::Ledger;
use crate::guests::memfd::{document_memfd, read_document, scratch_memfd};
use crate::guests::{Guest, Life, Live};
use crate::link::{Reply, Request, Role};
use crate::machine::{Machine, VmName};
use crate::state::document;

/// How long a stop by systemd waits, while the guests run, for what keeps this process from ending.
const UNENDED_WITHIN: Duration = Duration::from_secs(10);

/// The host that takes over the VMs.
pub enum Destination<'a> {
    /// A host on another kernel: a live update.
    Kernel {
        /// The kernel.
        next: NextKernel,
        /// The disks of preserved VMs that this host keeps open, for the preflight.
        kept: Vec<KeptDisk>,
    },
    /// Another host program on this kernel, in this process: a handover.
    Host {
        /// The program.
        program: NextHost,
        /// The keeper with the sessions; `None` if they are in a pool.
        keeper: Option<&'a Keeper>,
        /// The machine's lock on hosts, which the program takes over.
        lock: Option<BorrowedFd<'a>>,
        /// The texts of the configurations that the program would find, each with its name: that of the file, and that of
        /// this host. It has to be able to use one of them. Empty: that does not matter.
        configs: Vec<(String, String)>,
    },
    /// The next process of this systemd service, under this kernel or another. This process ends.
    Service {
        /// The machine's lock on hosts, which this process releases.
        lock: Option<BorrowedFd<'a>>,
        /// Whether no guest is paused while something keeps this process from ending.
        waits: bool,
    },
}

/// The arguments of a live update or a handover.
pub struct Plan<'a> {
    /// The host that takes over the VMs.
    pub destination: Destination<'a>,
    /// Undo everything before this step instead of doing it.
    pub stop_before: Option<Step>,
    /// Compare the page frames of guest RAM before and after.
    pub verify_frames: bool,
    /// Number of live updates since the last cold boot, including this one.
    pub number: u32,
    /// VMs that are left out: they end with this host.
    pub without: Vec<VmName>,
    /// How long the blackout may take. When it has passed, everything is undone.
    pub budget: Duration,
    /// Text of the host's configuration.
    pub config: String,
    /// Directory of the pool, if guest RAM is in a pool.
    pub pool: Option<PathBuf>,
    /// What goes along beside the VMs, as it came.
    pub carried: &'a Carried,
    /// Whether the programs of hosts go along. They are given up where there is no room.
    pub keeps_programs: bool,
    /// Who is told of the progress.
    pub observer: Observer<'a>,
}

impl Plan<'_> {
    /// Returns a VM that leaves: one that travels and is not left out.
    pub(super) fn leaves<'v>(&self, vm: &'v Guest) -> Option<(&'v Machine, &'v Live)> {
        travels(vm).filter(|(machine, _)| !self.without.contains(&machine.name))
    }
}

/// A destination that is ready to be entered.
enum Next<'a> {
    Kernel(LoadedImage),
    Host(NextHost, Option<&'a Keeper>, Option<BorrowedFd<'a>>),
    Service { lock: Option<BorrowedFd<'a>>, waits: bool },
}

impl Next<'_> {
    /// Whether this host can go on if the VMs do not leave. systemd stops its service in any case.
    fn can_be_undone(&self) -> bool {
        !matches!(self, Self::Service { .. })
    }

    /// Whether written data that is not on a disk yet would be lost.
    fn loses_page_cache(&self) -> bool {
        matches!(self, Self::Kernel(_) | Self::Service { .. })
    }
}

/// A live update or a handover that did not take place.
#[derive(Debug)]
pub struct Undone {
    /// Why.
    pub error: UpdateError,
    /// What is left of the VMs whose state was saved.
    pub kept: Kept,
}

/// Performs the live update or the handover. Returns only if it did not take place.
pub fn run(
    luo: &dyn Orchestrator,
    vms: &[Guest],
    unfinished: &[Incoming],
    plan: &Plan<'_>,
) -> Result<Infallible, Box<Undone>> {
    let mut kept = Kept::default();
    // After a defect, too, the caller gets what is left of the VMs.
    let left = AssertUnwindSafe(|| leave(luo, vms, unfinished, plan, &mut kept));
    let left =
        catch_unwind(left).unwrap_or_else(|panic| Err(UpdateError::Defect(panic_message(&*panic))));
    left.map_err(|error| Box::new(Undone { error, kept }))
}

fn leave(
    luo: &dyn Orchestrator,
    vms: &[Guest],
    unfinished: &[Incoming],
    plan: &Plan<'_>,
    kept: &mut Kept,
) -> Result<Infallible, UpdateError> {
    let mut ledger = Ledger::default();
    let (started, realtime_ns) = (tsc::now(), realtime_ns());
    let before = |step| begin(step, plan.stop_before, plan.observer);

    // While the guests run.
    // Unfinished sessions of the last live update stay in the fd store of a systemd service.
    if !matches!(plan.destination, Destination::Service { .. }) {
        refuse_unfinished(unfinished)?;
    }
    before(Step::Load)?;
    let mut next = load(luo, vms, plan)?;
    let loaded = tsc::now();
    ledger.enter("load", started, loaded);
    before(Step::PreserveRam)?;
    let confirm = || luo.confirm().map_err(luo_error(Step::PreserveRam, None));
    confirm()?;
    let can_be_undone = next.can_be_undone();
    let fills_holes = luo.backend().fills_holes();
    if fills_holes {
        let live = vms.iter().filter_map(|vm| match &vm.life {
            Life::Live(_) if plan.without.contains(&vm.machine.name) => None,
            Life::Live(live) => Some((&vm.machine, live.segments.iter())),
            _ => None,
        });
        match refuse_too_many_holes(live) {
            // Without a kexec no hole is filled. With one, systemd loses the files for which there is no memory, which is
            // better than to keep none.
            Err(error) if !can_be_undone => tracing::error!("{error}"),
            Err(error) => return Err(error),
            Ok(()) if !can_be_undone => {}
            // Before khugepaged is stopped, because that takes the huge pages away.
            Ok(()) => fill_holes(vms, plan),
        }
    }
    // khugepaged must not replace pages while the kernel's LUO pins them. It stays stopped until the
    // jump, because segments that a guest touches for the first time now are pinned after the pause.
    let _pages_stay = match luo.backend().pins_pages() {
        true => {
            let stopped = KhugepagedStopped::stop(Path::new("/sys"));
            Some(stopped.map_err(UpdateError::Khugepaged)?)
        }
        false => None,
    };
    let host = luo.create_session(&host_session()).map_err(luo_error(Step::PreserveRam, None))?;
    // Without these documents nobody finds the VMs, so nothing else may take their room.
    let documents = [INDEX_TOKEN, MANIFEST_TOKEN].into_iter().chain(plan.carried.tokens());
    for token in documents {
        host.reserve(token).map_err(luo_error(Step::PreserveRam, None))?;
    }
    let mut by_urgency: Vec<&Guest> = vms.iter().collect();
    by_urgency.sort_by_key(|vm| Reverse(vm.priority));
    let mut leaving = by_urgency
        .into_iter()
        .filter_map(|vm| plan.leaves(vm))
        .map(|(machine, live)| preserve_ram(luo, machine, live, plan))
        .collect::<Result<Vec<_>, _>>()?;
    let _travelling = carry::preserve(luo, vms, plan.carried)?;
    let programs = match plan.keeps_programs {
        true => programs::preserve(luo, &plan.carried.programs),
        false => Travelling::default(),
    };
    if next.loses_page_cache() {
        let (start, end) = sync_ahead(plan, &mut leaving)?;
        ledger.enter("last-sync-ahead", start, end);
    }
    confirm()?;
    ledger.enter("preserve-ram", loaded, tsc::now());

    match next {
        Next::Host(ref program, keeper, _) => {
            refuse_unended_work()?;
            let files = files(&leaving, vms, plan, &programs, keeper.is_some());
            program.refuse_too_few_files(&files)?;
        }
        Next::Service { waits: true, .. } => refuse_unended()?,
        Next::Kernel(_) | Next::Service { .. } => {}
    }

    // The next host would not know of a signal. systemd has sent one.
    if !matches!(next, Next::Service { .. }) {
        refuse_if_told_to_end()?;
    }

    // The blackout.
    before(Step::Pause)?;
    let pausing = tsc::now();
    let blackout = Blackout::begins(plan.budget, can_be_undone);
    let paused = Paused::pause(&mut leaving, kept, &blackout, fills_holes && can_be_undone)?;
    // Dropped before `paused`: where sessions outlive this process, the manifest must be gone before a guest runs on. If
    // this process is killed then, the next one would restore the outdated state.
    let host = host;
    let mut valid = Valid::new(luo.backend());
    before(Step::Save)?;
    save(paused.vms, &blackout)?;
    before(Step::PreserveState)?;
    preserve_state(paused.vms)?;
    before(Step::Sync)?;
    if next.loses_page_cache() {
        sync(plan, paused.vms, &blackout, !can_be_undone)?;
    }
    before(Step::Jump)?;
    blackout.check(Step::Jump)?;
    let jumping = tsc::now();
    ledger.enter("pause-to-jump", pausing, jumping);
    let mut manifest = manifest(plan, ledger, paused.vms, (started, realtime_ns), jumping);
    manifest.vms.extend(carry::entries(vms));
    let boots = vms.iter().filter(|vm| vm.boots_next() && !plan.without.contains(&vm.machine.name));
    manifest.boots = boots.map(|vm| vm.machine.clone()).collect();
    let carried = carry::indexed(vms, plan.carried);
    let carried: Vec<_> = carried.into_iter().chain(programs.indexed.iter().cloned()).collect();
    let manifest = preserve_manifest(&host, &manifest, &carried, &mut valid)?;
    plan.carried.preserve_manifests(&host)?;
    if let Next::Host(program, ..) = &mut next {
        program.hurry(blackout.left());
        rehearse(program, &manifest, paused.vms)?;
        blackout.check(Step::Jump)?;
    }
    if let Next::Kernel(_) = next {
        refuse_if_told_to_end()?;
    }
    // Also those of VMs that stay behind.
    let processes: Vec<_> = vms.iter().flat_map(Guest::pids).collect();
    Err(jump(luo, next, &processes))
}

/// Checks the destination as far as is possible now, and makes it ready for the jump.
fn load<'a>(
    luo: &dyn Orchestrator,
    vms: &[Guest],
    plan: &Plan<'a>,
) -> Result<Next<'a>, UpdateError> {
    let surroundings = Surroundings::of_host(vms, luo).leaving_out(&plan.without);
    let surroundings = surroundings.configured(&plan.config);
    Ok(match &plan.destination {
        Destination::Kernel { next, kept } => {
            let loaded = next_kernel::load(next, luo.ticket(), &surroundings.keeping(kept))?;
            Next::Kernel(loaded.into_image())
        }
        Destination::Host { program, keeper, lock, configs } => {
            let mut program = program.clone();
            // The documents themselves are decoded when they are complete, in the blackout.
            if let Some(draft) = preflight::manifest(&surroundings) {
                program.would_take_over(draft.as_fd())?;
            }
            let draft = |(name, text): &(String, String)| {
                Some((name.clone(), preflight::with_config(text)?))
            };
            let drafts: Vec<_> = configs.iter().filter_map(draft).collect();
            let drafts: Vec<_> = drafts.iter().map(|(n, file)| (n.clone(), file.as_fd())).collect();
            program.can_use_one_of(&drafts)?;
            Next::Host(program, *keeper, *lock)
        }
        Destination::Service { lock, waits } => Next::Service { lock: *lock, waits: *waits },
    })
}

/// Counts the files of a handover.
fn files(
    leaving: &[Leaving<'_>],
    vms: &[Guest],
    plan: &Plan<'_>,
    programs: &Travelling,
    has_keeper: bool,
) -> HandoverFiles {
    let ram = leaving.iter().map(Leaving::preserved_segments).sum::<usize>();
    let preserved = ram + carry::files(vms, plan.carried) + programs.indexed.len();
    // The state documents, the index, and the manifests.
    let documents = leaving.len() + 2 + plan.carried.tokens().count();
    let of_vms = leaving.iter().map(|vm| vm.live.segments.len() as u64 + OF_A_VM).sum();
    HandoverFiles { preserved: preserved as u64, documents: documents as u64, has_keeper, of_vms }
}

/// Lets the next host's program decode every document that it will get.
fn rehearse(
    program: &mut NextHost,
    manifest: &File,
    vms: &[Leaving<'_>],
) -> Result<(), NextHostError> {
    let mut documents = vec![("the manifest".to_owned(), manifest.as_fd())];
    let states = vms.iter().filter_map(|vm| Some((vm.machine, &vm.state.as_ref()?.file)));
    documents.extend(states.map(|(machine, file)| {
        (format!("the state document of VM `{}`", machine.name), file.as_fd())
    }));
    program.rehearse(&documents)
}

/// Enters the next kernel or the next host program, which ends `processes`. Returns only on an error, and
/// only after LUO has taken back the sessions.
fn jump(luo: &dyn Orchestrator, next: Next<'_>, processes: &[Pid]) -> UpdateError {
    let mut failed = None;
    let switched = match next {
        Next::Kernel(image) => {
            let mut image = Some(image);
            luo.switch(&mut || {
                failed = image.take().map(|image| UpdateError::Jump(kexec::jump(image)));
            })
        }
        Next::Host(program, None, lock) => luo.switch(&mut || {
            let passed = Passed { lock, processes };
            let enter = |ticket| program.enter(Inherited::InPool(ticket), passed).into();
            failed = luo.ticket().map(enter);
        }),
        Next::Host(program, Some(keeper), lock) => {
            let entered = keeper.hand_over(|handover| {
                let error = program.enter(Inherited::Kept(handover), Passed { lock, processes });
                Err::<Infallible, _>(error)
            });
            match entered {
                Ok(never) => match never {},
                Err(HandOverError::Refused(error)) => Err(error),
                Err(HandOverError::NotTaken(error)) => {
                    failed = Some(error.into());
                    Ok(())
                }
            }
        }
        Next::Service { lock, .. } => match luo.switch(&mut || ()) {
            Ok(()) => process_end::end(lock),
            refused => refused,
        },
    };
    match (switched, failed) {
        (Ok(()), Some(error)) => error,
        (Ok(()), None) => UpdateError::NoJump,
        (Err(source), _) => luo_error(Step::Jump, None)(source),
    }
}

/// Errors if this process would not end soon. Waits for what keeps it from ending.
fn refuse_unended() -> Result<(), UpdateError> {
    let work = process_end::unended(UNENDED_WITHIN);
    if work.is_empty() { Ok(()) } else { Err(UpdateError::Unended { work }) }
}

/// Errors if a session of the last live update could not be finished: LUO would not preserve its files again.
fn refuse_unfinished(unfinished: &[Incoming]) -> Result<(), UpdateError> {
    match unfinished.first() {
        Some(session) => Err(UpdateError::UnfinishedSession(session.name().to_string())),
        None => Ok(()),
    }
}

/// Creates a VM's session and preserves every segment that the guest has touched.
fn preserve_ram<'a>(
    luo: &dyn Orchestrator,
    machine: &'a Machine,
    live: &'a Live,
    plan: &Plan<'a>,
) -> Result<Leaving<'a>, UpdateError> {
    let start = tsc::now();
    let session = luo
        .create_session(&vm_session(&machine.name))
        .map_err(luo_error(Step::PreserveRam, Some(machine)))?;
    let reserved = session.reserve(STATE_TOKEN);
    reserved.map_err(luo_error(Step::PreserveRam, Some(machine)))?;
    let mut leaving = Leaving::new(machine, live, session, plan);
    leaving.preserve_touched(Step::PreserveRam)?;
    leaving.ledger.enter("preserve-ram", start, tsc::now());
    leaving.has_done(Step::PreserveRam);
    Ok(leaving)
}

fn save(vms: &mut [Leaving<'_>], blackout: &Blackout) -> Result<(), UpdateError> {
    let step = Step::Save;
    let state_error = |machine: &Machine| {
        let vm = Some(machine.name.clone());
        move |source| UpdateError::Document { step, vm, what: "state document", source }
    };
    let start = tsc::now();
    for vm in vms.iter_mut().filter(|vm| vm.session.is_some()) {
        let file = scratch_memfd("state").map_err(state_error(vm.machine))?;
        let sent = vm.live.process.send(Request::Save, &[(Role::State, file.as_fd())]);
        sent.map_err(vm.process_error(step))?;
        vm.scratch = Some(file);
    }
    blackout.collect(step, vms, |vm, answer| {
        match (vm.answer(step, answer)?, vm.scratch.take()) {
            // LUO preserves a copy: the process could still change its memfd, and LUO takes memory for every byte.
            (Reply::Saved { bytes }, Some(written)) => {
                let document = read_document(&written, bytes);
                let document = document.map_err(state_error(vm.machine))?;
                let digest = crc32fast::hash(&document);
                let file = document_memfd("state", &document);
                let file = file.map_err(state_error(vm.machine))?;
                vm.state = Some(SavedState { file, bytes, digest });
            }
            (other, _) => return Err(vm.process_error(step)(unexpected("save", &other))),
        }
        vm.ledger.enter("save", start, tsc::now());
        vm.has_done(step);
        Ok(())
    })
}

fn preserve_state(vms: &mut [Leaving<'_>]) -> Result<(), UpdateError> {
    for vm in vms {
        let start = tsc::now();
        if let (Some(state), Some(session)) = (&vm.state, &vm.session) {
            session
                .preserve(state.file.as_fd(), STATE_TOKEN)
                .map_err(luo_error(Step::PreserveState, Some(vm.machine)))?;
        }
        vm.ledger.enter("preserve-state", start, tsc::now());
        vm.has_done(Step::PreserveState);
    }
    Ok(())
}

fn manifest(
    plan: &Plan<'_>,
    ledger: Ledger,
    vms: &[Leaving<'_>],
    (ticks, realtime_ns): (u64, u64),
    jumping: u64,
) -> Manifest {
    let mut ledger = ledger;
    ledger.enter("jump", jumping, jumping);
    Manifest {
        kernel: super::kernel_name(),
        number: plan.number,
        config: plan.config.clone(),
        ticks,
        realtime_ns,
        ledger,
        vms: vms.iter().filter(|vm| vm.session.is_some()).map(|vm| vm.entry(jumping)).collect(),
        boots: Vec::new(),
    }
}

/// The documents by which a later host finds the VMs. Where sessions outlive this process, dropping this overwrites
/// them: the service manager may not get to know that the sessions were dropped, and what the documents say is
/// outdated when a guest runs on.
struct Valid {
    outlives_process: bool,
    documents: Vec<File>,
}

impl Valid {
    fn new(backend: luo::Backend) -> Self {
        Self { outlives_process: backend.outlives_process(), documents: Vec::new() }
    }
}

impl Drop for Valid {
    fn drop(&mut self) {
        for document in self.documents.drain(..).filter(|_| self.outlives_process) {
            if let Err(error) = document.write_all_at(UNDONE, 0) {
                tracing::error!("a document of a step that was undone stays valid: {error}");
            }
        }
    }
}

/// Preserves the index, with what is `carried` on, and the manifest in the host's session. Returns the manifest's
/// memfd.
fn preserve_manifest(
    host: &Outgoing,
    manifest: &Manifest,
    carried: &[IndexedSession],
    valid: &mut Valid,
) -> Result<File, UpdateError> {
    let step = Step::Jump;
    let mut preserve = |what: &'static str, bytes: &[u8], token| {
        let error = |source| UpdateError::Document { step, vm: None, what, source };
        let file = document_memfd(what, bytes).map_err(error)?;
        valid.documents.push(file.try_clone().map_err(error)?);
        host.preserve(file.as_fd(), token).map_err(luo_error(step, None))?;
        Ok::<File, UpdateError>(file)
    };
    let bytes = document::write_document(manifest)?;
    let index = document::write_document(&Index::of(manifest, &bytes).with(carried))?;
    preserve("index", &index, INDEX_TOKEN)?;
    preserve("manifest", &bytes, MANIFEST_TOKEN)
}

pub(super) fn luo_error(
    step: Step,
    machine: Option<&Machine>,
) -> impl Fn(luo::Error) -> UpdateError + use<> {
    let vm = machine.map(|machine| machine.name.clone());
    move |source| UpdateError::Luo { step, vm: vm.clone(), source }
}

fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests;
