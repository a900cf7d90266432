//! The host's API: JSON lines over a Unix socket, or over a virtio-serial port if the host has no
//! network and no shell.
//!
//! A request is `{"id":1,"do":"status"}`; its reply `{"id":1,"ok":{...}}` or `{"id":1,"error":[...],
//! "outcome":"running"}` where `error` is the chain of causes, outermost first. See `docs/api.md`.

mod answer;
mod arguments;
mod disk;
mod event;
pub mod report;
mod stream;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use answer::{Answer, Ended};
pub use disk::{DiskError, DiskState, DiskStatus};
pub use event::{Event, Transaction, now_ms};
pub use stream::{Lines, StreamError};

use crate::arch::x86_64::cpuid::CpuModel;
use crate::config::{Priority, Restart};
use crate::devices::network::Link;
use crate::guests::told::BootedEntry;
use crate::live_update::preflight::{Check, UnknownCheck};
use crate::live_update::{Outcome, Step};
use crate::machine::VmName;

/// One line from a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the client, repeated in the reply.
    #[serde(default)]
    pub id: u64,
    /// The command, with its arguments.
    #[serde(flatten)]
    pub command: Command,
}

impl Call {
    /// Parses a line. If the line is not a call, or has a key that its command does not take, returns the error line to
    /// answer with. The answer repeats the line's `id`, because the client waits for an answer with it; 0 if there is none.
    pub fn parse(line: &str) -> Result<Self, Line> {
        let request = serde_json::from_str::<Value>(line).unwrap_or_default();
        let call = || serde_json::from_str(line).map_err(|error| error.to_string());
        arguments::check(&request).and_then(|()| call()).map_err(|error| {
            let id = request["id"].as_u64().unwrap_or(0);
            let error = vec![format!("the request cannot be read: {error}")];
            Line::Error { id, error, outcome: None }
        })
    }
}

/// The commands of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Command {
    /// The host, its kernel and its VMs.
    Status,
    /// Boot a VM that is stopped.
    Boot {
        /// Name of the VM.
        vm: VmName,
    },
    /// Ask a VM's guest to shut down, and pull the plug if it does not. The reply comes when the VM has ended.
    Stop {
        /// Name of the VM.
        vm: VmName,
        /// Pull the plug at once.
        #[serde(default)]
        now: bool,
        /// Seconds until the plug is pulled. Default: the configuration's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        within_s: Option<u32>,
    },
    /// Stop a VM's vCPUs and devices.
    Pause {
        /// Name of the VM.
        vm: VmName,
    },
    /// Resume a paused VM.
    Resume {
        /// Name of the VM.
        vm: VmName,
    },
    /// Take the link of a VM's network devices up or down.
    Link {
        /// Name of the VM.
        vm: VmName,
        /// The device, as `status` names it. Default: all network devices of the VM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        /// Whether the link is to be up.
        up: bool,
    },
    /// Try again to restore a VM whose restore failed after a live update.
    Restore {
        /// Name of the VM.
        vm: VmName,
        /// Continue the guest also if this host lacks hints of its CPUID that `missing-hints` demands.
        #[serde(default)]
        force: bool,
    },
    /// Bring preserved VMs back: by another attempt to restore them, or with the program of an earlier host.
    Recover(RecoverCall),
    /// Write a VM's state document to a new file, or return it in the reply. A running VM is paused
    /// meanwhile.
    Dump {
        /// Name of the VM.
        vm: VmName,
        /// Path of the file, which must not exist. Without a path the reply has the document.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// Read a piece of a VM's RAM, to find out what its guest is doing.
    Memory {
        /// Name of the VM.
        vm: VmName,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes, at most [`crate::guests::MOST_MEMORY_BYTES`].
        bytes: u64,
    },
    /// Make a disk of a running VM as large as its file or block device is now.
    ResizeDisk {
        /// Name of the VM.
        vm: VmName,
        /// The disk: its device or its path in `status`.
        disk: String,
        /// Grow the disk's file to this size in bytes before that.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// Find out what would stand in the way of an update. Loads nothing, and touches no VM.
    Preflight(UpdateCall),
    /// Boot the kernel of an update in a VM, and let the next host say there what stands in the way of the update.
    /// Touches no other VM.
    Rehearse(UpdateCall),
    /// Replace the host's kernel under its VMs.
    Update(UpdateCall),
    /// Replace the host's program under its VMs.
    Handover(HandoverCall),
    /// The report of the last live update or handover: when each phase began and ended.
    Report,
    /// Send this client an event for each change of a VM's state and each step of a live update or a handover,
    /// until it leaves.
    Events,
    /// Stop all VMs, as `stop` does, and switch the host off (PID 1), or end the host's process.
    PowerOff {
        /// Pull the plug of all VMs at once.
        #[serde(default)]
        now: bool,
    },
}

/// The arguments of an update. `kernel`, `initramfs` and `cmdline` default to the configuration's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateCall {
    /// The next kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initramfs of the next kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The command line of the next kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Do everything before this step, then undo it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_before: Option<Step>,
    /// Compare the page frames of guest RAM before and after.
    #[serde(default)]
    pub verify_frames: bool,
    /// VMs that are left out: they end with this host, and are stopped on the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<VmName>,
    /// Names of refusals of the preflight to go on in spite of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub force: Vec<String>,
    /// Rehearse the update first, and go on only if nothing refuses it. Defaults to the configuration's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearse: Option<bool>,
    /// How many seconds the rehearsal may take. Defaults to the configuration's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearse_within_s: Option<NonZeroU32>,
}

