//! What a host carries on without running it: the preserved VMs, documents for later hosts, and earlier programs.
//!
//! A preserved VM goes along with every live update and every handover, as the file descriptors that the host holds
//! and under the same names and tokens, until a host can run it or an operator gives it up with `stop`. Its RAM
//! stays where it is. If this program can read its entry in the manifest, the entry goes along in the next manifest;
//! if not, the manifest that has it goes along as it is.

use std::os::fd::{AsFd, OwnedFd};

use luo::{Orchestrator, Outgoing, Token};

use super::arrival::Unread;
use super::index::{IndexedFile, IndexedSession};
use super::manifest::{FIRST_CARRIED_TOKEN, host_session};
use super::outgoing::luo_error;
use super::programs::Program;
use super::{Step, UpdateError};
use crate::guests::entry::VmEntry;
use crate::guests::held::Held;
use crate::guests::{Guest, Life};

/// What is carried on beside the VMs.
#[derive(Debug, Default)]
pub struct Carried {
    /// Manifests that this program cannot read.
    pub manifests: Vec<Unread>,
    /// Sessions that are no VM's: of a kind that this program does not know.
    pub sessions: Vec<Held>,
    /// Programs of earlier hosts, the oldest first.
    pub programs: Vec<Program>,
}

impl Carried {
    /// What can be carried of the manifests, with its token in the host's next session.
    fn documents(&self) -> impl Iterator<Item = (IndexedFile, &OwnedFd)> {
        let held = self.manifests.iter().filter_map(|unread| Some((unread, unread.fd.as_ref()?)));
        held.zip(FIRST_CARRIED_TOKEN.0..)
            .map(|((unread, fd), token)| (IndexedFile { token, ..unread.file }, fd))
    }

    /// The tokens of the manifests in the host's next session.
    pub fn tokens(&self) -> impl Iterator<Item = Token> {
        self.documents().map(|(file, _)| Token(file.token))
    }

    /// Preserves the manifests in the host's session.
    pub fn preserve_manifests(&self, host: &Outgoing) -> Result<(), UpdateError> {
        self.documents().try_for_each(|(file, fd)| {
            host.preserve(fd.as_fd(), Token(file.token)).map_err(luo_error(Step::Jump, None))
        })
    }
}

/// Preserves everything that is carried on in sessions. Returns them; dropping them undoes it.
pub fn preserve(
    luo: &dyn Orchestrator,
    vms: &[Guest],
    carried: &Carried,
) -> Result<Vec<Outgoing>, UpdateError> {
    let of_vms = preserved(vms).map(|(vm, held, _)| (Some(&vm.machine), held));
    let others = carried.sessions.iter().map(|held| (None, held));
    let mut sessions = Vec::new();
    for (machine, held) in of_vms.chain(others) {
        let session = held.preserve(luo).map_err(luo_error(Step::PreserveRam, machine))?;
        sessions.extend(session);
    }
    Ok(sessions)
}

/// Returns how many files [`preserve`] preserves.
pub fn files(vms: &[Guest], carried: &Carried) -> usize {
    let held = preserved(vms).map(|(_, held, _)| held).chain(&carried.sessions);
    held.map(|held| held.preserved_again().count()).sum()
}

/// Returns the entries of the preserved VMs for the next manifest.
pub fn entries(vms: &[Guest]) -> impl Iterator<Item = VmEntry> {
    preserved(vms).filter_map(|(_, _, entry)| {
        let mut entry = entry?.clone();
        // The page frames were compared when the VM arrived here. Nothing pins them to their places since.
        entry.segments.iter_mut().for_each(|segment| segment.frames = None);
        Some(entry)
    })
}

/// Returns what the next index has to list beside what its manifest lists.
pub fn indexed(vms: &[Guest], carried: &Carried) -> Vec<IndexedSession> {
    let files: Vec<_> = carried.documents().map(|(file, _)| file).collect();
    let host = IndexedSession { name: host_session().to_string(), files };
    let opaque = preserved(vms).filter(|(_, _, entry)| entry.is_none()).map(|(_, held, _)| held);
    let sessions = opaque.chain(&carried.sessions).map(Held::indexed);
    std::iter::once(host).chain(sessions).collect()
}

fn preserved(vms: &[Guest]) -> impl Iterator<Item = (&Guest, &Held, Option<&VmEntry>)> {
    vms.iter().filter_map(|vm| match &vm.life {
        Life::Preserved { held, entry, .. } => Some((vm, held, entry.as_deref())),
        _ => None,
    })
}
