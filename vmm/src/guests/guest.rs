//! One VM as the host holds it: its description, its RAM, its process, and where it is in its life.
//!
//! ```text
//!   Stopped --boot--> Live --guest shuts down, stop--> Stopped
//!                      |  \--process dies, vCPU fails--> Failed --boot--> Live
//!                      |
//!                    kexec --restored--> Live      restore fails --> Preserved --retry--> Live
//!                        \--the pool is out of reach--> Withheld --stop--> Stopped
//! ```

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use guest_mem::{Layout, Segment};
use luo::Incoming;

use super::conversation::{ProcessError, unexpected};
use super::entry::VmEntry;
use super::files::{Files, OpenError};
use super::memfd::document_memfd;
use super::process::VmProcess;
use super::ram::{self, RamError, RamSource};
use crate::link::{Event, Ram, Reply, Request, Role};
use crate::machine::{Machine, VmName};
use crate::vm::ram_layout;

/// Most bytes of a VM's RAM in one reply of the API.
pub const MOST_MEMORY_BYTES: u64 = 16 << 10;

/// What an operator asked of a VM cannot be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The VM is not in the state that the command needs.
    #[error("VM `{name}` is {state}: {remedy}")]
    WrongState {
        /// The VM.
        name: VmName,
        /// Its state.
        state: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// More RAM than the host can give.
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
        /// Its RAM.
        wanted: u64,
        /// `MemAvailable`, in bytes.
        available: u64,
        /// Bytes that other VMs have and did not touch yet.
        promised: u64,
    },
    /// How much RAM the host has cannot be found out.
    #[error("cannot read /proc/meminfo")]
    Meminfo(#[source] io::Error),
    /// An fd cannot be duplicated.
    #[error("VM `{name}`: cannot hand its RAM to its process")]
    Clone {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its RAM cannot be made.
    #[error("VM `{name}`: cannot create its RAM")]
    Ram {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: RamError,
    },
    /// A file that it needs cannot be opened.
    #[error("VM `{name}`")]
    Open {
        /// The VM.
        name: VmName,
        /// Which file, and why.
        #[source]
        source: OpenError,
    },
    /// Its process cannot do it.
    #[error("VM `{name}`")]
    Process {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// Its state document cannot be fetched from its process.
    #[error("VM `{name}`: cannot fetch its state document")]
    Document {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its state document cannot be written to a file.
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
    /// The address range is not one that can be read from its RAM.
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
    /// Its RAM cannot be read.
    #[error("VM `{name}`: cannot read its RAM")]
    ReadRam {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its restore failed again.
    #[error("VM `{name}` cannot be restored; its memory is still preserved: {why}")]
    StillPreserved {
        /// The VM.
        name: VmName,
        /// The chain of causes.
        why: String,
    },
    /// There is no such VM.
    #[error("there is no VM `{name}`; there is {known}")]
    Unknown {
        /// The name as given.
        name: VmName,
        /// The VMs of the host.
        known: String,
    },
}

/// Where a VM is in its life.
#[derive(Debug)]
pub enum Life {
    /// It is switched off.
    Stopped,
    /// It ended by itself, for these reasons.
    Failed(Vec<String>),
    /// It has a process.
    Live(Live),
    /// It came over a live update and could not be restored, for these reasons. The session keeps
    /// its memory.
    Preserved {
        /// Holds the memory; never finished, so that a retry finds everything.
        session: Incoming,
        /// What the manifest says of it.
        entry: Box<VmEntry>,
        /// Why the last attempt failed.
        why: Vec<String>,
    },
    /// It was not started, for these reasons: it may have come over a live update, to where this host
    /// cannot reach.
    Withheld(Vec<String>),
}

/// A VM with a process.
#[derive(Debug)]
pub struct Live {
    /// Its process.
    pub process: VmProcess,
    /// Its RAM, in the order of the layout.
    pub segments: Vec<Segment>,
    /// Whether its vCPUs run.
    pub running: bool,
}

/// One VM.
#[derive(Debug)]
pub struct Guest {
    /// Its description.
    pub machine: Machine,
    /// Where it is in its life.
    pub life: Life,
}

impl Guest {
    /// A VM that is switched off.
    pub fn new(machine: Machine) -> Self {
        Self { machine, life: Life::Stopped }
    }

    /// The state's name in the API.
    pub fn state(&self) -> &'static str {
        match &self.life {
            Life::Stopped => "stopped",
            Life::Failed(_) => "failed",
            Life::Live(live) if live.running => "running",
            Life::Live(_) => "paused",
            Life::Preserved { .. } => "preserved",
            Life::Withheld(_) => "withheld",
        }
    }

    /// Does not start it, because its state may be somewhere that cannot be reached. `can_be_passed_on`:
    /// a live update leaves it there for the next host.
    pub fn withhold(&mut self, why: &str, can_be_passed_on: bool) {
        let name = &self.machine.name;
        let remedy = match can_be_passed_on {
            true => {
                "mend that and start the host again, or `update` to a host that can, and it goes on"
            }
            false => "mend that and start the host again",
        };
        let words = format!(
            "VM `{name}` is not started, because its state may be preserved where this host cannot \
             reach it: {remedy}; or `stop` it to give its state up, and then `boot` it"
        );
        tracing::error!("{words}: {why}");
        self.life = Life::Withheld(vec![words, why.to_owned()]);
    }

    /// Bytes of its RAM that have no memory of the host yet, and may be touched at any time.
    pub fn untouched_bytes(&self) -> u64 {
        let Life::Live(live) = &self.life else { return 0 };
        // What cannot be examined may be untouched as a whole.
        let untouched = |segment| guest_mem::untouched_bytes(segment).unwrap_or(segment.len());
        live.segments.iter().map(untouched).sum()
    }

    /// Creates the RAM, starts a process, boots the kernel and lets it run.
    pub fn boot(&mut self, ram: RamSource<'_>) -> Result<(), GuestError> {
        match self.life {
            Life::Stopped | Life::Failed(_) => {}
            Life::Live(_) => return Err(self.wrong_state("it has been booted already")),
            Life::Preserved { .. } => {
                let remedy = "`restore` tries again to continue it, `stop` gives its memory up";
                return Err(self.wrong_state(remedy));
            }
            Life::Withheld(_) => {
                let remedy = "its state may be preserved where this host cannot reach it; `stop` gives \
                              that up, and then it can be booted";
                return Err(self.wrong_state(remedy));
            }
        }
        let segments = self.create_ram(ram)?;
        let mut files = Files::for_machine(&self.machine)
            .and_then(|files| files.with_kernel(&self.machine))
            .map_err(|source| GuestError::Open { name: self.name(), source })?;
        for segment in &segments {
            let clone = segment.file().try_clone();
            let clone = clone.map_err(|source| GuestError::Clone { name: self.name(), source })?;
            files.push(Role::Segment, clone);
        }
        let start = || {
            let process = VmProcess::spawn()?;
            let request = Request::Boot { machine: self.machine.clone(), ram: ram.kind() };
            process.send(request, &files.borrow())?;
            match process.reply()? {
                Reply::Built => {}
                other => return Err(unexpected("boot", &other)),
            }
            process.ask(Request::Resume)?;
            Ok(process)
        };
        let process = start().map_err(|source| self.process_error(source))?;
        self.life = Life::Live(Live { process, segments, running: true });
        Ok(())
    }

    fn create_ram(&self, ram: RamSource<'_>) -> Result<Vec<Segment>, GuestError> {
        let wanted = self.machine.ram_bytes;
        // A pool has memory of its own, and says itself how much is left.
        if ram.kind() == Ram::Memfd {
            let available = ram::available_bytes().map_err(GuestError::Meminfo)?;
            let promised = ram.promised();
            if wanted > available.saturating_sub(promised) {
                return Err(GuestError::NotEnoughRam {
                    name: self.name(),
                    wanted,
                    available,
                    promised,
                });
            }
        }
        let layout = ram_layout(wanted).map_err(|e| self.ram_error(e))?;
        let plans = layout.segments().iter().enumerate();
        plans
            .map(|(index, plan)| ram.create(self.machine.name.as_str(), index, plan.len))
            .collect::<Result<_, _>>()
            .map_err(|e| self.ram_error(e))
    }

    /// Stops the vCPUs and the devices.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        self.set_running(false, Request::Pause, "only a VM that runs can be paused")
    }

    /// Lets the vCPUs and the devices go on.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        self.set_running(true, Request::Resume, "only a VM that is paused can be resumed")
    }

    fn set_running(
        &mut self,
        running: bool,
        request: Request,
        remedy: &'static str,
    ) -> Result<(), GuestError> {
        let name = self.name();
        let wrong = self.wrong_state(remedy);
        let Life::Live(live) = &mut self.life else { return Err(wrong) };
        if live.running == running {
            return Err(wrong);
        }
        live.process.ask(request).map_err(|source| GuestError::Process { name, source })?;
        live.running = running;
        Ok(())
    }

    /// Writes the state document to a new file at `path`. A running VM pauses for it.
    pub fn dump(&mut self, path: &Path) -> Result<(), GuestError> {
        let document = self.dumped()?;
        let write = || -> io::Result<()> {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(&document)
        };
        write().map_err(|source| GuestError::Dump { name: self.name(), path: path.into(), source })
    }

    /// The state document. A running VM pauses for it.
    pub fn dumped(&mut self) -> Result<Vec<u8>, GuestError> {
        let pauses = matches!(&self.life, Life::Live(live) if live.running);
        if pauses {
            self.pause()?;
        }
        let document = self.document();
        if pauses {
            self.resume()?;
        }
        document
    }

    /// Reads `bytes` of RAM at a guest-physical address. The VM goes on meanwhile, and its process is
    /// not asked: the RAM of one that hangs can be read, too. The range must lie in one segment.
    pub fn memory(&self, address: u64, bytes: u64) -> Result<Vec<u8>, GuestError> {
        let Life::Live(live) = &self.life else {
            return Err(self.wrong_state("only the RAM of a VM that runs or is paused can be read"));
        };
        let layout = ram_layout(self.machine.ram_bytes).map_err(|e| self.ram_error(e))?;
        let (index, offset) = place(&layout, address, bytes)
            .filter(|_| bytes <= MOST_MEMORY_BYTES)
            .ok_or_else(|| GuestError::OutsideRam { name: self.name(), address, bytes })?;
        let mut memory = vec![0; bytes as usize];
        live.segments[index]
            .file()
            .read_exact_at(&mut memory, offset)
            .map_err(|source| GuestError::ReadRam { name: self.name(), source })?;
        Ok(memory)
    }

    /// The state document of a VM that is paused.
    fn document(&self) -> Result<Vec<u8>, GuestError> {
        let Life::Live(live) = &self.life else {
            return Err(self.wrong_state("only a VM that runs or is paused has a state"));
        };
        let error = |source| GuestError::Document { name: self.name(), source };
        let file = document_memfd("dump", &[]).map_err(error)?;
        let ask = || {
            live.process.send(Request::Save, &[(Role::State, file.as_fd())])?;
            match live.process.reply()? {
                Reply::Saved { .. } => Ok(()),
                other => Err(unexpected("save", &other)),
            }
        };
        ask().map_err(|source| self.process_error(source))?;
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).map_err(error)?;
        Ok(bytes)
    }

    /// Ends the VM at once. A preserved one loses its memory.
    pub fn stop(&mut self) {
        self.life = Life::Stopped;
    }

    /// Reacts to what the VM's process said, or to its end (`None`).
    pub fn on_event(&mut self, event: Option<Event>, ram: RamSource<'_>) {
        let name = &self.machine.name;
        match event {
            Some(Event::Shutdown) => {
                tracing::info!("VM `{name}` has shut down");
                self.life = Life::Stopped;
            }
            Some(Event::Reset) => {
                tracing::info!("VM `{name}` resets");
                self.life = Life::Stopped;
                if let Err(error) = self.boot(ram) {
                    let why = crate::causes::chain(&error);
                    tracing::error!("VM `{}`: {}", self.machine.name, why.join(": "));
                    self.life = Life::Failed(why);
                }
            }
            Some(Event::Crashed(why)) => self.fail(vec![why]),
            None => self.fail(vec!["its process ended".to_owned()]),
        }
    }

    fn fail(&mut self, why: Vec<String>) {
        tracing::error!("VM `{}` failed: {}", self.machine.name, why.join(": "));
        self.life = Life::Failed(why);
    }

    fn name(&self) -> VmName {
        self.machine.name.clone()
    }

    fn wrong_state(&self, remedy: &'static str) -> GuestError {
        GuestError::WrongState { name: self.name(), state: self.state(), remedy }
    }

    fn ram_error(&self, source: impl Into<RamError>) -> GuestError {
        GuestError::Ram { name: self.name(), source: source.into() }
    }

    fn process_error(&self, source: ProcessError) -> GuestError {
        GuestError::Process { name: self.name(), source }
    }
}

