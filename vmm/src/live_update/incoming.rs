//! The new host's half of a live update or a handover, from the manifest to running guests.
//!
//! All VMs arrive at the same time, each at its own pace: a VM is resumed as soon as that VM is ready. The most urgent
//! one begins first. A process that hangs or dies delays no other VM.
//!
//! ```text
//!   begin: process, memory --> Opening --> Confining --> Restoring --> Resuming --> live
//!              |  no session      \------------\---- error, late ---> preserved
//!              \--> failed                              \            \--> failed, if the process ends
//!                                                        \-- late, but not given up --> live
//! ```
//!
//! A VM that cannot be restored keeps its session, hence its memory, and can be tried again. Once a guest was told to
//! resume, its state document is outdated, so nothing is restored from the document any more. A session that would come
//! again is finished before its guest runs, all others only after every guest that can be resumed runs, because finishing
//! takes time and ends the possibility to try again.

mod again;
mod frames;
mod restored;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_mem::Segment;
use luo::{Backend, Orchestrator};

use super::breakpoint;
pub use super::incoming_error::IncomingError;
use super::index::session_of;
use super::manifest::{STATE_TOKEN, segment_token, vm_session};
use super::next_host::NextHost;
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::answers::readable;
use crate::guests::confinement::Confinement;
use crate::guests::conversation::{ANSWER_WITHIN, unexpected};
use crate::guests::entry::VmEntry;
use crate::guests::files::Files;
use crate::guests::held::Held;
use crate::guests::memfd::document_digest;
use crate::guests::opening::Opening;
use crate::guests::process::VmProcess;
use crate::guests::ram::RamSource;
use crate::guests::{Guest, Life, Live, turns};
use crate::link::{MissingHints, Ram, Reply, Request, Role};
use crate::machine::VmName;
use crate::vm::ram_layout;
pub use again::{Restoring, RestoringNext, restore_again};
pub use frames::FrameComparison;
pub use restored::RestoredVm;

/// How long the host waits for VMs that go no further, before it serves its clients and the other VMs.
const LATE_AFTER: Duration = Duration::from_secs(20);

/// Restores and resumes every VM of the manifest; the first of `entries` is the most urgent one. Returns each VM, in
/// the order of `entries`, with its session, which the caller finishes when all VMs are resumed, and with its ledger.
/// Returns besides what may still become of those VMs that are preserved because they are late.
pub fn resume_all(
    luo: &dyn Orchestrator,
    entries: &[VmEntry],
    confinement: &Arc<Confinement>,
    hints: MissingHints,
) -> (Vec<RestoredVm>, Vec<Late>) {
    let arrived = tsc::now();
    let start = |entry| start(luo, entry, arrived, confinement, hints);
    arrive(entries.iter().cloned(), LATE_AFTER, confinement, start)
}

