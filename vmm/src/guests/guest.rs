//! One VM as the host holds it: its description, its RAM, its process, and the state of its life.
//!
//! ```text
//!   Stopped --boot--> Live --guest shuts down (asked or not), plug pulled--> Stopped
//!                      |  \--process dies, vCPU fails--> Failed --boot--> Live
//!                      |
//!                    kexec --restored--> Live      restore fails --> Preserved --retry--> Restoring --> Live
//!                        \--the pool is out of reach--> Withheld --stop--> Stopped
//! ```

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use guest_mem::{Layout, Segment};

use super::again::Waiting;
use super::booting::Booting;
use super::confinement::Confinement;
use super::conversation::ProcessError;
use super::ending::Ending;
use super::entry::VmEntry;
use super::errand::Errand;
use super::files::OpenError;
use super::held::Held;
use super::process::VmProcess;
use super::ram::{self, RamError, RamSource};
use super::restarts::{End, Restarts};
use super::resuming::Resuming;
use crate::config::Priority;
use crate::link::{Event, Ram, Request};
use crate::machine::claims::ClaimError;
use crate::machine::{Machine, VmName};
use crate::vm::ram_layout;

/// Most bytes of a VM's RAM in one reply of the API.
pub const MOST_MEMORY_BYTES: u64 = 16 << 10;

