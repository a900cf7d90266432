//! A boot of a VM that has begun: its files are opened and its process builds the machine, until the guest runs.
//!
//! ```text
//!   begin: RAM, process --> Opening --> Confining --> Building --> Resuming --> live
//! ```
//!
//! None of this waits, because all of it can take long: a disk on a server that is gone is never opened, and the process
//! searches the disk of a guest, which the guest has made, for a kernel. So a guest that resets again and again would
//! otherwise take the host's loop for itself.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use guest_mem::Segment;

use super::answers::readable;
use super::confinement::Confinement;
use super::conversation::{ANSWER_WITHIN, ProcessError, unexpected};
use super::files::{Files, OpenError};
use super::guest::{GuestError, Live, create_ram};
use super::opening::Opening;
use super::process::VmProcess;
use super::ram::RamSource;
use crate::link::{LinkError, Ram, Reply, Request, Role};
use crate::machine::Machine;

/// A boot that has begun. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Booting {
    process: VmProcess,
    segments: Vec<Segment>,
    ram: Ram,
    files: Files,
    stage: Stage,
    /// When the stage must have ended.
    deadline: Instant,
}

/// What a boot waits for.
#[derive(Debug)]
enum Stage {
    /// The host opens the files that the VM needs.
    Opening(Opening),
    /// The process confines itself.
    Confining,
    /// The process builds the machine and loads the guest's kernel.
    Building,
    /// The process resumes the guest.
    Resuming,
    /// The guest runs.
    Live,
}

/// Why a boot goes no further.
enum Failed {
    Open(OpenError),
    Process(ProcessError),
}

impl From<OpenError> for Failed {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl From<ProcessError> for Failed {
    fn from(error: ProcessError) -> Self {
        Self::Process(error)
    }
}

impl Failed {
    fn of(self, machine: &Machine) -> GuestError {
        let name = machine.name.clone();
        match self {
            Self::Open(source) => GuestError::Open { name, source },
            Self::Process(source) => GuestError::Process { name, source },
        }
    }
}

impl Booting {
    /// Creates the RAM, starts the VM's process, and begins to open its files.
    pub(super) fn begin(
        machine: &Machine,
        ram: RamSource<'_>,
        confinement: &Arc<Confinement>,
    ) -> Result<Self, GuestError> {
        let segments = create_ram(&machine.name, machine.ram_bytes, ram)?;
        let begin = || {
            let opening = Opening::begin_with_kernel(machine)?;
            Ok((VmProcess::spawn(confinement)?, opening))
        };
        let (process, opening) = begin().map_err(|failed: Failed| failed.of(machine))?;
        Ok(Self {
            process,
            segments,
            ram: ram.kind(),
            files: Files::default(),
            stage: Stage::Opening(opening),
            deadline: Instant::now() + ANSWER_WITHIN,
        })
    }

    /// Waits until the guest runs.
    pub(super) fn finish(mut self, machine: &Machine) -> Result<Live, GuestError> {
        loop {
            readable(&[self.as_fd()], self.deadline);
            if self.go_on(machine)? {
                return Ok(self.into_live());
            }
        }
    }

    /// Goes on as far as that is possible without waiting. Returns whether the guest runs. Errors if the boot failed, or
    /// has stood still for too long.
    pub(super) fn go_on(&mut self, machine: &Machine) -> Result<bool, GuestError> {
        while !readable(&[self.as_fd()], Instant::now()).is_empty() {
            if !self.step(machine).map_err(|failed| failed.of(machine))? {
                break;
            }
            self.deadline = Instant::now() + ANSWER_WITHIN;
            if let Stage::Live = self.stage {
                return Ok(true);
            }
        }
        match Instant::now() < self.deadline {
            true => Ok(false),
            false => Err(self.is_late().of(machine)),
        }
    }

    /// Does what has become possible. Returns whether the stage has changed.
    fn step(&mut self, machine: &Machine) -> Result<bool, Failed> {
        if let Stage::Opening(_) = self.stage {
            if let Stage::Opening(opening) = std::mem::replace(&mut self.stage, Stage::Confining) {
                self.files = opening.files()?;
            }
            return Ok(true);
        }
        let Some(answer) = self.process.take_answer() else { return Ok(false) };
        self.stage = match (&self.stage, answer?) {
            (Stage::Opening(_) | Stage::Confining, reply) => {
                self.process.confined(reply)?;
                let (machine, ram) = (machine.clone(), self.ram);
                let mut fds = self.files.borrow();
                fds.extend(self.segments.iter().map(|segment| (Role::Segment, segment.as_fd())));
                self.process.send(Request::Boot { machine, ram, nested: false }, &fds)?;
                Stage::Building
            }
            (Stage::Building, Reply::Built) => {
                self.process.send(Request::Resume, &[])?;
                Stage::Resuming
            }
            (Stage::Resuming | Stage::Live, Reply::Resumed { .. }) => Stage::Live,
            (Stage::Building, other) => return Err(unexpected("boot", &other).into()),
            (Stage::Resuming | Stage::Live, other) => {
                return Err(unexpected("resume", &other).into());
            }
        };
        Ok(true)
    }

    fn is_late(&self) -> Failed {
        let request = match &self.stage {
            Stage::Opening(opening) => return opening.is_late(ANSWER_WITHIN).into(),
            Stage::Confining => "confine itself",
            Stage::Building => "boot the guest",
            Stage::Resuming | Stage::Live => "resume the guest",
        };
        ProcessError::Link { request, source: LinkError::TimedOut }.into()
    }

    /// The VM, whose guest runs.
    pub(super) fn into_live(self) -> Live {
        let Self { process, segments, files, .. } = self;
        Live { console: files.console(), ..Live::new(process, segments, true) }
    }

    /// When the boot has failed if it stands still until then.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The segments of guest RAM.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The process.
    pub(super) fn process(&self) -> &VmProcess {
        &self.process
    }
}

/// What becomes readable when the boot can go on.
impl AsFd for Booting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stage {
            Stage::Opening(opening) => opening.as_fd(),
            _ => self.process.as_fd(),
        }
    }
}
