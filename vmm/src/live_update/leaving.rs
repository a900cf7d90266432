//! VMs that leave, with all that the transaction holds for each, and their pause.
//!
//! A VM needs its process until the process has saved the guest's state. A process that ends after that ends no VM: the
//! VM goes along without it, and if the transaction is undone, the VM is [`Saved`] and can be restored.

use std::fs::File;
use std::os::fd::AsFd;

use guest_mem::{FrameDigest, Segment};
use luo::Outgoing;

use super::blackout::Blackout;
use super::holes::refuse_too_many_holes;
use super::in_flight;
use super::index::session_of;
use super::manifest::{STATE_TOKEN, segment_token, vm_session};
use super::outgoing::Plan;
use super::{Observer, Progress, Step, UpdateError};
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::Live;
use crate::guests::conversation::{ProcessError, unexpected};
use crate::guests::entry::{SegmentEntry, VmEntry};
use crate::guests::held::Held;
use crate::guests::ledger::Ledger;
use crate::link::{Reply, Request};
use crate::machine::Machine;

/// A VM that is being handed over, with all that the transaction holds for it.
pub(super) struct Leaving<'a> {
    pub(super) machine: &'a Machine,
    pub(super) live: &'a Live,
    /// `None` if the guest ended while it was being paused: the VM stays behind.
    pub(super) session: Option<Outgoing>,
    segments: Vec<SegmentEntry>,
    verify_frames: bool,
    observer: Observer<'a>,
    pub(super) ledger: Ledger,
    last_exit_ticks: u64,
    /// The file to which the process writes the state document.
    pub(super) scratch: Option<File>,
    /// The guest's state, from the step `save` on. The VM needs its process no more.
    pub(super) state: Option<SavedState>,
    /// Why the process ended after that.
    pub(super) ended: Option<ProcessError>,
}

/// A state document, with its size in bytes and its CRC-32 for the index.
pub(super) struct SavedState {
    pub(super) file: File,
    pub(super) bytes: u64,
    pub(super) digest: u32,
}

/// The entry of a segment that is not preserved yet.
fn unpreserved(segment: &Segment) -> SegmentEntry {
    SegmentEntry { bytes: segment.len(), preserved: false, frames: None }
}

impl<'a> Leaving<'a> {
    pub(super) fn new(
        machine: &'a Machine,
        live: &'a Live,
        session: Outgoing,
        plan: &Plan<'a>,
    ) -> Self {
        Self {
            machine,
            live,
            session: Some(session),
            segments: live.segments.iter().map(unpreserved).collect(),
            verify_frames: plan.verify_frames,
            observer: plan.observer,
            ledger: Ledger::default(),
            last_exit_ticks: 0,
            scratch: None,
            state: None,
            ended: None,
        }
    }
}

impl Leaving<'_> {
    /// Preserves the segments that the guest has touched and that are not preserved yet. The kernel's
    /// LUO pins them to their page frames from then on.
    pub(super) fn preserve_touched(&mut self, step: Step) -> Result<(), UpdateError> {
        let Some(session) = &self.session else { return Ok(()) };
        for (index, segment) in self.live.segments.iter().enumerate() {
            if self.segments[index].preserved
                || !guest_mem::is_touched(segment).map_err(self.examine())?
            {
                continue;
            }
            let memory = (segment.as_fd(), segment_token(index));
            in_flight::preserve(session, memory, (self.machine, self.live), step)?;
            self.segments[index].preserved = true;
            if self.verify_frames {
                let frames = FrameDigest::of(segment).map_err(|source| UpdateError::Frames {
                    vm: self.machine.name.clone(),
                    source,
                })?;
                self.segments[index].frames = Some(frames);
            }
        }
        Ok(())
    }

    /// The number of segments that are preserved.
    pub(super) fn preserved_segments(&self) -> usize {
        self.segments.iter().filter(|entry| entry.preserved).count()
    }

    /// The segments that are not preserved yet.
    fn late_segments(&self) -> impl Iterator<Item = &Segment> {
        let segments = self.live.segments.iter().zip(&self.segments);
        segments.filter(|(_, entry)| !entry.preserved).map(|(segment, _)| segment)
    }

    pub(super) fn has_done(&self, step: Step) {
        (self.observer)(Progress { step, vm: Some(&self.machine.name) });
    }

    /// The VM goes along although its process has ended with this error, because its state is saved. Errors if the VM
    /// still needs its process, or if the process may go on.
    pub(super) fn goes_on_without_process(
        &mut self,
        step: Step,
        error: ProcessError,
    ) -> Result<(), UpdateError> {
        // A VM without a session stays behind, because its guest has ended.
        if (self.session.is_some() && self.state.is_none()) || !error.is_end() {
            return Err(self.process_error(step)(error));
        }
        // It may have closed only its link.
        self.live.process.kill();
        self.ended = Some(error);
        Ok(())
    }

    fn examine(&self) -> impl Fn(std::io::Error) -> UpdateError + use<> {
        let vm = self.machine.name.clone();
        move |source| UpdateError::Ram { vm: vm.clone(), source }
    }

    pub(super) fn process_error(&self, step: Step) -> impl Fn(ProcessError) -> UpdateError + use<> {
        let vm = self.machine.name.clone();
        move |source| UpdateError::Process { step, vm: vm.clone(), source }
    }

    pub(super) fn entry(&self, jumping: u64) -> VmEntry {
        let mut ledger = self.ledger.clone();
        if let Some(last) = self.ledger.phases.last() {
            ledger.enter("wait-for-jump", last.end, jumping);
        }
        VmEntry {
            machine: self.machine.clone(),
            running: self.live.running,
            state_bytes: self.state.as_ref().map_or(0, |state| state.bytes),
            state_digest: self.state.as_ref().map_or(0, |state| state.digest),
            last_exit_ticks: self.last_exit_ticks,
            ledger,
            segments: self.segments.clone(),
        }
    }

    /// Returns the answer of the VM's process to the request of `step`.
    pub(super) fn answer(
        &self,
        step: Step,
        answer: Result<Reply, ProcessError>,
    ) -> Result<Reply, UpdateError> {
        answer.map_err(self.process_error(step))
    }

    /// Returns the VM as it can be preserved, if its state is saved. `why`: why its process ended.
    fn saved(&self, why: Vec<String>) -> Option<Saved> {
        let state = self.state.as_ref()?;
        let mut entry = self.entry(tsc::now());
        // Nothing pins the page frames until the VM is restored.
        entry.segments.iter_mut().for_each(|segment| segment.frames = None);
        let segments = self.live.segments.iter().enumerate();
        let ram = segments.map(|(index, segment)| (segment_token(index), segment.as_fd()));
        let files = std::iter::once((STATE_TOKEN, state.file.as_fd())).chain(ram);
        match Held::copies(vm_session(&self.machine.name), session_of(&entry).files, files) {
            Ok(held) => Some(Saved { held, entry, why }),
            Err(error) => {
                let (name, why) = (&self.machine.name, chain(&error).join(": "));
                tracing::error!("VM `{name}`: the files of its state cannot be kept: {why}");
                None
            }
        }
    }
}

