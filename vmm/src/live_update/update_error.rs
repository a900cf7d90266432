//! Errors of a live update or a handover that did not take place.

use std::path::PathBuf;
use std::time::Duration;

use guest_mem::Error as MemoryError;

use super::file_systems::SyncError;
use super::next_host::NextHostError;
use super::next_kernel::NextKernelError;
use super::preflight::{Finding, joined};
use super::{Outcome, Step};
use crate::guests::conversation::ProcessError;
use crate::machine::VmName;
use crate::state::StateError;

/// Why a live update or a handover did not take place. Every guest runs on, unless
/// [`outcome`](Self::outcome) says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The operator asked to stop before this step.
    #[error("stopped before the step `{0}`, as asked")]
    Stopped(Step),
    /// A session of the last live update is not finished.
    #[error(
        "session `{0}` of the last live update could not be finished, and would be lost by another: \
         see the host's log"
    )]
    UnfinishedSession(String),
    /// The next kernel cannot be used.
    #[error("the next kernel cannot be loaded")]
    NextKernel(#[from] NextKernelError),
    /// The next host could not open disks of VMs, so these VMs would stand still.
    #[error("{}", joined(.0))]
    Disks(Vec<Finding>),
    /// The next host's program cannot be used.
    #[error("the next host cannot take over")]
    NextHost(#[from] NextHostError),
    /// A LUO operation failed.
    #[error("step `{step}`{}", about(vm.as_ref()))]
    Luo {
        /// The step.
        step: Step,
        /// The VM, unless the operation was for the host itself.
        vm: Option<VmName>,
        /// Why.
        #[source]
        source: luo::Error,
    },
    /// Requests to the VM's disks use the memory that is to be preserved.
    #[error(
        "step `{step}`: VM `{vm}`: its RAM cannot be preserved while its disks use it: {disks}. Repair a disk that does \
         not answer, stop the VM, or leave the VM out (`--without {vm}`)"
    )]
    InFlight {
        /// The step.
        step: Step,
        /// The VM.
        vm: VmName,
        /// The disks, with the number of their requests and for how long the oldest one waits.
        disks: String,
        /// Why.
        #[source]
        source: Box<luo::Error>,
    },
    /// Preserving guest RAM would take more memory than the host has.
    #[error(
        "preserving guest RAM fills its holes, which takes {} MiB, and the host has {} MiB available: \
         stop a VM, or free memory otherwise",
        .holes >> 20,
        .available >> 20
    )]
    NoRoomForHoles {
        /// Bytes without memory in the segments that the guests have touched.
        holes: u64,
        /// `MemAvailable`, in bytes.
        available: u64,
    },
    /// khugepaged may replace pages while they are preserved, and the guest's writes would be lost.
    #[error("step `preserve-ram`: khugepaged cannot be stopped while guest RAM is preserved")]
    Khugepaged(#[source] MemoryError),
    /// The host's available memory cannot be found out.
    #[error("cannot find out how much memory the host has available")]
    Meminfo(#[source] std::io::Error),
    /// It cannot be found out which of the VM's segments were touched.
    #[error("VM `{vm}`: cannot examine its RAM")]
    Ram {
        /// The VM.
        vm: VmName,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The page frames of the VM's RAM cannot be found out.
    #[error("VM `{vm}`: cannot verify its page frames")]
    Frames {
        /// The VM.
        vm: VmName,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// A VM's process did not carry out a request.
    #[error("step `{step}`: VM `{vm}`")]
    Process {
        /// The step.
        step: Step,
        /// The VM.
        vm: VmName,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// The processes of several VMs did not carry out a request in time.
    #[error("step `{step}`: VMs `{}`", list(vms))]
    Late {
        /// The step.
        step: Step,
        /// The VMs.
        vms: Vec<VmName>,
        /// Why each of them did not.
        #[source]
        source: ProcessError,
    },
    /// The blackout would take longer than it may.
    #[error(
        "step `{step}`: the blackout has taken longer than {budget:?}, which `budget` in [update] allows: \
         raise it, or find out with `--stop-before` what takes so long"
    )]
    OverBudget {
        /// The step that is not begun.
        step: Step,
        /// The budget.
        budget: Duration,
    },
    /// Something keeps this process from ending, so systemd would not start the next one.
    #[error(
        "this host is still {}. systemd starts no other host before that has ended, and all guests would stand still until \
         then. Repair what it waits for, such as a disk or a server that does not answer",
        work.join(" and ")
    )]
    Unended {
        /// What does.
        work: Vec<String>,
    },
    /// The host's own code panicked.
    #[error("this host has a defect, please report it: {0}")]
    Defect(String),
    /// A document cannot be written.
    #[error("step `{step}`{}: cannot write the {what}", about(vm.as_ref()))]
    Document {
        /// The step.
        step: Step,
        /// The VM whose state document it is.
        vm: Option<VmName>,
        /// The document.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The host's file systems cannot be made durable.
    #[error("step `{step}`")]
    Sync {
        /// The step.
        step: Step,
        /// Why.
        #[source]
        source: SyncError,
    },
    /// The process of a VM cannot sync a disk, and neither can the host in its place.
    #[error("step `sync`: VM `{vm}`: its process cannot make durable what its guest wrote to {}, and neither can the host", path.display())]
    SyncDisk {
        /// The VM.
        vm: VmName,
        /// The disk.
        path: PathBuf,
        /// Why the host cannot.
        #[source]
        source: std::io::Error,
    },
    /// A VM's process ended in an update that was undone, after the guest's state was saved, and the VM could not be
    /// restored.
    #[error(
        "VM `{vm}` is preserved, because its process ended ({ended}) and it cannot be restored ({why}): see `restore`"
    )]
    Preserved {
        /// The VM.
        vm: VmName,
        /// Why its process ended.
        ended: String,
        /// Why it cannot be restored.
        why: String,
        /// Why the update was undone.
        #[source]
        source: Box<UpdateError>,
    },
    /// The same, and the guest ran, or may have run, when the restore failed.
    #[error(
        "VM `{vm}` is lost, because its process ended ({ended}) and so did the one that was to continue its guest \
         ({why}): `boot` starts it anew from its disks"
    )]
    Lost {
        /// The VM.
        vm: VmName,
        /// Why its process ended.
        ended: String,
        /// Why its guest was not continued.
        why: String,
        /// Why the update was undone.
        #[source]
        source: Box<UpdateError>,
    },
    /// The manifest cannot be encoded.
    #[error("the manifest cannot be encoded")]
    Manifest(#[from] StateError),
    /// The running kernel did not enter the next one.
    #[error("the running kernel did not enter the next one")]
    Jump(#[source] kexec::JumpError),
    /// The orchestrator returned success without calling `jump`.
    #[error("LUO reported a switch without a jump: this is a bug, please report it")]
    NoJump,
}

fn about(vm: Option<&VmName>) -> String {
    vm.map_or_else(String::new, |vm| format!(": VM `{vm}`"))
}

fn list(vms: &[VmName]) -> String {
    vms.iter().map(VmName::as_str).collect::<Vec<_>>().join("`, `")
}

impl UpdateError {
    /// Returns the VMs that the error is about, if it is about single VMs.
    pub fn vms(&self) -> Vec<&VmName> {
        match self {
            Self::Late { vms, .. } => vms.iter().collect(),
            _ => self.vm().into_iter().collect(),
        }
    }

    /// Returns the VM that the error is about, if it is about one VM.
    pub fn vm(&self) -> Option<&VmName> {
        match self {
            Self::Luo { vm, .. } | Self::Document { vm, .. } => vm.as_ref(),
            Self::Ram { vm, .. }
            | Self::Frames { vm, .. }
            | Self::Process { vm, .. }
            | Self::SyncDisk { vm, .. }
            | Self::InFlight { vm, .. } => Some(vm),
            _ => None,
        }
    }

    /// Whether the service manager that keeps the files of the VMs did not answer. Nothing is wrong with a VM.
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::Luo { source, .. } if source.is_unanswered())
    }

    /// Whether something keeps this process from ending. Nothing is wrong with a VM.
    pub fn is_unended(&self) -> bool {
        matches!(self, Self::Unended { .. })
    }

    /// Whether the host itself was short of memory, files or buffers. Nothing is wrong with a VM that the error names.
    pub fn is_shortage(&self) -> bool {
        use luo::Errno;
        let errno = match self {
            Self::Luo { source, .. } => source.errno(),
            Self::Document { source, .. } => Errno::from_io_error(source),
            _ => None,
        };
        matches!(
            errno,
            Some(Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::TOOMANYREFS)
        )
    }

    /// Whether there was no room for a file.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Luo { source, .. } if source.errno() == Some(luo::Errno::NOSPC))
    }

    /// Returns what became of the guests: those that ran run on, and those that were preserved still are. A guest whose
    /// process ended before the guest's state was saved is lost.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Process { step, source, .. } if *step <= Step::Save && source.is_end() => {
                Outcome::Lost
            }
            Self::Preserved { source, .. } => source.outcome().max(Outcome::Preserved),
            Self::Lost { .. } => Outcome::Lost,
            _ => Outcome::Running,
        }
    }
}