/// The segment that has all of a range of guest-physical addresses, and where in it the range begins.
fn place(layout: &Layout, address: u64, bytes: u64) -> Option<(usize, u64)> {
    layout.segments().iter().enumerate().find_map(|(index, plan)| {
        let base = layout.slots()[plan.slot].guest_base + plan.offset_in_slot;
        let offset = address.checked_sub(base)?;
        (offset.checked_add(bytes)? <= plan.len).then_some((index, offset))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_ram_is_found_in_the_one_segment_that_has_all_of_it() {
        let layout = ram_layout(4 << 30).unwrap();
        let plans = layout.segments();
        let segment = plans[0].len;
        assert_eq!(place(&layout, 0, 8), Some((0, 0)));
        assert_eq!(place(&layout, segment + 16, 8), Some((1, 16)));
        assert_eq!(place(&layout, segment - 8, 8), Some((0, segment - 8)));
        assert_eq!(place(&layout, segment - 8, 9), None, "it reaches into the next one");
        // The hole of the PCI devices, behind it, and beyond the end.
        let [low, high] = layout.slots() else { panic!("{:?}", layout.slots()) };
        assert_eq!(place(&layout, low.len, 8), None);
        let first = plans.iter().position(|plan| plan.slot == 1).unwrap();
        assert_eq!(place(&layout, high.guest_base, 8), Some((first, 0)));
        assert_eq!(place(&layout, high.guest_base + high.len - 7, 8), None);
        assert_eq!(place(&layout, u64::MAX, 8), None);
        assert_eq!(place(&layout, 8, u64::MAX), None);
    }
}