/// Lets every VM begin by `start`, and takes each of them on until it is live, or cannot be. All have the same deadline:
/// the end of `within`, after the last of them has begun. Returns them in the order of `queue`.
fn arrive<T>(
    queue: impl IntoIterator<Item = T>,
    within: Duration,
    confinement: &Arc<Confinement>,
    mut start: impl FnMut(T) -> Result<Arriving, Box<RestoredVm>>,
) -> (Vec<RestoredVm>, Vec<Late>) {
    let at_once = turns::at_once();
    let mut deadline = Instant::now() + within;
    let mut queue = queue.into_iter().enumerate().peekable();
    let mut arriving: Vec<(usize, Arriving)> = Vec::new();
    let mut arrived: Vec<(usize, RestoredVm)> = Vec::new();
    // Each process is killed at once, and waited for when no VM waits any more.
    let mut ended: Vec<VmProcess> = Vec::new();
    loop {
        // A VM that can go on does so before another begins, and the most urgent one first.
        let until = match queue.peek() {
            None if arriving.is_empty() => break,
            None => deadline,
            Some(_) => {
                turns::next(arriving.iter().map(|(_, vm)| vm.began), at_once, Instant::now())
            }
        };
        let fds: Vec<_> = arriving.iter().map(|(_, vm)| vm.as_fd()).collect();
        let ready = readable(&fds, until);
        let mut has_gone_on = false;
        for (index, (place, vm)) in std::mem::take(&mut arriving).into_iter().enumerate() {
            let next = if ready.contains(&index) { vm.go_on(confinement) } else { Next::Waits(vm) };
            // One that only sends events has not gone on.
            has_gone_on |= !matches!(next, Next::Waits(_));
            match next {
                Next::Waits(vm) | Next::GoesOn(vm) => arriving.push((place, vm)),
                Next::Live(vm) => arrived.push((place, vm)),
                Next::Failed(vm, process) => {
                    arrived.push((place, *vm));
                    ended.push(process);
                }
            }
        }
        if has_gone_on || Instant::now() < until {
            continue;
        }
        let Some((place, vm)) = queue.next() else { break };
        match start(vm) {
            Ok(vm) => arriving.push((place, vm)),
            Err(vm) => arrived.push((place, *vm)),
        }
        deadline = Instant::now() + within;
    }
    let mut late = Vec::new();
    for (place, vm) in arriving {
        let (vm, rest) = vm.falls_behind(within, confinement);
        arrived.push((place, vm));
        late.extend(rest);
    }
    arrived.sort_by_key(|(place, _)| *place);
    (arrived.into_iter().map(|(_, vm)| vm).collect(), late)
}

/// A VM whose memory has been retrieved and whose process restores it.
struct Arriving {
    /// When its turn began.
    began: Instant,
    /// The entry as it came, for another attempt.
    left: VmEntry,
    /// The entry with the phases of this attempt.
    entry: VmEntry,
    /// `None` if the VM is late: then the host holds it as it came.
    held: Option<Held>,
    /// The kind of LUO that it comes from.
    backend: Backend,
    process: VmProcess,
    segments: Vec<Segment>,
    frames: Vec<FrameComparison>,
    /// The state document.
    state: File,
    ram: Ram,
    hints: MissingHints,
    stage: Stage,
    /// TSC at the end of the last phase.
    since: u64,
    /// The open files of its devices, from [`Stage::Confining`] on.
    files: Files,
    missing_hints: Vec<String>,
    /// The program of its process, if it is not the running one.
    program: Option<String>,
}

/// What an arriving VM waits for.
enum Stage {
    /// The host opens the files of its devices.
    Opening(Opening),
    /// Its process confines itself.
    Confining,
    /// Its process restores it.
    Restoring,
    /// Its process resumes it: the guest may run already.
    Resuming,
}

/// What has become of a VM that could go on.
enum Next {
    /// It still waits for the same.
    Waits(Arriving),
    /// It waits for something else.
    GoesOn(Arriving),
    Live(RestoredVm),
    /// It will not be live. Its process was killed, and may not have ended yet.
    Failed(Box<RestoredVm>, VmProcess),
}

/// What a step has come to.
enum Step {
    Waits,
    GoesOn,
    /// The VM is live: it runs, or it is paused as it was before.
    Live {
        first_entry_ticks: Option<u64>,
    },
}

/// Retrieves a VM's session and memory, and starts its process. The VM waits since `arrived` (TSC).
fn start(
    luo: &dyn Orchestrator,
    entry: VmEntry,
    arrived: u64,
    confinement: &Arc<Confinement>,
    hints: MissingHints,
) -> Result<Arriving, Box<RestoredVm>> {
    let turn = (arrived, tsc::now());
    breakpoint::reach("retrieve", Some(&entry.machine.name));
    let name = vm_session(&entry.machine.name);
    let files = session_of(&entry).files;
    match luo.retrieve_session(&name) {
        Ok(session) => {
            begin(luo, (Held::new(session, files), entry), turn, confinement, hints, None)
        }
        // There is nothing behind the name: the memory is lost.
        Err(error) if error.is_not_found() => {
            Err(Box::new(RestoredVm::lost(entry, chain(&error), confinement)))
        }
        // Everything else may pass, and the session may still come.
        Err(error) => {
            let kept = (Held::unretrieved(name, files), entry.clone());
            Err(Box::new(RestoredVm::preserved(entry, kept, chain(&error), confinement)))
        }
    }
}