/// A command for a VM cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The VM is not in the state that the command needs.
    #[error("VM `{name}` is {state}: {remedy}")]
    WrongState {
        /// The VM.
        name: VmName,
        /// The VM's state.
        state: &'static str,
        /// What to do, or which state the command needs.
        remedy: &'static str,
    },
    /// Another command for the VM is being carried out.
    #[error(
        "VM `{name}` is being {done} by another command: wait until that has ended, a minute at most. `stop --now` \
         ends the VM at once, and gives up its memory"
    )]
    Busy {
        /// The VM.
        name: VmName,
        /// What the other command does with the VM.
        done: &'static str,
    },
    /// A command for the VM was not carried out in full.
    #[error("VM `{name}` is {state}: it was not {wanted}, because it ended, or the host ends")]
    Dropped {
        /// The VM.
        name: VmName,
        /// The VM's state.
        state: &'static str,
        /// What the command was to do with the VM.
        wanted: &'static str,
    },
    /// The VM's RAM is more than the host can give.
    #[error(
        "VM `{name}` has {} MiB of RAM, the host has {} MiB available, {} MiB of which are for other \
         VMs that have not touched them yet: give it less memory or stop another VM",
        .wanted >> 20,
        .available >> 20,
        .promised >> 20
    )]
    NotEnoughRam {
        /// The VM.
        name: VmName,
        /// The VM's RAM, in bytes.
        wanted: u64,
        /// `MemAvailable`, in bytes.
        available: u64,
        /// Bytes of RAM that other VMs have not touched yet.
        promised: u64,
    },
    /// /proc/meminfo cannot be read.
    #[error("cannot read /proc/meminfo")]
    Meminfo(#[source] io::Error),
    /// The fd of a RAM segment cannot be duplicated for the VM's process.
    #[error("VM `{name}`: cannot hand its RAM to its process")]
    Clone {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VM's RAM cannot be created.
    #[error("VM `{name}`: cannot create its RAM")]
    Ram {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: RamError,
    },
    /// A file that the VM needs cannot be opened.
    #[error("VM `{name}`")]
    Open {
        /// The VM.
        name: VmName,
        /// Which file, and why.
        #[source]
        source: OpenError,
    },
    /// The VM's process cannot be started or cannot carry out the request.
    #[error("VM `{name}`")]
    Process {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// The memfd for the state document cannot be created or read.
    #[error("VM `{name}`: cannot fetch its state document")]
    Document {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state document cannot be written to a file.
    #[error("VM `{name}`: cannot write its state document to {}", path.display())]
    Dump {
        /// The VM.
        name: VmName,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address range is not in one segment of the VM's RAM, or is too long.
    #[error(
        "VM `{name}` has no RAM from {address:#x} on for {bytes} bytes that can be read at once: ask \
         for at most {MOST_MEMORY_BYTES} bytes of one segment"
    )]
    OutsideRam {
        /// The VM.
        name: VmName,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// The VM's RAM cannot be read.
    #[error("VM `{name}`: cannot read its RAM")]
    ReadRam {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VM has no network device of that name.
    #[error("VM `{name}` has no network device `{device}`: it has {known}")]
    NoNetworkDevice {
        /// The VM.
        name: VmName,
        /// The name as given, a node of the state document.
        device: String,
        /// The network devices of the VM, in words.
        known: String,
    },
    /// Another VM has a file of the VM, or it has one twice.
    #[error("VM `{name}` cannot be booted")]
    Claimed {
        /// The VM.
        name: VmName,
        /// Which file, and who has it.
        #[source]
        source: ClaimError,
    },
    /// The VM has no such disk, or several.
    #[error(
        "VM `{name}` has no disk that only `{wanted}` names; name one by its device or its path: {known}"
    )]
    NoDisk {
        /// The VM.
        name: VmName,
        /// The name as given.
        wanted: String,
        /// The disks of the VM, in words.
        known: String,
    },
    /// The restore failed again.
    #[error("VM `{name}` cannot be restored; its memory is still preserved: {why}")]
    StillPreserved {
        /// The VM.
        name: VmName,
        /// The chain of causes.
        why: String,
    },
    /// Another program has written to a disk of a preserved VM.
    #[error(
        "VM `{name}` is not restored, because something was written to its disk {} while the VM was preserved: {how}. The \
         guest's memory may not fit the disk any more. Give the VM up with `stop`, or, if the disk is as it was, continue \
         the guest with `restore --force`",
        path.display()
    )]
    DiskWritten {
        /// The VM.
        name: VmName,
        /// The disk.
        path: PathBuf,
        /// What shows it: a clause.
        how: String,
    },
    /// The VM's guest ran, or may have run, when its restore failed, so there is nothing to restore any more.
    #[error(
        "VM `{name}` was not restored, and is lost: {why}. `boot` starts it anew from its disks"
    )]
    Lost {
        /// The VM.
        name: VmName,
        /// The chain of causes.
        why: String,
    },
    /// A process of a VM that has ended does not end.
    #[error(
        "VM `{name}` has ended, but its process {pid} was killed and does not end: it is stuck in the kernel, and may keep \
         the VM's disks and ports busy. The VM does not boot before it is gone: repair what it waits for, such as a disk or \
         a server that does not answer"
    )]
    Lingers {
        /// The VM.
        name: VmName,
        /// The process.
        pid: i32,
    },
    /// The last host has left nothing of a VM that was withheld.
    #[error(
        "VM `{0}` has nothing to restore: the last host has left nothing of it. `boot` starts it anew from its disks"
    )]
    NothingLeft(VmName),
    /// The last host's VMs are lost, as this host has found out late, and so the VM boots.
    #[error("VM `{name}` was not restored, and is lost: {why}. It boots anew from its disks")]
    LostAndBoots {
        /// The VM.
        name: VmName,
        /// The chain of causes.
        why: String,
    },
    /// The host has no VM of this name.
    #[error("there is no VM `{name}`; there is {known}")]
    Unknown {
        /// The name as given.
        name: VmName,
        /// The VMs of the host, in words.
        known: String,
    },
}

