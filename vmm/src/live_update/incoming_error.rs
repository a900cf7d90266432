//! Why a VM, or what the last host left, cannot be taken over.

use std::io;
use std::time::Duration;

use super::index::Disagreement;
use crate::guests::conversation::ProcessError;
use crate::guests::files::OpenError;
use crate::guests::ram::RamError;
use crate::state::StateError;

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
    /// The VM's process failed after its guest was told to resume.
    #[error(
        "its process failed when it resumed the guest, which may have run on: its state document is outdated"
    )]
    Resume(#[source] Box<IncomingError>),
    /// The files of the VM, or its process, were not ready by the deadline of all VMs. They may still become so.
    #[error("it has waited for {within:?} until {waits_for}, and still does; `restore` tries anew")]
    Late {
        /// What the VM waits for.
        waits_for: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// They have not become ready later either.
    #[error(
        "it waited for {within:?} until {waits_for}: that hangs, or the host is overloaded. `restore` tries again"
    )]
    TooLate {
        /// What the VM waits for.
        waits_for: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// The attempt was ended before it had succeeded or failed.
    #[error("the attempt to restore it was given up, because the host or the VM was to end")]
    GivenUp,
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
