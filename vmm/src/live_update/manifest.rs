//! The host's own document: which VMs there are, how they were described, and where their parts lie.
//!
//! It travels in the host's session beside the VMs' sessions, because LUO can list neither sessions
//! nor tokens. Only the host writes and reads it: what a VM's process says of itself stands in its
//! state document, and the host opens no path that it read there.

use guest_mem::FrameDigest;
use luo::{SessionName, Token};

use super::timeline::Ledger;
use crate::machine::{Machine, VmName};
use crate::state::{Node, Reader, Schema, StateError};

/// Most VMs of one host: far beyond what has been tried, but a bound.
const MAX_VMS: usize = 4096;
/// Most segments of one VM; guest-mem makes at most 64.
const MAX_SEGMENTS: usize = 64;

/// In a VM's session: the state document.
pub const STATE_TOKEN: Token = Token(0);
/// In the host's session: the manifest.
pub const MANIFEST_TOKEN: Token = Token(0);

/// In a VM's session: segment `index` of its RAM.
pub fn segment_token(index: usize) -> Token {
    Token(1 + index as u64)
}

/// The name of the host's session.
pub fn host_session() -> SessionName {
    "perennial-host".parse().expect("a constant that fits")
}

/// The name of a VM's session.
pub fn vm_session(vm: &VmName) -> SessionName {
    format!("perennial-vm-{vm}").parse().expect("VmName keeps it short and plain")
}

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Release and version of the kernel that wrote it.
    pub kernel: String,
    /// Which live update this is, counted from the last cold boot; the first is 1.
    pub number: u32,
    /// The text of the host's configuration, for a new host whose own cannot be used.
    pub config: String,
    /// Host TSC and `CLOCK_REALTIME` in nanoseconds at one moment of the old kernel.
    pub tsc: u64,
    /// See `tsc`.
    pub realtime_ns: u64,
    /// What the host did.
    pub ledger: Ledger,
    /// The VMs, in the order in which they are to be resumed.
    pub vms: Vec<VmEntry>,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEntry {
    /// Its description.
    pub machine: Machine,
    /// Whether it ran before the update; one that an operator had paused stays paused.
    pub running: bool,
    /// Length of its state document, in bytes.
    pub state_bytes: u64,
    /// Host TSC when its last vCPU had left `KVM_RUN`.
    pub last_exit_tsc: u64,
    /// What was done for it.
    pub ledger: Ledger,
    /// Its RAM.
    pub segments: Vec<SegmentEntry>,
}

/// One segment of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Its size.
    pub bytes: u64,
    /// Whether it is in the session. One that the guest never touched is not: it is all zeros.
    pub preserved: bool,
    /// Which page frames it lies in, if it is preserved and that was asked for.
    pub frames: Option<FrameDigest>,
}