/// The state of a VM's life.
#[derive(Debug)]
pub enum Life {
    /// The VM is switched off.
    Stopped,
    /// The VM failed. The value is the chain of causes.
    Failed(Vec<String>),
    /// The VM has a process.
    Live(Live),
    /// The VM came over a live update and could not be restored. The host holds its memory and its state.
    Preserved {
        /// The files with the memory and the state.
        held: Held,
        /// The VM's entry in the manifest. `None` if this program cannot read the manifest that has it.
        entry: Option<Box<VmEntry>>,
        /// Why the last attempt to restore failed: the chain of causes.
        why: Vec<String>,
    },
    /// The VM was preserved, and is being restored. Whoever restores it has its memory and its state. The value says why
    /// the attempt before failed: the chain of causes.
    Restoring(Vec<String>),
    /// The host did not start the VM, because the VM's state may be preserved where this host cannot
    /// reach it. The value is the chain of causes.
    Withheld(Vec<String>),
}

impl Life {
    /// Holds a VM back, whose state may be preserved where this host cannot reach it.
    pub fn withheld(name: &VmName, why: &str, remedy: &str) -> Self {
        let words = format!(
            "VM `{name}` is not started, because its state may be preserved where this host cannot \
             reach it: {remedy}; or give the state up with `stop` and then `boot` the VM"
        );
        tracing::error!("{words}: {why}");
        Self::Withheld(vec![words, why.to_owned()])
    }

    /// Returns the chain of causes, if the VM is failed, preserved, restoring or withheld.
    pub fn why(&self) -> Option<&[String]> {
        match self {
            Self::Failed(why)
            | Self::Withheld(why)
            | Self::Restoring(why)
            | Self::Preserved { why, .. } => Some(why),
            Self::Stopped | Self::Live(_) => None,
        }
    }
}

/// A VM with a process.
#[derive(Debug)]
pub struct Live {
    /// The VM's process.
    pub process: VmProcess,
    /// The segments of guest RAM, in the order of the layout.
    pub segments: Vec<Segment>,
    /// Whether the vCPUs run.
    pub running: bool,
    /// When the VM is ended if its guest, which was asked to shut down, has not done so. `None` if the guest
    /// was not asked.
    pub stopping: Option<Instant>,
    /// Where programs attach to its console: a socket or a pseudoterminal.
    pub console: Option<PathBuf>,
    /// The program that the process runs, if it is an earlier host's.
    pub program: Option<String>,
    /// The command that the process carries out.
    pub errand: Option<Box<Errand>>,
    /// What the VM can be restored from, while its process has not answered the request to resume the guest after an
    /// update that was undone.
    pub resuming: Option<Box<Resuming>>,
}

impl Live {
    /// A VM of this process that was built just now: nothing was asked of it yet, and it has no console.
    pub fn new(process: VmProcess, segments: Vec<Segment>, running: bool) -> Self {
        let (stopping, console, program, errand, resuming) = (None, None, None, None, None);
        Self { process, segments, running, stopping, console, program, errand, resuming }
    }

    /// A VM of this process that runs, and has no RAM.
    #[cfg(test)]
    pub fn without_ram(process: VmProcess) -> Self {
        Self::new(process, Vec::new(), true)
    }
}

/// One VM.
#[derive(Debug)]
pub struct Guest {
    /// The VM's description. Without vCPUs if neither the configuration nor a manifest that this program can read
    /// has one.
    pub machine: Machine,
    confinement: Arc<Confinement>,
    /// The state of the VM's life.
    pub life: Life,
    /// How urgent the VM is.
    pub priority: Priority,
    pub(super) restarts: Restarts,
    pub(super) waiting: Option<Waiting>,
    /// Processes of its past that have not ended yet.
    pub(super) ending: Vec<Ending>,
    /// Why the boot that a command asked for has failed, until the client is told.
    pub(super) failed_boot: Option<GuestError>,
    /// Hints in the guest's CPUID, from the host on which it booted, that are not true of this host.
    pub(super) missing_hints: Vec<String>,
}

