//! The report of a live update: where each millisecond went, in both kernels.

use guest_mem::FrameDigest;
use serde::{Deserialize, Serialize};

use crate::guests::ledger::{Ledger, TscRate};
use crate::live_update::Outcome;
use crate::live_update::incoming::Frames;
use crate::machine::VmName;

/// The answer to `report`. Times are in nanoseconds from the start of the live update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The host.
    pub host: HostReport,
    /// The VMs, in the order in which they were resumed.
    pub vms: Vec<VmReport>,
    /// Bytes of guest RAM that are not in the page frames that they were in. No step of an update
    /// copies any: what is not compared (see `frames`) counts as 0.
    pub guest_ram_bytes_copied: u64,
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
    /// How many live updates there have been since the last cold boot.
    pub number: u32,
    /// From the last instruction of the old host to the first of the new one.
    pub reboot_to_init_ns: u64,
    /// Rate of the host's TSC.
    pub counter_khz: u32,
    /// What the host did.
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
    /// What was done.
    pub name: String,
    /// When it began.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
}

/// One VM in [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its name.
    pub name: VmName,
    /// Guest RAM.
    pub ram_bytes: u64,
    /// From the last vCPU leaving `KVM_RUN` to the first entering it again; `None` if the VM was
    /// not running or did not resume.
    pub blackout_ns: Option<u64>,
    /// What became of it.
    pub outcome: Outcome,
    /// What was done for it.
    pub phases: Vec<PhaseReport>,
    /// Which page frames its RAM was in, if that was asked for.
    pub frames: Option<FramesReport>,
    /// Segments of its RAM.
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
    /// What the segments of one VM show.
    pub fn new(segments: &[Frames]) -> Self {
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

/// How RAM came over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentsReport {
    /// Segments that were preserved.
    pub preserved: u64,
    /// Segments that the guest never touched. They were created again, all zero.
    pub recreated: u64,
}

/// A ledger's phases in nanoseconds from `origin`.
pub fn phases(ledger: &Ledger, origin: u64, rate: TscRate) -> Vec<PhaseReport> {
    let ns = |tsc| rate.nanoseconds(origin, tsc);
    ledger
        .phases
        .iter()
        .map(|p| PhaseReport { name: p.name.clone(), start_ns: ns(p.start), end_ns: ns(p.end) })
        .collect()
}