impl UpdateCall {
    /// The refusals that the operator overrides.
    pub fn forced(&self) -> Result<Vec<Check>, UnknownCheck> {
        self.force.iter().map(|name| Check::to_force(name)).collect()
    }
}

/// The arguments of a handover.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverCall {
    /// Path of the next program. Default: the path that the running program was started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// Do everything before this step, then undo it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_before: Option<Step>,
    /// VMs that are left out: they end with this host, and are stopped on the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<VmName>,
}

/// The arguments of `recover`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverCall {
    /// Name of the VM. Default: all preserved VMs; with a program, the whole host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The program. Default: the running one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with: Option<With>,
}

/// Another program than the running one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum With {
    /// The newest program of an earlier host that can decode the documents.
    Previous,
}

/// One line to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// The reply to a command that was carried out.
    Ok {
        /// The request's id.
        id: u64,
        /// The command's answer; an empty object if it has none.
        ok: Value,
    },
    /// The reply to a command that failed.
    Error {
        /// The request's id.
        id: u64,
        /// The chain of causes, outermost first.
        error: Vec<String>,
        /// What became of the guests.
        #[serde(skip_serializing_if = "Option::is_none")]
        outcome: Option<Outcome>,
    },
    /// An event, sent without a request.
    Event(Event),
}

/// The answer to `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this program.
    pub version: String,
    /// CRC-32 of this program's file, in hexadecimal: builds of one version differ in it. `None` if it cannot be read.
    #[serde(default)]
    pub digest: Option<String>,
    /// `uname -r`.
    pub kernel: String,
    /// `uname -v`.
    pub kernel_version: String,
    /// Name of the LUO backend. With `keeper`, only handovers are possible and no live updates. `none`
    /// if the VMs may be preserved where this host cannot reach them.
    pub luo: String,
    /// Why no live update is possible; `None` if one is.
    pub luo_error: Option<String>,
    /// `cold`, `live-update` or `handover`: how this host came up. `lost` if that was a live update or a handover
    /// whose VMs are lost.
    pub boot: String,
    /// Why the VMs of the last host are lost, or what it left cannot be read now.
    pub last_host_error: Option<Vec<String>>,
    /// Number of live updates since the last cold boot.
    pub live_updates: u32,
    /// Names of the sessions of the last live update that are not finished: another update would lose
    /// them.
    pub unfinished: Vec<String>,
    /// Why the host's own configuration is not in use, or which of its modules and mounts failed.
    pub config_error: Option<Vec<String>>,
    /// The host's own address and the length of its network's prefix, `192.0.2.5/24`, on the interface of
    /// `[host.network]`; `None` if there is none.
    pub address: Option<String>,
    /// What the host's process uses.
    pub resources: Resources,
    /// The programs of earlier hosts that are held, so that there is a way back to them: the oldest first.
    #[serde(default)]
    pub programs: Vec<ProgramStatus>,
    /// The VMs.
    pub vms: Vec<VmStatus>,
}