impl Guest {
    /// Returns a VM that is switched off.
    pub fn new(machine: Machine, confinement: &Arc<Confinement>) -> Self {
        let confinement = confinement.clone();
        Self {
            machine,
            confinement,
            life: Life::Stopped,
            priority: Priority::default(),
            restarts: Restarts::default(),
            waiting: None,
            ending: Vec::new(),
            failed_boot: None,
            missing_hints: Vec::new(),
        }
    }

    /// Returns the name of the state in the API.
    pub fn state(&self) -> &'static str {
        if let Some(waiting) = &self.waiting {
            return waiting.state();
        }
        match &self.life {
            Life::Stopped => "stopped",
            Life::Failed(_) => "failed",
            Life::Live(live) if live.running && live.stopping.is_some() => "stopping",
            Life::Live(live) if live.running => "running",
            Life::Live(_) => "paused",
            Life::Preserved { .. } => "preserved",
            Life::Restoring(_) => "restoring",
            Life::Withheld(_) => "withheld",
        }
    }

    /// Returns the bytes of the RAM of a VM with a process, touched or not.
    pub fn live_ram_bytes(&self) -> u64 {
        self.segments().iter().map(Segment::len).sum()
    }

    /// Returns the bytes of the VM's RAM that have no memory of the host yet and may be touched at any
    /// time.
    pub fn untouched_bytes(&self) -> u64 {
        // A segment that cannot be examined counts as wholly untouched, the most that it can be.
        let untouched = |segment| guest_mem::untouched_bytes(segment).unwrap_or(segment.len());
        self.segments().iter().map(untouched).sum()
    }

    /// Creates the RAM, starts the VM's process, and boots and runs the guest's kernel. Waits until the guest runs, so this
    /// is only for a host that serves nobody yet. Errors unless the VM is stopped or failed.
    pub fn boot(&mut self, ram: RamSource<'_>) -> Result<(), GuestError> {
        let live = self.begin_boot(ram)?.finish(&self.machine)?;
        self.goes_live(live);
        Ok(())
    }

    pub(super) fn begin_boot(&self, ram: RamSource<'_>) -> Result<Booting, GuestError> {
        self.check_can_boot()?;
        Booting::begin(&self.machine, ram, &self.confinement)
    }

    /// Errors unless the VM is stopped or failed.
    pub(super) fn check_can_boot(&self) -> Result<(), GuestError> {
        match self.life {
            Life::Stopped | Life::Failed(_) if self.machine.cpus == 0 => {
                let remedy = "the configuration does not describe it, so it cannot be booted";
                Err(self.wrong_state(remedy))
            }
            Life::Stopped | Life::Failed(_) => Ok(()),
            Life::Live(_) => Err(self.wrong_state("it has been booted already")),
            Life::Preserved { .. } => {
                let remedy = "`restore` tries again to continue it, `stop` gives its memory up";
                Err(self.wrong_state(remedy))
            }
            Life::Restoring(_) => Err(self.wrong_state("it is being restored")),
            Life::Withheld(_) => {
                let remedy = "its state may be preserved where this host cannot reach it; `stop` gives \
                              that up, and then it can be booted";
                Err(self.wrong_state(remedy))
            }
        }
    }

    pub(super) fn goes_live(&mut self, live: Live) {
        self.missing_hints.clear();
        self.restarts.runs(Instant::now());
        self.life = Life::Live(live);
    }

    /// Reads `bytes` of RAM at a guest-physical address, from the host's own fds: the VM runs on, and its
    /// process is not asked, so it may even hang. Errors unless the range lies in one segment and has at
    /// most [`MOST_MEMORY_BYTES`].
    pub fn memory(&self, address: u64, bytes: u64) -> Result<Vec<u8>, GuestError> {
        let Life::Live(live) = &self.life else {
            return Err(self.wrong_state("only the RAM of a VM that runs or is paused can be read"));
        };
        let layout = ram_layout(self.machine.ram_bytes).map_err(|e| self.ram_error(e))?;
        let (index, offset) = locate(&layout, address, bytes)
            .filter(|_| bytes <= MOST_MEMORY_BYTES)
            .ok_or_else(|| GuestError::OutsideRam { name: self.name(), address, bytes })?;
        let mut memory = vec![0; bytes as usize];
        live.segments[index]
            .file()
            .read_exact_at(&mut memory, offset)
            .map_err(|source| GuestError::ReadRam { name: self.name(), source })?;
        Ok(memory)
    }

    /// Presses the power button: asks the guest to shut down until `deadline`. The caller ends the VM then
    /// ([`stopping`](Self::stopping)). An earlier deadline stays. Errors unless the guest runs.
    pub fn shut_down(&mut self, deadline: Instant) -> Result<(), GuestError> {
        let remedy =
            "its guest cannot shut down: `resume` it first, or end it at once with `stop --now`";
        let (name, wrong) = (self.name(), self.wrong_state(remedy));
        let Life::Live(live) = &mut self.life else { return Err(wrong) };
        if !live.running {
            return Err(wrong);
        }
        // A process that hangs must not delay the host, so nobody waits for its answer.
        live.process
            .notify(Request::PressPowerButton)
            .map_err(|source| GuestError::Process { name, source })?;
        live.stopping = Some(live.stopping.map_or(deadline, |earlier| earlier.min(deadline)));
        Ok(())
    }

    /// Returns when the VM is ended at the latest, if its guest was asked to shut down.
    pub fn stopping(&self) -> Option<Instant> {
        match &self.life {
            Life::Live(live) => live.stopping,
            _ => None,
        }
    }

    /// The description of the machine whose disks the host keeps: that of a VM that is preserved or withheld.
    pub fn kept_machine(&self) -> Option<&Machine> {
        match &self.life {
            Life::Preserved { entry: Some(entry), .. } => Some(&entry.machine),
            Life::Preserved { entry: None, .. } | Life::Withheld(_) => Some(&self.machine),
            _ => None,
        }
    }

    /// Whether the VM is held back, because its state may be preserved where this host cannot reach it.
    pub fn is_withheld(&self) -> bool {
        matches!(self.life, Life::Withheld(_))
    }

    /// Whether the VM has a process.
    pub fn is_live(&self) -> bool {
        matches!(self.life, Life::Live(_))
    }

    /// Whether the VM has ended and is not about to boot, so that there is nothing to stop. A process of it may still be
    /// ending.
    pub fn has_ended(&self) -> bool {
        self.waiting.is_none() && matches!(self.life, Life::Stopped | Life::Failed(_))
    }

    /// Ends the VM at once. A preserved VM loses its memory. One that has ended before is left as it is: its status still
    /// says why it failed.
    pub fn stop(&mut self) {
        if !self.has_ended() {
            self.end_boot();
            self.end_with(Life::Stopped);
        }
    }

    /// Handles an event of the VM's process, or the end of the process (`None`). A VM that boots again does so
    /// when [`boot_if_due`](Self::boot_if_due) is called next, or later.
    pub fn on_event(&mut self, event: Option<Event>) {
        if !self.is_live() {
            return;
        }
        let name = &self.machine.name;
        // An operator asked for the end: the VM does not boot again, however it ends.
        let was_asked = self.stopping().is_some();
        match event {
            Some(Event::Shutdown) if was_asked => {
                tracing::info!("VM `{name}` has shut down");
                self.end_with(Life::Stopped);
            }
            Some(Event::Shutdown) => {
                tracing::info!("VM `{name}` has shut down");
                let down = self.links_down();
                self.ends(End::PowerOff, Life::Stopped, down);
            }
            Some(Event::Reset) if was_asked => {
                tracing::info!("VM `{name}` was asked to shut down and resets: it is stopped");
                self.end_with(Life::Stopped);
            }
            Some(Event::Reset) => {
                tracing::info!("VM `{name}` resets");
                let down = self.links_down();
                self.ends(End::Reset, Life::Stopped, down);
            }
            // The conversation with the process keeps them.
            Some(Event::Link { .. } | Event::Resized { .. } | Event::Booted { .. }) => {}
            Some(Event::Crashed(why)) => self.crashed(why, was_asked),
            None => self.crashed("its process ended".to_owned(), was_asked),
        }
    }

    fn crashed(&mut self, why: String, was_asked: bool) {
        let down = self.links_down();
        self.fail(vec![why.clone()]);
        if !was_asked {
            self.ends(End::Failure, Life::Failed(vec![why]), down);
        }
    }

    pub(super) fn fail(&mut self, why: Vec<String>) {
        tracing::error!("VM `{}` failed: {}", self.machine.name, why.join(": "));
        self.end_with(Life::Failed(why));
    }

    pub(super) fn name(&self) -> VmName {
        self.machine.name.clone()
    }

    pub(super) fn wrong_state(&self, remedy: &'static str) -> GuestError {
        GuestError::WrongState { name: self.name(), state: self.state(), remedy }
    }

    fn ram_error(&self, source: impl Into<RamError>) -> GuestError {
        GuestError::Ram { name: self.name(), source: source.into() }
    }
}

