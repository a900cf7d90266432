//! The report of a live update or a handover: when each phase began and ended, in both kernels.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use guest_mem::FrameDigest;
use serde::{Deserialize, Serialize};

use crate::guests::ledger::{Ledger, TscRate};
use crate::live_update::Outcome;
use crate::live_update::incoming::FrameComparison;
use crate::machine::VmName;

/// Largest report that is read from a file, in bytes. One VM needs about a kilobyte.
const MAX_REPORT: u64 = 16 << 20;

/// The answer to `report`. Times are in nanoseconds from the start of the live update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The host.
    pub host: HostReport,
    /// The VMs, in the order in which they were resumed.
    pub vms: Vec<VmReport>,
    /// Bytes of the segments that have a page in another page frame than before. No step of an update
    /// copies guest RAM, so segments that were not compared (see `frames`) count as 0.
    pub guest_ram_bytes_copied: u64,
}

impl Report {
    /// Writes the report to a file, whole or not at all.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, path)
    }

    /// Reads a report that a host wrote.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        File::open(path)?.take(MAX_REPORT).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// The host in [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// What was replaced.
    pub replaced: Replaced,
    /// Release and version of the old kernel.
    pub kernel_before: String,
    /// Release and version of the new kernel.
    pub kernel_after: String,
    /// The LUO backend.
    pub luo: String,
    /// Number of live updates since the last cold boot.
    pub number: u32,
    /// From the last instruction of the old host to the first of the new one.
    pub reboot_to_init_ns: u64,
    /// Rate of the host's TSC, in kHz.
    pub counter_khz: u32,
    /// The phases of the host.
    pub phases: Vec<PhaseReport>,
}

/// What was replaced: the kernel under the VMs, or the host's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Replaced {
    /// The kernel: a live update.
    Kernel,
    /// The host's program: a handover.
    Program,
}

/// One phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Name of the phase.
    pub name: String,
    /// When the phase began.
    pub start_ns: u64,
    /// When the phase ended.
    pub end_ns: u64,
}

/// One VM in [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM's name.
    pub name: VmName,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// Size of the VM's state document, in bytes.
    #[serde(default)]
    pub state_bytes: u64,
    /// From the last vCPU leaving `KVM_RUN` to the first entering it again; `None` if the VM was
    /// not running or did not resume.
    pub blackout_ns: Option<u64>,
    /// What became of the VM.
    pub outcome: Outcome,
    /// Why the VM does not run: the chain of causes, outermost first.
    #[serde(default)]
    pub error: Option<Vec<String>>,
    /// What the operator can do about it.
    #[serde(default)]
    pub remedy: Option<String>,
    /// The phases of the VM.
    pub phases: Vec<PhaseReport>,
    /// The comparison of the page frames of guest RAM, if `verify_frames` was given.
    pub frames: Option<FramesReport>,
    /// Numbers of segments of guest RAM.
    pub segments: SegmentsReport,
}

/// Page frames before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FramesReport {
    /// Digest over the frame numbers in the old kernel, hexadecimal.
    pub before: String,
    /// The same in the new kernel.
    pub after: String,
    /// Number of pages compared.
    pub pages: u64,
    /// Bytes of the segments that have a page in another frame.
    pub moved_bytes: u64,
}

impl FramesReport {
    /// Combines the digests of all compared segments of one VM.
    pub fn new(segments: &[FrameComparison]) -> Self {
        let (mut before, mut after) = (FrameDigest::default(), FrameDigest::default());
        for segment in segments {
            before.append(segment.before);
            after.append(segment.after);
        }
        let moved = segments.iter().filter(|segment| segment.before != segment.after);
        Self {
            before: format!("{:016x}", before.hash),
            after: format!("{:016x}", after.hash),
            pages: after.pages,
            moved_bytes: moved.map(|segment| segment.bytes).sum(),
        }
    }
}

/// Numbers of segments of guest RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentsReport {
    /// Segments that were preserved.
    pub preserved: u64,
    /// Segments that the guest never touched, and that were created again, all zero.
    pub recreated: u64,
}

/// Converts a ledger's phases to nanoseconds from `origin`, which is in ticks.
pub fn phases(ledger: &Ledger, origin: u64, rate: TscRate) -> Vec<PhaseReport> {
    let ns = |tsc| rate.nanoseconds(origin, tsc);
    ledger
        .phases
        .iter()
        .map(|p| PhaseReport { name: p.name.clone(), start_ns: ns(p.start), end_ns: ns(p.end) })
        .collect()
}
