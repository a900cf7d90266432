//! The parts of the host's status and of a live update's report that the harness reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A stretch of time, in nanoseconds since the update began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// Its start.
    pub start_ns: u64,
    /// Its end.
    pub end_ns: u64,
}

/// The ledger of one live update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What concerns all VMs.
    pub host: HostReport,
    /// One entry for each VM.
    pub vms: Vec<VmReport>,
    /// Bytes of guest RAM that went through a copy.
    pub guest_ram_bytes_copied: u64,
}

/// The host's part of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Release and version of the kernel before.
    pub kernel_before: String,
    /// Release and version of the kernel after.
    pub kernel_after: String,
    /// The LUO backend.
    pub luo: String,
    /// Time from `reboot()` to the first instruction of PID 1.
    pub reboot_to_init_ns: u64,
    /// Phases that belong to no VM.
    #[serde(default)]
    pub phases: Vec<Phase>,
}

/// One VM's part of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// Its RAM.
    pub ram_bytes: u64,
    /// Size of its state document.
    pub state_bytes: u64,
    /// From the last vCPU out of KVM_RUN to the first back in; `None` if it did not run before or
    /// does not run after.
    pub blackout_ns: Option<u64>,
    /// What became of the guest: `running`, `preserved` or `lost`.
    pub outcome: String,
    /// The phases of its live update.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Digests of its page frames, if the update's request asked for them.
    #[serde(default)]
    pub frames: Option<Frames>,
    /// Numbers of its segments.
    pub segments: Segments,
}

/// Numbers of segments of a VM's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segments {
    /// Those that were preserved.
    pub preserved: u64,
    /// Those that the guest had not touched.
    pub recreated: u64,
}

/// A digest over the page frame numbers of a VM's RAM, on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frames {
    /// In the old kernel.
    pub before: String,
    /// In the new kernel.
    pub after: String,
    /// Number of pages in each digest.
    pub pages: u64,
}

/// The host's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `uname -r`.
    pub kernel: String,
    /// The LUO backend; `keeper` if no other is available.
    pub luo: String,
    /// Why no live update is possible.
    #[serde(default)]
    pub luo_error: Option<String>,
    /// `cold` or `live-update`.
    pub boot: String,
    /// Live updates since the last cold boot.
    pub live_updates: u64,
    /// Sessions that are not finished.
    #[serde(default)]
    pub unfinished: Vec<String>,
    /// The errors in the configuration.
    #[serde(default)]
    pub config_error: Option<Vec<String>>,
    /// The host's own address.
    #[serde(default)]
    pub address: Option<String>,
    /// What the host's process uses. Hosts of earlier programs do not say it.
    #[serde(default)]
    pub resources: Resources,
    /// The programs of earlier hosts that are held, the oldest first.
    #[serde(default)]
    pub programs: Vec<ProgramStatus>,
    /// The VMs.
    #[serde(default)]
    pub vms: Vec<VmStatus>,
}

/// A program of an earlier host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its version.
    pub version: Option<String>,
    /// Its digest, in hexadecimal.
    pub digest: String,
}

/// What the host's process uses, and what is left for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Number of open files.
    pub open_files: u64,
    /// Resident memory of the host's process.
    pub resident_bytes: u64,
    /// Memory of the machine that is available.
    pub available_bytes: u64,
}

/// The status of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, `stopped`, `failed`, `booting`, `restoring`, `preserved` or `withheld`.
    pub state: String,
    /// Its RAM.
    pub ram_bytes: u64,
    /// The links of its network devices.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    /// Numbers of the pages in which KVM maps its RAM, by size.
    #[serde(default)]
    pub mapped: Option<MappedPages>,
    /// Its disks. `None` if it has no process that answers.
    #[serde(default)]
    pub disks: Option<Vec<DiskStatus>>,
    /// The program of its process, if it is an earlier host's.
    #[serde(default)]
    pub program: Option<String>,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<Vec<String>>,
}

/// One disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its path on the host.
    pub path: String,
    /// `working`, `failing` or `stalled`.
    pub state: String,
    /// Whether it bypasses the host's page cache.
    pub direct: bool,
    /// Number of its queues.
    pub queues: u16,
    /// Its size, as the guest was told.
    pub bytes: u64,
    /// Number of operations that failed.
    pub errors: u64,
    /// The last one of them.
    pub last_error: Option<DiskError>,
    /// Number of operations that the storage has not answered yet.
    pub in_flight: u32,
    /// Number of those that it has not answered for more than 10 s.
    pub stalled: u32,
}

/// An operation that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskError {
    /// The operation.
    pub operation: String,
    /// Why it failed.
    pub error: String,
}

/// Numbers of pages of each size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedPages {
    /// Of 4 KiB.
    #[serde(rename = "4k")]
    pub small: u64,
    /// Of 2 MiB.
    #[serde(rename = "2m")]
    pub huge: u64,
}