/// A program of an earlier host, in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its version, as its host said; `None` if that is not known.
    pub version: Option<String>,
    /// Its size in bytes.
    pub bytes: u64,
    /// CRC-32 of its contents, in hexadecimal.
    pub digest: String,
}

/// What the host's process uses, and what is left for it, in [`Status`]. `None` is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Number of open files.
    pub open_files: Option<u64>,
    /// Most files that it may have open.
    pub most_open_files: Option<u64>,
    /// Resident memory of the host's own process, without those of the VMs.
    pub resident_bytes: Option<u64>,
    /// Memory of the machine that is available without swapping.
    pub available_bytes: Option<u64>,
}

/// One VM in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The VM's name.
    pub name: VmName,
    /// `running`, `stopping` (it runs, and its guest was asked to shut down), `paused`, `stopped`, `failed`, `restarting` (it has ended and boots again), `booting`, `restoring` (it was preserved), `preserved` (its restore failed, its memory is kept), or
    /// `withheld` (not started, because it may be preserved where this host cannot reach it).
    pub state: String,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The processor that its guest finds.
    #[serde(default)]
    pub cpu: CpuModel,
    /// How urgent the VM is: from 1 to 100, the most urgent.
    #[serde(default)]
    pub priority: Priority,
    /// When the host boots the VM again after it has ended by itself.
    #[serde(default)]
    pub restart: Restart,
    /// How often the VM has booted again under this host.
    #[serde(default)]
    pub restarts: u64,
    /// Milliseconds until the VM boots again, if it is `restarting`.
    #[serde(default)]
    pub next_boot_ms: Option<u64>,
    /// What the guest was told of its processor's speed or safety, on another host, and is not true of this one.
    #[serde(default)]
    pub missing_hints: Vec<String>,
    /// Process id of the VM's process.
    pub pid: Option<i32>,
    /// The program of the VM's process, if it is an earlier host's.
    #[serde(default)]
    pub program: Option<String>,
    /// Where programs of the host attach to the VM's console: the path of a socket or of a pseudoterminal.
    pub console: Option<PathBuf>,
    /// Numbers of the pages with which KVM maps the VM's RAM at this moment; `None` if the kernel does
    /// not show them.
    pub mapped: Option<MappedPages>,
    /// The links of its network devices, by device: `up`, `down` (an operator took it down), or `gone` (the tap
    /// does not exist any more).
    #[serde(default)]
    pub links: BTreeMap<String, Link>,
    /// The parts that are missing of the confinement of the VM's process, each with the reason.
    #[serde(default)]
    pub unconfined: Vec<String>,
    /// The entry that was booted from the VM's own disk, with the entries that should have been booted and cannot be.
    /// `None` if it did not boot from its disk, or came here by a live update or a handover.
    #[serde(default)]
    pub booted: Option<BootedEntry>,
    /// The disks; `None` if the VM has no process, or one that does not answer.
    #[serde(default)]
    pub disks: Option<Vec<DiskStatus>>,
    /// The chain of causes, if the VM is failed, preserved or withheld.
    pub error: Option<Vec<String>>,
}

/// Numbers of pages, by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedPages {
    /// Pages of 4 KiB.
    #[serde(rename = "4k")]
    pub small: u64,
    /// Pages of 2 MiB.
    #[serde(rename = "2m")]
    pub huge: u64,
    /// Pages of 1 GiB.
    #[serde(rename = "1g")]
    pub giant: u64,
}