/// A VM of an update that was undone, whose state was saved. It can be restored unless its guest runs on.
#[derive(Debug)]
pub struct Saved {
    /// Its memory and its state document.
    pub held: Held,
    /// Its entry, as the next host would have got it.
    pub entry: VmEntry,
    /// Why its process ended. Empty if it has not.
    pub why: Vec<String>,
}

/// Paused VMs. Dropping this resumes those that ran before, and keeps those that nobody can resume but whose state is
/// saved.
pub(super) struct Paused<'t, 'a> {
    pub(super) vms: &'t mut [Leaving<'a>],
    kept: &'t mut Kept,
}

/// What is left of VMs in an update that was undone, after their state was saved.
#[derive(Debug, Default)]
pub struct Kept {
    /// The VMs that nobody could resume, and that can be restored: their processes have ended.
    pub saved: Vec<Saved>,
    /// The VMs whose process was asked to resume the guest. They can be restored if it ends before it has read that.
    pub resuming: Vec<Saved>,
}

impl<'t, 'a> Paused<'t, 'a> {
    /// Pauses the running VMs at the same time: sends to all of them first, to the most urgent one last, then waits for
    /// all answers. Then preserves the segments that a guest touched since it was preserved. A VM whose guest ended
    /// meanwhile stays behind.
    pub(super) fn pause(
        vms: &'t mut [Leaving<'a>],
        kept: &'t mut Kept,
        blackout: &Blackout,
        fills_holes: bool,
    ) -> Result<Self, UpdateError> {
        let start = tsc::now();
        let paused = Self { vms, kept };
        let step = Step::Pause;
        for vm in paused.running().rev() {
            vm.live.process.send(Request::Pause, &[]).map_err(vm.process_error(step))?;
        }
        blackout.collect(step, paused.vms, |vm, answer| match vm.answer(step, answer)? {
            Reply::Paused { last_exit_ticks } => {
                vm.last_exit_ticks = last_exit_ticks;
                vm.ledger.enter("pause", start, last_exit_ticks);
                vm.ledger.enter("drain", last_exit_ticks, tsc::now());
                vm.has_done(step);
                Ok(())
            }
            other => Err(vm.process_error(step)(unexpected("pause", &other))),
        })?;
        for vm in &mut *paused.vms {
            if vm.live.process.has_events() {
                tracing::info!("VM `{}` ended just now: it does not go along", vm.machine.name);
                vm.session = None;
            }
        }
        // Segments that the guests touched for the first time between `preserve_ram` and their pause.
        if fills_holes {
            refuse_too_many_holes(paused.vms.iter().map(|vm| (vm.machine, vm.late_segments())))?;
        }
        for vm in &mut *paused.vms {
            vm.preserve_touched(step)?;
        }
        Ok(paused)
    }

    /// VMs that are paused.
    #[cfg(test)]
    pub(super) fn of(vms: &'t mut [Leaving<'a>], kept: &'t mut Kept) -> Self {
        Self { vms, kept }
    }

    fn running(&self) -> impl DoubleEndedIterator<Item = &Leaving<'a>> {
        self.vms.iter().filter(|vm| vm.live.running)
    }
}

impl Drop for Paused<'_, '_> {
    /// Nobody waits for the answers: a process that hangs delays no other. One that was not asked to pause, or
    /// has not paused yet, gets to the request after that, or refuses it.
    fn drop(&mut self) {
        for vm in self.vms.iter_mut() {
            vm.live.process.stop_waiting();
            let resumed = match vm.ended.take() {
                Some(error) => Err(error),
                None if vm.live.running => vm.live.process.notify(Request::Resume),
                None => vm.live.process.check_open(),
            };
            let error = match resumed {
                Ok(()) if vm.live.running => {
                    self.kept.resuming.extend(vm.saved(Vec::new()));
                    continue;
                }
                Ok(()) => continue,
                Err(error) => error,
            };
            let why = chain(&error).join(": ");
            // A guest that may run is not continued from its state document, which is outdated then.
            match error.is_end().then(|| vm.saved(chain(&error))).flatten() {
                Some(saved) => self.kept.saved.push(saved),
                None => tracing::error!("VM `{}` does not resume: {why}", vm.machine.name),
            }
        }
    }
}
