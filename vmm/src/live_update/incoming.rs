//! The new host's half of a live update or a handover, from the first look at LUO to running guests.
//!
//! A VM that cannot be restored keeps its session, and with it its memory; the others go on. Nothing
//! is finished before every guest that can run does run: finishing takes time, and until then a
//! failed restore can be tried again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use guest_mem::{FrameDigest, Segment};
use luo::{Incoming, Orchestrator, Token};

use super::index::{Disagreement, Index};
use super::manifest::{
    INDEX_TOKEN, MANIFEST_TOKEN, Manifest, STATE_TOKEN, host_session, segment_token, vm_session,
};
use crate::arch::x86_64::tsc;
use crate::guests::conversation::{ProcessError, unexpected};
use crate::guests::entry::VmEntry;
use crate::guests::files::{Files, OpenError};
use crate::guests::memfd::document_digest;
use crate::guests::process::VmProcess;
use crate::guests::ram::{RamError, RamSource};
use crate::guests::{Guest, Life, Live};
use crate::link::{Reply, Request, Role};
use crate::state::{StateError, document};
use crate::vm::ram_layout;

/// Largest manifest or index, in bytes.
const MAX_DOCUMENT: u64 = 16 << 20;

/// Why a VM, or all of them, cannot be restored. What is in the session stays there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// LUO refused.
    #[error(transparent)]
    Luo(#[from] luo::Error),
    /// A document cannot be read from its memfd.
    #[error("cannot read the manifest or the index")]
    Read(#[source] io::Error),
    /// The manifest or the index is larger than any that this program writes.
    #[error("the manifest, or the index, has {0} bytes; at most {MAX_DOCUMENT} are possible")]
    TooLarge(u64),
    /// The manifest or the index cannot be understood.
    #[error("the manifest, or the index, cannot be read")]
    Manifest(#[from] StateError),
    /// The index is of another manifest.
    #[error("the index and the manifest are not of one host")]
    Index(#[from] Disagreement),
    /// The state document cannot be read from its memfd.
    #[error("cannot read its state document")]
    ReadState(#[source] io::Error),
    /// The state document is not the one that was left.
    #[error("its state document has the digest {found:08x}, the manifest says {left:08x}")]
    State {
        /// Of what was retrieved.
        found: u32,
        /// Of what was left.
        left: u32,
    },
    /// The RAM is not as the manifest says.
    #[error("its RAM is not as it was")]
    Ram(#[from] guest_mem::Error),
    /// RAM that was never touched, and so not preserved, cannot be created again.
    #[error("cannot create its RAM again")]
    Create(#[from] RamError),
    /// The RAM that this build would lay out differs from what the manifest has.
    #[error("its RAM has {found} segments of {bytes:?} bytes, this build would make {expected}")]
    Segments {
        /// Segments in the manifest.
        found: usize,
        /// Their sizes.
        bytes: Vec<u64>,
        /// What this build would make.
        expected: usize,
    },
    /// An fd cannot be duplicated.
    #[error("cannot hand its RAM to the VM's process")]
    Clone(#[source] io::Error),
    /// A file that the VM needs is gone.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The VM's process cannot do it.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// What the last kernel left.
pub struct Arrival {
    /// Its manifest.
    pub manifest: Manifest,
    /// The session that the manifest came in.
    pub session: Incoming,
}

/// Looks for the manifest of a live update. `None`: this is a cold boot.
pub fn arrive(luo: &dyn Orchestrator) -> Result<Option<Arrival>, IncomingError> {
    let session = match luo.retrieve_session(&host_session()) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    // The index first: its binding never changes.
    let index: Index = document::read_document(&retrieve_document(&session, INDEX_TOKEN)?)?;
    let bytes = retrieve_document(&session, MANIFEST_TOKEN)?;
    let manifest = document::read_document(&bytes)?;
    index.check(&manifest, &bytes)?;
    Ok(Some(Arrival { manifest, session }))
}

fn retrieve_document(session: &Incoming, token: Token) -> Result<Vec<u8>, IncomingError> {
    let file = File::from(session.retrieve(token)?);
    let length = file.metadata().map_err(IncomingError::Read)?.len();
    if length > MAX_DOCUMENT {
        return Err(IncomingError::TooLarge(length));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map_err(IncomingError::Read)?;
    Ok(bytes)
}

/// A VM whose memory has been retrieved and whose process is restoring it.
struct Arriving {
    entry: VmEntry,
    session: Incoming,
    started: Result<Begun, IncomingError>,
}

/// A restore that is under way.
struct Begun {
    process: VmProcess,
    segments: Vec<Segment>,
    frames: Vec<Frames>,
}

/// Restores and resumes every VM of the manifest, in its order. Each VM comes with its session,
/// which is to be finished when all is well, and with the VM's part of the ledger.
pub fn resume_all(luo: &dyn Orchestrator, entries: &[VmEntry]) -> Vec<Arrived> {
    // All processes work at the same time; the most urgent VM is asked, and waited for, first.
    let arriving: Vec<_> = entries.iter().cloned().map(|entry| start(luo, entry)).collect();
    arriving.into_iter().map(|vm| vm.map_or_else(|lost| *lost, complete)).collect()
}

/// A VM after a live update.
pub struct Arrived {
    /// What the manifest said of it, with the ledger going on.
    pub entry: VmEntry,
    /// The VM: live, preserved, or failed when not even its session is there.
    pub vm: Guest,
    /// Its session, if the VM is live: finish it when all VMs are.
    pub session: Option<Incoming>,
    /// Host TSC when its first vCPU entered `KVM_RUN`, if it did.
    pub first_entry_ticks: Option<u64>,
    /// Of the segments whose page frames were looked up before, those frames and the ones that the
    /// segments came back in.
    pub frames: Vec<Frames>,
}

/// The page frames of one segment in both kernels.
#[derive(Debug, Clone, Copy)]
pub struct Frames {
    /// Size of the segment.
    pub bytes: u64,
    /// In the old kernel, while it was preserved.
    pub before: FrameDigest,
    /// In this one.
    pub after: FrameDigest,
}

/// Retrieves a VM's session and memory and has its process begin the restore.
fn start(luo: &dyn Orchestrator, mut entry: VmEntry) -> Result<Arriving, Box<Arrived>> {
    let start = tsc::now();
    match luo.retrieve_session(&vm_session(&entry.machine.name)) {
        Ok(session) => {
            let started = begin(RamSource::new(Some(luo)), &session, &mut entry, start);
            Ok(Arriving { entry, session, started })
        }
        Err(error) => {
            let mut vm = Guest::new(entry.machine.clone());
            vm.life = Life::Failed(crate::causes::chain(&error));
            let (session, first_entry_ticks, frames) = (None, None, Vec::new());
            Err(Box::new(Arrived { entry, vm, session, first_entry_ticks, frames }))
        }
    }
}

fn begin(
    ram: RamSource<'_>,
    session: &Incoming,
    entry: &mut VmEntry,
    start: u64,
) -> Result<Begun, IncomingError> {
    // The process starts while the memory is retrieved.
    let process = VmProcess::spawn()?;
    let spawned = tsc::now();
    entry.ledger.enter("spawn", start, spawned);
    let segments = retrieve_ram(ram, session, entry)?;
    let state = File::from(session.retrieve(STATE_TOKEN)?);
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
    let request = Request::Restore { machine, ram: ram.kind(), bytes };
    process.send(request, &files.borrow())?;
    entry.ledger.enter("open", retrieved, tsc::now());
    Ok(Begun { process, segments, frames })
}

/// Looks up the page frames that were asked for. Now, although the guest waits: once its process has
/// mapped them with the advice to use huge pages, the kernel moves small pages together behind
/// everyone's back.
fn look_up_frames(segments: &[Segment], entry: &mut VmEntry, start: u64) -> (Vec<Frames>, u64) {
    let known = segments.iter().zip(&entry.segments);
    let known = known.filter_map(|(segment, entry)| Some((segment, entry.frames?)));
    let frames = known.map(|(segment, before)| {
        Ok(Frames { bytes: segment.len(), before, after: FrameDigest::of(segment)? })
    });
    let frames: Result<Vec<_>, guest_mem::Error> = frames.collect();
    let frames = frames.unwrap_or_else(|error| {
        // No reason to keep the guest waiting, let alone to give it up.
        let why = crate::causes::chain(&error).join(": ");
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

/// The VM's RAM: what was preserved comes from the session, what was never touched is created again.
fn retrieve_ram(
    ram: RamSource<'_>,
    session: &Incoming,
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
            ram.take(index, session.retrieve(segment_token(index))?, segment.bytes)?
        } else {
            ram.create(entry.machine.name.as_str(), index, segment.bytes)?
        });
    }
    Ok(segments)
}

/// Waits for the restore and lets the guest run.
fn complete(arriving: Arriving) -> Arrived {
    let Arriving { mut entry, session, started } = arriving;
    let mut vm = Guest::new(entry.machine.clone());
    let waiting = tsc::now();
    let mut frames = Vec::new();
    let resumed = started.and_then(|begun| {
        let Begun { process, segments, .. } = begun;
        frames = begun.frames;
        match process.reply()? {
            Reply::Built => {}
            other => return Err(unexpected("restore", &other).into()),
        }
        entry.ledger.enter("restore", waiting, tsc::now());
        let first_entry = match entry.running {
            true => match process.ask(Request::Resume)? {
                Reply::Resumed { first_entry_ticks } => Some(first_entry_ticks),
                other => return Err(unexpected("resume", &other).into()),
            },
            false => None,
        };
        Ok((Live { process, segments, running: entry.running }, first_entry))
    });
    match resumed {
        Ok((live, first_entry_ticks)) => {
            if let (Some(entered), Some(last)) = (first_entry_ticks, entry.ledger.phases.last()) {
                entry.ledger.enter("resume", last.end, entered);
            }
            vm.life = Life::Live(live);
            Arrived { entry, vm, session: Some(session), first_entry_ticks, frames }
        }
        Err(error) => {
            let why = crate::causes::chain(&error);
            tracing::error!("VM `{}` is preserved: {}", entry.machine.name, why.join(": "));
            vm.life = Life::Preserved { session, entry: Box::new(entry.clone()), why };
            Arrived { entry, vm, session: None, first_entry_ticks: None, frames }
        }
    }
}

/// Tries again to restore a VM whose memory is preserved. On failure it stays so.
pub fn retry(luo: &dyn Orchestrator, session: Incoming, mut entry: VmEntry) -> Arrived {
    let started = begin(RamSource::new(Some(luo)), &session, &mut entry, tsc::now());
    complete(Arriving { entry, session, started })
}