/// Starts the process of a VM whose session was retrieved, and retrieves the memory. The VM arrived and
/// started at these times (TSC).
fn begin(
    luo: &dyn Orchestrator,
    (mut held, mut entry): (Held, VmEntry),
    (arrived, start): (u64, u64),
    confinement: &Arc<Confinement>,
    hints: MissingHints,
    program: Option<&NextHost>,
) -> Result<Arriving, Box<RestoredVm>> {
    let (began, left, ram) = (Instant::now(), entry.clone(), RamSource::new(Some(luo)));
    let backend = luo.backend();
    entry.ledger.enter("wait-for-turn", arrived, start);
    let mut begin = || {
        // The process starts, and the files of its devices are opened, while the memory is retrieved.
        let process = VmProcess::spawn_from(program.map(NextHost::executable), confinement)?;
        let opening = Opening::begin(&entry.machine)?;
        let spawned = tsc::now();
        entry.ledger.enter("spawn", start, spawned);
        if backend.comes_again() {
            held.collect(luo, false)?;
        }
        let segments = retrieve_ram(ram, &held, &entry)?;
        let state = File::from(held.file(STATE_TOKEN)?);
        let digest =
            document_digest(&state, entry.state_bytes).map_err(IncomingError::ReadState)?;
        if digest != entry.state_digest {
            return Err(IncomingError::State { found: digest, left: entry.state_digest });
        }
        let retrieved = tsc::now();
        entry.ledger.enter("retrieve", spawned, retrieved);
        let (frames, since) = frames::compare(&segments, &mut entry, retrieved);
        Ok((process, opening, segments, state, frames, since))
    };
    match begin() {
        Ok((process, opening, segments, state, frames, since)) => Ok(Arriving {
            began,
            left,
            entry,
            held: Some(held),
            backend,
            process,
            segments,
            frames,
            state,
            ram: ram.kind(),
            hints,
            stage: Stage::Opening(opening),
            since,
            files: Files::default(),
            missing_hints: Vec::new(),
            program: program.map(NextHost::describe),
        }),
        Err(error) => {
            let kept = (held, left);
            Err(Box::new(RestoredVm::preserved(entry, kept, chain(&error), confinement)))
        }
    }
}

/// Returns the VM's RAM: preserved segments are retrieved from the session, the others created again.
fn retrieve_ram(
    ram: RamSource<'_>,
    held: &Held,
    entry: &VmEntry,
) -> Result<Vec<Segment>, IncomingError> {
    let layout = ram_layout(entry.machine.ram_bytes)?;
    let plans = layout.segments();
    let bytes: Vec<u64> = entry.segments.iter().map(|s| s.bytes).collect();
    if !plans.iter().map(|plan| plan.len).eq(bytes.iter().copied()) {
        let found = bytes.len();
        return Err(IncomingError::Segments { found, bytes, expected: plans.len() });
    }
    let mut segments = Vec::with_capacity(plans.len());
    for (index, segment) in entry.segments.iter().enumerate() {
        segments.push(if segment.preserved {
            ram.take(index, held.file(segment_token(index))?, segment.bytes)?
        } else {
            ram.create(entry.machine.name.as_str(), index, segment.bytes)?
        });
    }
    Ok(segments)
}

impl Arriving {
    /// Goes on with what has become ready.
    fn go_on(mut self, confinement: &Arc<Confinement>) -> Next {
        match self.step() {
            Ok(Step::Waits) => Next::Waits(self),
            Ok(Step::GoesOn) => Next::GoesOn(self),
            Ok(Step::Live { first_entry_ticks }) => {
                Next::Live(self.live(first_entry_ticks, confinement))
            }
            Err(error) => {
                let (vm, process) = self.fails(error, confinement);
                Next::Failed(Box::new(vm), process)
            }
        }
    }

