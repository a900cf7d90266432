//! The new host's half of a live update or a handover, from the manifest to running guests.
//!
//! A VM that cannot be restored keeps its session, hence its memory, and can be tried again; the other
//! VMs are resumed. Sessions are finished only after every guest that can be resumed runs, because
//! finishing takes time and ends the possibility to try again.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use guest_mem::{FrameDigest, Segment};
use luo::{Incoming, Orchestrator};

use super::index::{Disagreement, session_of};
use super::manifest::{STATE_TOKEN, segment_token, vm_session};
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::confinement::Confinement;
use crate::guests::conversation::{ProcessError, unexpected};
use crate::guests::entry::VmEntry;
use crate::guests::files::{Files, OpenError};
use crate::guests::held::Held;
use crate::guests::memfd::document_digest;
use crate::guests::process::VmProcess;
use crate::guests::ram::{RamError, RamSource};
use crate::guests::{Guest, Life, Live};
use crate::link::{MissingHints, Reply, Request, Role};
use crate::state::StateError;
use crate::vm::ram_layout;

/// Why a VM, or all VMs, cannot be restored. The sessions keep their contents.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// A session or a file cannot be retrieved from LUO.
    #[error(transparent)]
    Luo(#[from] luo::Error),
    /// The manifest or the index cannot be read from its memfd.
    #[error("cannot read the manifest or the index")]
    Read(#[source] io::Error),
    /// The manifest or the index is larger than any that this program writes.
    #[error("the manifest or the index has {found} bytes, this program reads at most {most}")]
    TooLarge {
        /// Its size in bytes.
        found: u64,
        /// The largest size that this program writes.
        most: u64,
    },
    /// The manifest or the index cannot be decoded.
    #[error("the manifest or the index cannot be decoded")]
    Manifest(#[from] StateError),
    /// The manifest differs from the one that was written.
    #[error("the manifest has the digest {found:08x}, the index says {left:08x}")]
    Damaged {
        /// CRC-32 of the retrieved manifest.
        found: u32,
        /// CRC-32 in the index.
        left: u32,
    },
    /// The index does not fit the manifest.
    #[error("the index does not belong to the manifest")]
    Index(#[from] Disagreement),
    /// The state document cannot be read from its memfd.
    #[error("cannot read its state document")]
    ReadState(#[source] io::Error),
    /// The state document differs from the one that the old host preserved.
    #[error("its state document has the digest {found:08x}, the manifest says {left:08x}")]
    State {
        /// CRC-32 of the retrieved document.
        found: u32,
        /// CRC-32 in the manifest.
        left: u32,
    },
    /// A retrieved segment is not the file that the manifest describes.
    #[error("its RAM is not as the manifest says")]
    Ram(#[from] guest_mem::Error),
    /// A segment that was not preserved, because the guest never touched it, cannot be created again.
    #[error("cannot create its RAM again")]
    Create(#[from] RamError),
    /// This build would cut the RAM into other segments than the manifest lists.
    #[error("its RAM has {found} segments of {bytes:?} bytes, this build would make {expected}")]
    Segments {
        /// Segments in the manifest.
        found: usize,
        /// Sizes of the segments in the manifest.
        bytes: Vec<u64>,
        /// Number of segments that this build would make.
        expected: usize,
    },
    /// The fd of a RAM segment cannot be duplicated for the VM's process.
    #[error("cannot hand its RAM to the VM's process")]
    Clone(#[source] io::Error),
    /// A file that the VM needs cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The VM's process cannot be started or cannot restore the VM.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl IncomingError {
    /// Whether the same attempt may succeed later, although nobody changes the documents.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Luo(error) => !(error.is_final() || error.is_not_found()),
            Self::Read(_) => true,
            _ => false,
        }
    }
}

/// A VM whose memory has been retrieved and whose process is restoring it.
struct Arriving {
    /// The entry as it came, for another attempt.
    left: VmEntry,
    /// The entry with the phases of this attempt.
    entry: VmEntry,
    held: Held,
    started: Result<Begun, IncomingError>,
}

/// A restore in progress.
struct Begun {
    process: VmProcess,
    segments: Vec<Segment>,
    frames: Vec<FrameComparison>,
    console: Option<PathBuf>,
}

/// Restores and resumes every VM of the manifest, in its order. Returns each VM with its session, which
/// the caller finishes when all VMs are resumed, and with its ledger.
pub fn resume_all(
    luo: &dyn Orchestrator,
    entries: &[VmEntry],
    confinement: &Arc<Confinement>,
    hints: MissingHints,
) -> Vec<RestoredVm> {
    // The processes restore at the same time. The manifest lists the most urgent VM first, so it is
    // started first and waited for first.
    let arriving: Vec<_> =
        entries.iter().cloned().map(|entry| start(luo, entry, confinement, hints)).collect();
    arriving
        .into_iter()
        .map(|vm| vm.map_or_else(|lost| *lost, |vm| complete(vm, confinement)))
        .collect()
}

/// A VM after a live update.
pub struct RestoredVm {
    /// The VM's entry in the manifest. Its ledger now also has the phases of the restore.
    pub entry: VmEntry,
    /// The VM: live, preserved, or failed if its session cannot be retrieved.
    pub vm: Guest,
    /// The session, if the VM is live. To be finished when all VMs are live.
    pub session: Option<Incoming>,
    /// Host TSC when the first vCPU entered `KVM_RUN`; `None` if the VM was not resumed.
    pub first_entry_ticks: Option<u64>,
    /// Page frames before and after the live update, of each segment for which the manifest has a digest.
    pub frames: Vec<FrameComparison>,
}

/// The page frames of one segment in both kernels.
#[derive(Debug, Clone, Copy)]
pub struct FrameComparison {
    /// Size of the segment in bytes.
    pub bytes: u64,
    /// Digest in the old kernel, when the segment was preserved.
    pub before: FrameDigest,
    /// Digest in this kernel.
    pub after: FrameDigest,
}

/// Retrieves a VM's session and memory and lets its process begin the restore.
fn start(
    luo: &dyn Orchestrator,
    mut entry: VmEntry,
    confinement: &Arc<Confinement>,
    hints: MissingHints,
) -> Result<Arriving, Box<RestoredVm>> {
    let start = tsc::now();
    let name = vm_session(&entry.machine.name);
    let files = session_of(&entry).files;
    match luo.retrieve_session(&name) {
        Ok(session) => {
            let (left, held) = (entry.clone(), Held::new(session, files));
            let how = (confinement, hints);
            let started = begin(RamSource::new(Some(luo)), &held, &mut entry, start, how);
            Ok(Arriving { left, entry, held, started })
        }
        // There is nothing behind the name: the memory is lost.
        Err(error) if error.is_not_found() => {
            let mut vm = Guest::new(entry.machine.clone(), confinement);
            vm.life = Life::Failed(chain(&error));
            Err(Box::new(RestoredVm::without_process(entry, vm)))
        }
        // Everything else may pass, and the session may still come.
        Err(error) => {
            let (why, held) = (chain(&error), Held::unretrieved(name, files));
            let vm = preserved(held, entry.clone(), why, confinement);
            Err(Box::new(RestoredVm::without_process(entry, vm)))
        }
    }
}

/// Returns a VM that is preserved, because it cannot be restored.
fn preserved(
    held: Held,
    entry: VmEntry,
    why: Vec<String>,
    confinement: &Arc<Confinement>,
) -> Guest {
    tracing::error!("VM `{}` is preserved: {}", entry.machine.name, why.join(": "));
    let mut vm = Guest::new(entry.machine.clone(), confinement);
    vm.life = Life::Preserved { held, entry: Some(Box::new(entry)), why };
    vm
}

impl RestoredVm {
    fn without_process(entry: VmEntry, vm: Guest) -> Self {
        Self { entry, vm, session: None, first_entry_ticks: None, frames: Vec::new() }
    }
}

fn begin(
    ram: RamSource<'_>,
    held: &Held,
    entry: &mut VmEntry,
    start: u64,
    (confinement, hints): (&Arc<Confinement>, MissingHints),
) -> Result<Begun, IncomingError> {
    // The process starts while the memory is retrieved.
    let process = VmProcess::spawn(confinement)?;
    let spawned = tsc::now();
    entry.ledger.enter("spawn", start, spawned);
    let segments = retrieve_ram(ram, held, entry)?;
    let state = File::from(held.file(STATE_TOKEN)?);
    let digest = document_digest(&state, entry.state_bytes).map_err(IncomingError::ReadState)?;
    if digest != entry.state_digest {
        return Err(IncomingError::State { found: digest, left: entry.state_digest });
    }
    let retrieved = tsc::now();
    entry.ledger.enter("retrieve", spawned, retrieved);
    let (frames, retrieved) = look_up_frames(&segments, entry, retrieved);
    let mut files = Files::for_machine(&entry.machine)?;
    files.push(Role::State, state);
    for segment in &segments {
        files.push(Role::Segment, segment.file().try_clone().map_err(IncomingError::Clone)?);
    }
    let (machine, bytes) = (entry.machine.clone(), entry.state_bytes);
    let request = Request::Restore { machine, ram: ram.kind(), bytes, hints };
    process.build(request, &files.borrow())?;
    entry.ledger.enter("open", retrieved, tsc::now());
    Ok(Begun { process, segments, frames, console: files.console() })
}

/// Computes the digests of the page frames of those segments for which the manifest has a digest. Returns
/// them with the TSC at the end. This happens in the blackout, because once the VM's process has mapped
/// the segments with the advice to use huge pages, the kernel may merge small pages into huge ones.
fn look_up_frames(
    segments: &[Segment],
    entry: &mut VmEntry,
    start: u64,
) -> (Vec<FrameComparison>, u64) {
    let known = segments.iter().zip(&entry.segments);
    let known = known.filter_map(|(segment, entry)| Some((segment, entry.frames?)));
    let frames = known.map(|(segment, before)| {
        Ok(FrameComparison { bytes: segment.len(), before, after: FrameDigest::of(segment)? })
    });
    let frames: Result<Vec<_>, guest_mem::Error> = frames.collect();
    let frames = frames.unwrap_or_else(|error| {
        // A failed comparison is only logged: the guest can still be resumed.
        let why = chain(&error).join(": ");
        tracing::error!("VM `{}`: cannot verify its page frames: {why}", entry.machine.name);
        Vec::new()
    });
    if frames.is_empty() {
        return (frames, start);
    }
    let end = tsc::now();
    entry.ledger.enter("verify-frames", start, end);
    (frames, end)
}

/// Returns the VM's RAM: preserved segments are retrieved from the session, the others created again.
fn retrieve_ram(
    ram: RamSource<'_>,
    held: &Held,
    entry: &VmEntry,
) -> Result<Vec<Segment>, IncomingError> {
    let layout = ram_layout(entry.machine.ram_bytes)?;
    let plans = layout.segments();
    let bytes: Vec<u64> = entry.segments.iter().map(|s| s.bytes).collect();
    if !plans.iter().map(|plan| plan.len).eq(bytes.iter().copied()) {
        let found = bytes.len();
        return Err(IncomingError::Segments { found, bytes, expected: plans.len() });
    }
    let mut segments = Vec::with_capacity(plans.len());
    for (index, segment) in entry.segments.iter().enumerate() {
        segments.push(if segment.preserved {
            ram.take(index, held.file(segment_token(index))?, segment.bytes)?
        } else {
            ram.create(entry.machine.name.as_str(), index, segment.bytes)?
        });
    }
    Ok(segments)
}

/// Waits for the restore, and resumes the guest if it ran before the update.
fn complete(arriving: Arriving, confinement: &Arc<Confinement>) -> RestoredVm {
    let Arriving { left, mut entry, held, started } = arriving;
    let waiting = tsc::now();
    let mut frames = Vec::new();
    let mut vm = Guest::new(entry.machine.clone(), confinement);
    let resumed = started.and_then(|begun| {
        let Begun { process, segments, console, .. } = begun;
        frames = begun.frames;
        let missing_hints = match process.reply()? {
            Reply::Restored { missing_hints } => missing_hints,
            other => return Err(unexpected("restore", &other).into()),
        };
        entry.ledger.enter("restore", waiting, tsc::now());
        let first_entry = match entry.running {
            true => match process.ask(Request::Resume)? {
                Reply::Resumed { first_entry_ticks } => Some(first_entry_ticks),
                other => return Err(unexpected("resume", &other).into()),
            },
            false => None,
        };
        vm.note_missing_hints(missing_hints);
        let live = Live { process, segments, running: entry.running, stopping: None, console };
        Ok((live, first_entry))
    });
    match resumed {
        Ok((live, first_entry_ticks)) => {
            if let (Some(entered), Some(last)) = (first_entry_ticks, entry.ledger.phases.last()) {
                entry.ledger.enter("resume", last.end, entered);
            }
            vm.life = Life::Live(live);
            let session = held.into_session();
            RestoredVm { entry, vm, session, first_entry_ticks, frames }
        }
        Err(error) => {
            let vm = preserved(held, left, chain(&error), confinement);
            RestoredVm { entry, vm, session: None, first_entry_ticks: None, frames }
        }
    }
}

/// Tries again to restore a preserved VM, whose session was retrieved. If that fails, the VM stays preserved.
pub fn retry(
    luo: &dyn Orchestrator,
    held: Held,
    mut entry: VmEntry,
    confinement: &Arc<Confinement>,
    hints: MissingHints,
) -> RestoredVm {
    let (left, how) = (entry.clone(), (confinement, hints));
    let started = begin(RamSource::new(Some(luo)), &held, &mut entry, tsc::now(), how);
    complete(Arriving { left, entry, held, started }, confinement)
}