/// `perennial,host-v1`: see `docs/state-document.md`.
impl Schema for Manifest {
    const COMPATIBLE: &'static [&'static str] = &["perennial,host-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { kernel, number, config, tsc, realtime_ns, ledger, vms } = self;
        node.put_str("kernel", kernel);
        node.put_u32("number", *number);
        node.put_str("config", config);
        node.put_u64("tsc", *tsc);
        node.put_u64("realtime-ns", *realtime_ns);
        node.push(ledger.to_node("ledger"));
        for (index, vm) in vms.iter().enumerate() {
            node.push(vm.to_node(&format!("vm@{index:x}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let manifest = Self {
            kernel: reader.str("kernel")?,
            number: reader.u32("number")?,
            config: reader.str("config")?,
            tsc: reader.u64("tsc")?,
            realtime_ns: reader.u64("realtime-ns")?,
            ledger: reader.child("ledger")?,
            vms: reader.sequence::<VmEntry>("vm")?,
        };
        if manifest.vms.len() > MAX_VMS {
            let problem = format!("{} VMs, at most {MAX_VMS}", manifest.vms.len());
            return Err(reader.invalid("number", problem));
        }
        let mut names: Vec<&VmName> = manifest.vms.iter().map(|vm| &vm.machine.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(reader.invalid("number", format!("two VMs are called {}", pair[0]))),
            None => Ok(manifest),
        }
    }
}

/// `perennial,vm-entry-v1`.
impl Schema for VmEntry {
    const COMPATIBLE: &'static [&'static str] = &["perennial,vm-entry-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { machine, running, state_bytes, last_exit_tsc, ledger, segments } = self;
        node.put_bool("running", *running);
        node.put_u64("state-bytes", *state_bytes);
        node.put_u64("last-exit-tsc", *last_exit_tsc);
        node.put_u64s("segment-bytes", &segments.iter().map(|s| s.bytes).collect::<Vec<_>>());
        let preserved: Vec<u64> = segments.iter().map(|s| s.preserved.into()).collect();
        node.put_u64s("segment-preserved", &preserved);
        if segments.iter().any(|segment| segment.frames.is_some()) {
            let frames = segments.iter().flat_map(|segment| {
                segment.frames.map_or([0, 0], |FrameDigest { hash, pages }| [hash, pages])
            });
            node.put_u64s("segment-frames", &frames.collect::<Vec<_>>());
        }
        node.push(machine.to_node("machine"));
        node.push(ledger.to_node("ledger"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let segments = decode_segments(reader)?;
        let entry = Self {
            machine: reader.child("machine")?,
            running: reader.bool("running")?,
            state_bytes: reader.u64("state-bytes")?,
            last_exit_tsc: reader.u64("last-exit-tsc")?,
            ledger: reader.child("ledger")?,
            segments,
        };
        let total = entry.segments.iter().try_fold(0u64, |sum, s| sum.checked_add(s.bytes));
        if total != Some(entry.machine.ram_bytes) {
            let problem = format!(
                "the segments have {total:?} bytes, the machine {}",
                entry.machine.ram_bytes
            );
            return Err(reader.invalid("segment-bytes", problem));
        }
        Ok(entry)
    }
}

fn decode_segments(reader: &mut Reader<'_>) -> Result<Vec<SegmentEntry>, StateError> {
    let bytes = reader.u64s("segment-bytes")?;
    let preserved = reader.u64s("segment-preserved")?;
    if bytes.is_empty() || bytes.len() > MAX_SEGMENTS || bytes.len() != preserved.len() {
        let problem = format!(
            "{} sizes and {} marks; there are 1 to {MAX_SEGMENTS} segments",
            bytes.len(),
            preserved.len()
        );
        return Err(reader.invalid("segment-bytes", problem));
    }
    let frames = match reader.has("segment-frames") {
        true => reader.u64s("segment-frames")?,
        false => vec![0; 2 * bytes.len()],
    };
    let (frames, rest) = frames.as_chunks::<2>();
    if frames.len() != bytes.len() || !rest.is_empty() {
        let problem = format!("{} digests for {} segments", frames.len(), bytes.len());
        return Err(reader.invalid("segment-frames", problem));
    }
    let marked = bytes.into_iter().zip(preserved).zip(frames);
    marked
        .map(|((bytes, mark), &[hash, pages])| {
            let preserved = match mark {
                0 | 1 => mark == 1,
                _ => {
                    let problem = format!("{mark} is not 0 or 1");
                    return Err(reader.invalid("segment-preserved", problem));
                }
            };
            let frames = (pages != 0).then_some(FrameDigest { hash, pages });
            if frames.is_some() && !preserved {
                let problem = "a digest of a segment that is not preserved";
                return Err(reader.invalid("segment-frames", problem));
            }
            Ok(SegmentEntry { bytes, preserved, frames })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::sample as machine;
    use crate::state::contract::{contract_tests, refusal};
    use crate::state::node::read_node;

    fn entry() -> VmEntry {
        VmEntry {
            machine: machine(),
            running: true,
            state_bytes: 4096,
            last_exit_tsc: 77,
            ledger: Ledger::sample(),
            segments: vec![
                SegmentEntry {
                    bytes: 32 << 20,
                    preserved: true,
                    frames: Some(FrameDigest { hash: 5, pages: 8192 }),
                },
                SegmentEntry { bytes: 32 << 20, preserved: false, frames: None },
            ],
        }
    }

    fn sample() -> Manifest {
        Manifest {
            kernel: "7.3.4-a #1".to_owned(),
            number: 3,
            config: "[host]\n".to_owned(),
            tsc: 123,
            realtime_ns: 456,
            ledger: Ledger::sample(),
            vms: vec![entry()],
        }
    }

    fn rename(entry: &mut VmEntry) {
        entry.machine.name = VmName::new("web-2").unwrap();
    }

    contract_tests! {
        Manifest,
        sample: sample,
        changes: [
            |m| m.kernel.push('x'),
            |m| m.number += 1,
            |m| m.config.clear(),
            |m| m.tsc += 1,
            |m| m.realtime_ns += 1,
            |m| m.ledger.phases.clear(),
            |m| rename(&mut m.vms[0]),
            |m| { m.vms.push(entry()); rename(&mut m.vms[1]) },
            |m| m.vms.clear(),
        ],
        optional: ["/vm@0:segment-frames", "/vm@0/machine/boot:initramfs"],
        golden: "host-v1",
    }

    mod vm_entry {
        use super::*;

        contract_tests! {
            VmEntry,
            sample: entry,
            changes: [
                rename,
                |e| e.running = false,
                |e| e.state_bytes += 1,
                |e| e.last_exit_tsc += 1,
                |e| e.ledger.phases.clear(),
                |e| e.segments[1].preserved = true,
                |e| e.segments.swap(0, 1),
                |e| { e.segments[0].bytes *= 2; e.segments.truncate(1) },
                |e| e.segments[0].frames = None,
                |e| e.segments[0].frames = Some(FrameDigest { hash: 6, pages: 8192 }),
                |e| e.segments[0].frames = Some(FrameDigest { hash: 5, pages: 8193 }),
            ],
            optional: ["/:segment-frames", "/machine/boot:initramfs"],
            golden: "vm-entry-v1",
        }
    }

    fn refused(change: fn(&mut Manifest)) -> String {
        refusal(sample(), change)
    }

    #[test]
    fn a_manifest_survives_its_node() {
        let mut manifest = sample();
        assert_eq!(read_node(&manifest.to_node(""), ""), Ok(manifest.clone()));
        manifest.vms[0].segments[0].frames = None;
        manifest.config = String::new();
        assert_eq!(read_node(&manifest.to_node(""), ""), Ok(manifest));
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        assert!(refused(|m| m.vms.push(m.vms[0].clone())).contains("two VMs are called web-1"));
        assert!(refused(|m| m.vms[0].segments[0].bytes += 1).contains("segment-bytes"));
        assert!(refused(|m| m.vms[0].segments.clear()).contains("1 to 64 segments"));
        assert!(refused(|m| m.vms[0].segments[0].preserved = false).contains("segment-frames"));
        assert!(refused(|m| m.vms[0].segments[0].bytes = u64::MAX).contains("segment-bytes"));
    }

    #[test]
    fn every_vm_name_fits_a_session() {
        let longest = VmName::new(&"x".repeat(VmName::MAX)).unwrap();
        assert!(vm_session(&longest).as_str().len() <= 63);
        assert_eq!(host_session().as_str(), "perennial-host");
    }
}