/// Returns the index of the segment that contains the whole range of guest-physical addresses, and the
/// offset of the range in that segment. `None` if no single segment contains it.
fn locate(layout: &Layout, address: u64, bytes: u64) -> Option<(usize, u64)> {
    layout.segments().iter().enumerate().find_map(|(index, plan)| {
        let base = layout.slots()[plan.slot].guest_base + plan.offset_in_slot;
        let offset = address.checked_sub(base)?;
        (offset.checked_add(bytes)? <= plan.len).then_some((index, offset))
    })
}

/// Creates the segments of the RAM of a VM. Errors if the host has too little memory beside what the source has
/// promised to others.
pub(super) fn create_ram(
    name: &VmName,
    wanted: u64,
    ram: RamSource<'_>,
) -> Result<Vec<Segment>, GuestError> {
    // A pool has its own memory and itself errors when that is used up.
    if ram.kind() == Ram::Memfd {
        let available = ram::available_bytes().map_err(GuestError::Meminfo)?;
        let promised = ram.promised();
        if wanted > available.saturating_sub(promised) {
            let name = name.clone();
            return Err(GuestError::NotEnoughRam { name, wanted, available, promised });
        }
    }
    let error = |source| GuestError::Ram { name: name.clone(), source };
    let layout = ram_layout(wanted).map_err(|source| error(source.into()))?;
    let plans = layout.segments().iter().enumerate();
    plans.map(|(index, plan)| ram.create(name.as_str(), index, plan.len).map_err(error)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_ram_is_found_in_the_one_segment_that_has_all_of_it() {
        let layout = ram_layout(4 << 30).unwrap();
        let plans = layout.segments();
        let segment = plans[0].len;
        assert_eq!(locate(&layout, 0, 8), Some((0, 0)));
        assert_eq!(locate(&layout, segment + 16, 8), Some((1, 16)));
        assert_eq!(locate(&layout, segment - 8, 8), Some((0, segment - 8)));
        assert_eq!(locate(&layout, segment - 8, 9), None, "it reaches into the next one");
        // In the hole of the PCI devices, behind the hole, and beyond the end.
        let [low, high] = layout.slots() else { panic!("{:?}", layout.slots()) };
        assert_eq!(locate(&layout, low.len, 8), None);
        let first = plans.iter().position(|plan| plan.slot == 1).unwrap();
        assert_eq!(locate(&layout, high.guest_base, 8), Some((first, 0)));
        assert_eq!(locate(&layout, high.guest_base + high.len - 7, 8), None);
        assert_eq!(locate(&layout, u64::MAX, 8), None);
        assert_eq!(locate(&layout, 8, u64::MAX), None);
    }
}
