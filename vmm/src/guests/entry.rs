//! An entry of the manifest: what the next host needs to know about one VM besides its state document.

use guest_mem::FrameDigest;

use super::ledger::Ledger;
use crate::machine::Machine;
use crate::state::{Node, Reader, Schema, StateError};

/// Most segments of one VM. With the default segment size, guest-mem makes at most 64.
const MAX_SEGMENTS: usize = 64;

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEntry {
    /// The VM's description.
    pub machine: Machine,
    /// Whether the VM ran before the update. A VM that an operator had paused stays paused.
    pub running: bool,
    /// Length of the state document, in bytes.
    pub state_bytes: u64,
    /// CRC-32 (IEEE 802.3) of the state document.
    pub state_digest: u32,
    /// The ledger's counter when the last vCPU left `KVM_RUN`.
    pub last_exit_ticks: u64,
    /// The phases of the live update that concern this VM.
    pub ledger: Ledger,
    /// The segments of guest RAM, in the order of the layout.
    pub segments: Vec<SegmentEntry>,
}

/// One segment of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// Whether the segment is in the session. A segment that the guest never touched is not: it is all
    /// zeros.
    pub preserved: bool,
    /// Digest of the segment's page frames, if it is preserved and `--verify-frames` was given.
    pub frames: Option<FrameDigest>,
}

/// `perennial,vm-entry-v1`.
impl Schema for VmEntry {
    const COMPATIBLE: &'static [&'static str] = &["perennial,vm-entry-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { machine, running, state_bytes, state_digest, last_exit_ticks, ledger, segments } =
            self;
        node.put_bool("running", *running);
        node.put_u64("state-bytes", *state_bytes);
        node.put_u32("state-digest", *state_digest);
        node.put_u64("last-exit-ticks", *last_exit_ticks);
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
            state_digest: reader.u32("state-digest")?,
            last_exit_ticks: reader.u64("last-exit-ticks")?,
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
pub(crate) mod tests {
    use super::*;
    use crate::machine::VmName;
    use crate::machine::tests::sample as machine;
    use crate::state::contract::contract_tests;

    pub(crate) fn sample() -> VmEntry {
        VmEntry {
            machine: machine(),
            running: true,
            state_bytes: 4096,
            state_digest: 0x1234_5678,
            last_exit_ticks: 77,
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

    pub(crate) fn rename(entry: &mut VmEntry) {
        entry.machine.name = VmName::new("web-2").unwrap();
    }

    contract_tests! {
        VmEntry,
        sample: sample,
        changes: [
            rename,
            |e| e.running = false,
            |e| e.state_bytes += 1,
            |e| e.state_digest += 1,
                |e| e.last_exit_ticks += 1,
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