    fn step(&mut self) -> Result<Step, IncomingError> {
        if let Stage::Opening(_) = self.stage {
            breakpoint::reach("open", Some(&self.entry.machine.name));
            if let Stage::Opening(opening) = std::mem::replace(&mut self.stage, Stage::Confining) {
                self.files = opening.files()?;
            }
            return Ok(Step::GoesOn);
        }
        let Some(answer) = self.process.take_answer() else { return Ok(Step::Waits) };
        self.stage = match (&self.stage, answer?) {
            (Stage::Opening(_) | Stage::Confining, reply) => {
                self.process.confined(reply)?;
                self.ask_to_restore()?;
                self.ends_phase("open");
                Stage::Restoring
            }
            (Stage::Restoring, Reply::Restored { missing_hints }) => {
                self.missing_hints = missing_hints;
                self.ends_phase("restore");
                if self.held.is_none() && self.entry.running {
                    // The host serves others, so nobody waits for the answer.
                    self.process.notify(Request::Resume)?;
                }
                if self.held.is_none() || !self.entry.running {
                    return Ok(Step::Live { first_entry_ticks: None });
                }
                breakpoint::reach("take", Some(&self.entry.machine.name));
                self.leave_luo()?;
                breakpoint::reach("resume", Some(&self.entry.machine.name));
                self.process.send(Request::Resume, &[])?;
                Stage::Resuming
            }
            (Stage::Resuming, Reply::Resumed { first_entry_ticks }) => {
                self.entry.ledger.enter("resume", self.since, first_entry_ticks);
                return Ok(Step::Live { first_entry_ticks: Some(first_entry_ticks) });
            }
            (Stage::Restoring, other) => return Err(unexpected("restore", &other).into()),
            (Stage::Resuming, other) => return Err(unexpected("resume", &other).into()),
        };
        Ok(Step::GoesOn)
    }

    /// Takes the VM out of a LUO from which it would come again, before the guest's first instruction: a later host would
    /// restore the old state over memory and disks that have gone on. Elsewhere sessions end with this process.
    fn leave_luo(&mut self) -> Result<(), IncomingError> {
        match &mut self.held {
            Some(held) if self.backend.comes_again() => Ok(held.release()?),
            _ => Ok(()),
        }
    }

    fn ask_to_restore(&self) -> Result<(), IncomingError> {
        breakpoint::reach("restore", Some(&self.entry.machine.name));
        let mut fds = self.files.borrow();
        fds.push((Role::State, self.state.as_fd()));
        fds.extend(self.segments.iter().map(|segment| (Role::Segment, segment.as_fd())));
        let (machine, bytes) = (self.entry.machine.clone(), self.entry.state_bytes);
        let request = Request::Restore { machine, ram: self.ram, bytes, hints: self.hints };
        Ok(self.process.send(request, &fds)?)
    }

    fn ends_phase(&mut self, name: &str) {
        let now = tsc::now();
        self.entry.ledger.enter(name, self.since, now);
        self.since = now;
    }

    fn live(self, first_entry_ticks: Option<u64>, confinement: &Arc<Confinement>) -> RestoredVm {
        let Self { entry, held, process, segments, frames, files, missing_hints, program, .. } =
            self;
        let mut vm = Guest::new(entry.machine.clone(), confinement);
        vm.note_missing_hints(missing_hints);
        let live = Live::new(process, segments, entry.running);
        vm.life = Life::Live(Live { console: files.console(), program, ..live });
        let session = held.and_then(Held::into_session);
        RestoredVm { entry, vm, session, first_entry_ticks, frames }
    }

    /// Kills the process. The VM is preserved, unless its guest may have run: it has not if the process ended before it
    /// read that it is to resume the guest.
    fn fails(
        self,
        error: IncomingError,
        confinement: &Arc<Confinement>,
    ) -> (RestoredVm, VmProcess) {
        let Self { left, entry, held, process, frames, stage, .. } = self;
        process.kill();
        let has_run = matches!(stage, Stage::Resuming)
            && !matches!(&error, IncomingError::Process(error) if error.is_unread());
        let vm = match (has_run, held) {
            (true, _) | (_, None) => {
                let why = chain(&IncomingError::Resume(Box::new(error)));
                tracing::error!("VM `{}` is lost: {}", entry.machine.name, why.join(": "));
                RestoredVm::lost(entry, why, confinement)
            }
            (false, Some(held)) => {
                RestoredVm::preserved(entry, (held, left), chain(&error), confinement)
            }
        };
        (RestoredVm { frames, ..vm }, process)
    }