/// Formats bytes for the API's replies: two lower-case hexadecimal digits each, without a separator.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_one_flat_object() {
        let call: Call = serde_json::from_str(r#"{"id":7,"do":"boot","vm":"web"}"#).unwrap();
        assert_eq!(call.id, 7);
        assert_eq!(call.command, Command::Boot { vm: VmName::new("web").unwrap() });
        let update = r#"{"do":"update","stop_before":"preserve-state"}"#;
        let Command::Update(update) = serde_json::from_str::<Call>(update).unwrap().command else {
            panic!("not an update");
        };
        assert_eq!(update.stop_before, Some(Step::PreserveState));
        assert!(!update.verify_frames);
    }

    #[test]
    fn a_stop_asks_the_guest_unless_it_says_now() {
        let vm = VmName::new("web").unwrap();
        let parsed = |line| serde_json::from_str::<Call>(line).unwrap().command;
        let asks = Command::Stop { vm: vm.clone(), now: false, within_s: None };
        assert_eq!(parsed(r#"{"do":"stop","vm":"web"}"#), asks);
        let now = Command::Stop { vm, now: true, within_s: Some(5) };
        assert_eq!(parsed(r#"{"do":"stop","vm":"web","now":true,"within_s":5}"#), now);
        assert_eq!(parsed(r#"{"do":"power-off"}"#), Command::PowerOff { now: false });
        assert_eq!(parsed(r#"{"do":"power-off","now":true}"#), Command::PowerOff { now: true });
    }

    #[test]
    fn a_dump_may_have_a_path_and_bytes_become_two_digits_each() {
        let vm = VmName::new("web").unwrap();
        let parsed = |line| serde_json::from_str::<Call>(line).unwrap().command;
        let path = Some(PathBuf::from("/a"));
        assert_eq!(
            parsed(r#"{"do":"dump","vm":"web","path":"/a"}"#),
            Command::Dump { vm: vm.clone(), path }
        );
        assert_eq!(
            parsed(r#"{"do":"dump","vm":"web"}"#),
            Command::Dump { vm: vm.clone(), path: None }
        );
        assert_eq!(
            parsed(r#"{"do":"memory","vm":"web","address":4096,"bytes":8}"#),
            Command::Memory { vm, address: 4096, bytes: 8 }
        );
        assert_eq!(hex(&[0, 0x0a, 0xff]), "000aff");
    }

    #[test]
    fn a_resize_names_a_disk_and_may_name_a_size() {
        let parsed = |line| serde_json::from_str::<Call>(line).unwrap().command;
        let resize = |size| {
            let (vm, disk) = (VmName::new("web").unwrap(), "/data/web.img".to_owned());
            Command::ResizeDisk { vm, disk, size }
        };
        let line = r#"{"do":"resize-disk","vm":"web","disk":"/data/web.img"}"#;
        assert_eq!(parsed(line), resize(None));
        let line = r#"{"do":"resize-disk","vm":"web","disk":"/data/web.img","size":4096}"#;
        assert_eq!(parsed(line), resize(Some(4096)));
        serde_json::from_str::<Call>(r#"{"do":"resize-disk","vm":"web"}"#).unwrap_err();
    }

    #[test]
    fn each_documented_key_of_the_status_is_there_and_null_if_there_is_nothing_to_say() {
        let vm = r#"{"name":"web","state":"failed","ram_bytes":1,"vcpus":1}"#;
        let status = format!(
            r#"{{"version":"","kernel":"","kernel_version":"","luo":"","boot":"","live_updates":0,
                "unfinished":[],"resources":{{}},"vms":[{vm}]}}"#
        );
        let status: Status = serde_json::from_str(&status).unwrap();
        let status = serde_json::to_value(status).unwrap();
        let manual = include_str!("../../../docs/api.md");
        let table = manual.split_once("## `status`\n").unwrap().1.split_once("\n\n`").unwrap().0;
        let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
        let keys: Vec<&str> = rows.flat_map(|(keys, _)| keys.split("`, `")).collect();
        assert_eq!(keys.len(), status.as_object().unwrap().len(), "{keys:?}");
        for key in keys {
            assert!(status.get(key).is_some(), "{key}");
        }
        for key in ["luo_error", "last_host_error", "address", "config_error", "digest"] {
            assert_eq!(status.get(key), Some(&Value::Null), "{key}");
        }
        assert_eq!(status["vms"][0].get("mapped"), Some(&Value::Null));
    }

    #[test]
    fn an_unknown_command_or_a_bad_argument_is_an_error() {
        for bad in [
            r#"{"do":"fly"}"#,
            r#"{"do":"boot","vm":"a/b"}"#,
            r#"{"do":"boot"}"#,
            // Nothing could succeed in that time.
            r#"{"do":"rehearse","rehearse_within_s":0}"#,
            "7",
            "",
        ] {
            assert!(serde_json::from_str::<Call>(bad).is_err(), "{bad}");
        }
    }
}