    /// The deadline `within` has passed. The VM is preserved, but its process is not ended yet.
    fn falls_behind(
        mut self,
        within: Duration,
        confinement: &Arc<Confinement>,
    ) -> (RestoredVm, Option<Late>) {
        let Some(waits_for) = self.waits_for() else {
            return (self.runs_perhaps(confinement), None);
        };
        let error = IncomingError::Late { waits_for, within };
        // What the host then holds of a late VM could not be taken from LUO when its process becomes ready. So it is taken
        // now, unless the session protects the VM from the end of this process.
        if self.backend.outlives_process() || self.leave_luo().is_err() {
            return (self.fails(error, confinement).0, None);
        }
        match self.held.take() {
            Some(held) => {
                let (entry, kept) = (self.entry.clone(), (held, self.left.clone()));
                let vm = RestoredVm::preserved(entry, kept, chain(&error), confinement);
                let deadline = self.began + ANSWER_WITHIN;
                (vm, Some(Late { vm: Box::new(self), deadline }))
            }
            None => (self.fails(error, confinement).0, None),
        }
    }

    /// The VM's process was told to resume the guest, and owes the answer. As after `resume` of a paused VM, the guest counts
    /// as running.
    fn runs_perhaps(self, confinement: &Arc<Confinement>) -> RestoredVm {
        let name = &self.entry.machine.name;
        tracing::error!("VM `{name}`: its process has not said in time that it runs");
        self.process.stop_waiting();
        self.live(None, confinement)
    }

    /// What the VM waits for, in words. `None` if its guest may run already.
    fn waits_for(&self) -> Option<&'static str> {
        match self.stage {
            Stage::Opening(_) => Some("the host opens the files of its devices"),
            Stage::Confining => Some("its process confines itself"),
            Stage::Restoring => Some("its process restores it"),
            Stage::Resuming => None,
        }
    }
}

/// A VM that the host holds as it came, because it was late, and whose restore goes on meanwhile. Dropping this ends
/// that, and the VM stays preserved.
pub struct Late {
    vm: Box<Arriving>,
    deadline: Instant,
}

/// What has become of a VM that was late.
pub enum LateNext {
    /// It still is.
    Waits(Late),
    /// It is live. What the host holds of it is outdated, and in use.
    Live(Box<RestoredVm>),
    /// It stays preserved, for these causes.
    Failed(Vec<String>),
}

impl Late {
    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.vm.entry.machine.name
    }

    /// When the VM is given up.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Goes on if the VM `is_ready`, or gives it up after its deadline. Does not wait for its process.
    pub fn go_on(mut self, is_ready: bool, confinement: &Arc<Confinement>) -> LateNext {
        let step = if is_ready { self.vm.step() } else { Ok(Step::Waits) };
        match step {
            Ok(Step::Live { first_entry_ticks }) => {
                LateNext::Live(Box::new(self.vm.live(first_entry_ticks, confinement)))
            }
            Ok(Step::Waits | Step::GoesOn) if Instant::now() < self.deadline => {
                LateNext::Waits(self)
            }
            Ok(Step::Waits | Step::GoesOn) => {
                let waits_for = self.vm.waits_for().unwrap_or("its process resumes it");
                LateNext::Failed(chain(&IncomingError::TooLate {
                    waits_for,
                    within: ANSWER_WITHIN,
                }))
            }
            Err(error) => LateNext::Failed(chain(&error)),
        }
    }
}

/// What becomes readable when the VM can go on.
impl AsFd for Late {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm.as_fd()
    }
}

/// What becomes readable when the VM can go on.
impl AsFd for Arriving {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stage {
            Stage::Opening(opening) => opening.as_fd(),
            _ => self.process.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests;
