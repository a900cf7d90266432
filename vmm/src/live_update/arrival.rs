//! What the last host left: its index, its manifest, and what it only carried on itself.
//!
//! Looking consumes nothing. Whatever cannot be read stays in its session, or is held by this host, and is reported;
//! it can be read again later, by this host or by a later one.
//!
//! | index | manifest | what becomes of the VMs |
//! |---|---|---|
//! | read | read | each is restored from its entry |
//! | read | not | each is held, as the file descriptors that the index lists, and the manifest with them |
//! | damaged | read | each is restored from its entry |
//! | not | not | nothing is known, so nothing is done: the session stays as it is |

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use luo::{Incoming, Orchestrator, Token};

use super::incoming::IncomingError;
use super::index::{FileKind, Index, IndexedFile, IndexedSession, session_of};
use super::manifest::{INDEX_TOKEN, MANIFEST_TOKEN, Manifest, UNDONE, host_session};
use crate::causes::chain;
use crate::guests::entry::VmEntry;
use crate::guests::memfd::zeroed;
use crate::state::document;

/// Largest manifest or index, in bytes.
const MAX_DOCUMENT: u64 = 16 << 20;

/// The last host's session, as far as this program can read it.
#[derive(Debug)]
pub struct Arrival {
    /// The session.
    pub session: Incoming,
    /// All that the last host left.
    pub index: Index,
    /// The last host's manifest. `None` if this program cannot read it.
    pub manifest: Option<Manifest>,
    /// Manifests of earlier hosts that the last host could not read, and this program can.
    pub earlier: Vec<Manifest>,
    /// Manifests that this program cannot read.
    pub unread: Vec<Unread>,
}

/// A manifest that this program cannot read. It is carried on as it is, for the VMs in it.
#[derive(Debug)]
pub struct Unread {
    /// What the index says of it.
    pub file: IndexedFile,
    /// The document; `None` if it cannot even be retrieved.
    pub fd: Option<OwnedFd>,
    /// Why it cannot be read: the chain of causes.
    pub why: Vec<String>,
    /// Whether another attempt to retrieve it may succeed.
    pub may_pass: bool,
}

/// The last host's session cannot be retrieved, or says nothing that this program understands.
#[derive(Debug, thiserror::Error)]
#[error("what the last host left cannot be read")]
pub struct NotSeen {
    /// The session, if it could be retrieved.
    pub session: Option<Incoming>,
    /// Why.
    #[source]
    pub error: Box<IncomingError>,
}

/// Looks at what the last host left in `luo`. `None` if it left nothing: after a cold boot, or because it ran on.
pub fn look(luo: &dyn Orchestrator) -> Result<Option<Arrival>, NotSeen> {
    match luo.retrieve_session(&host_session()) {
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(NotSeen { session: None, error: Box::new(error.into()) }),
        Ok(session) if was_undone(&session) => {
            tracing::error!(
                "the last host began to leave, was undone, and ended before it could take back what it had left: that \
                 is outdated, and not used"
            );
            Ok(None)
        }
        Ok(session) => read(session).map(Some),
    }
}

/// Whether the last host has overwritten its documents, because the guests ran on.
fn was_undone(session: &Incoming) -> bool {
    let says_so = |fd| {
        let mut start = [0; UNDONE.len()];
        File::from(fd).read_exact_at(&mut start, 0).is_ok() && start == *UNDONE
    };
    session.retrieve(INDEX_TOKEN).is_ok_and(says_so)
        && match session.retrieve(MANIFEST_TOKEN) {
            Ok(fd) => says_so(fd),
            Err(error) => error.is_not_found(),
        }
}

/// Reads the documents of the last host's session.
pub fn read(session: Incoming) -> Result<Arrival, NotSeen> {
    let index = Document::<Index>::retrieve(&session, INDEX_TOKEN);
    let manifest = Document::<Manifest>::retrieve(&session, MANIFEST_TOKEN);
    let index = match (index.value, &manifest) {
        (Ok((index, _)), _) => index,
        // It is there, but says nothing. The manifest lists the sessions as well.
        (Err(error), Document { value: Ok((manifest, bytes)), .. }) if !error.may_pass() => {
            tracing::error!("{}; the manifest is used without it", chain(&error).join(": "));
            Index::of(manifest, bytes)
        }
        (Err(error), _) => {
            return Err(NotSeen { session: Some(session), error: Box::new(error) });
        }
    };
    let Document { fd, value } = manifest;
    let checked = value.and_then(|(manifest, bytes)| {
        index.check(&manifest, &bytes)?;
        Ok(manifest)
    });
    let host = index.session(host_session().as_str());
    let files = host.map(|host| host.files.as_slice()).unwrap_or_default();
    let (mut unread, mut earlier) = (Vec::new(), Vec::new());
    let manifest = match checked {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            let listed = files.iter().find(|file| file.token == MANIFEST_TOKEN.0);
            let nothing = IndexedFile {
                token: MANIFEST_TOKEN.0,
                kind: FileKind::Manifest,
                bytes: 0,
                digest: 0,
            };
            let file = listed.copied().unwrap_or(nothing);
            unread.push(Unread::new(file, fd, &error));
            None
        }
    };
    let is_earlier =
        |file: &&IndexedFile| file.kind == FileKind::Manifest && file.token != MANIFEST_TOKEN.0;
    for file in files.iter().filter(is_earlier) {
        let Document { fd, value } = Document::retrieve(&session, Token(file.token));
        match intact(file, value) {
            Ok(manifest) => earlier.push(manifest),
            Err(error) => unread.push(Unread::new(*file, fd, &error)),
        }
    }
    Ok(Arrival { session, index, manifest, earlier, unread })
}

impl Arrival {
    /// Returns the entries of the VMs that the index lists, most urgent first, and the sessions for which no manifest
    /// has an entry that this program can read.
    pub fn entries(&self) -> (Vec<VmEntry>, Vec<IndexedSession>) {
        let mut entries = self.manifest.as_ref().map(|m| m.vms.clone()).unwrap_or_default();
        let mut opaque = Vec::new();
        let host = host_session();
        for session in self.index.sessions.iter().filter(|s| s.name != host.as_str()) {
            if entries.iter().any(|entry| session_of(entry).name == session.name) {
                continue;
            }
            match entry_of(session, &self.earlier) {
                Some(entry) => entries.push(entry),
                None => opaque.push(session.clone()),
            }
        }
        (entries, opaque)
    }
}

/// Returns the entry for exactly this session from a manifest that came with it. A manifest that was carried on can
/// have entries of VMs that were given up since, and booted again under the same name.
pub fn entry_of(session: &IndexedSession, manifests: &[Manifest]) -> Option<VmEntry> {
    let mut entries = manifests.iter().flat_map(|manifest| &manifest.vms);
    entries.find(|entry| session_of(entry) == *session).cloned()
}

impl Unread {
    fn new(file: IndexedFile, fd: Option<OwnedFd>, error: &IncomingError) -> Self {
        Self { file, fd, why: chain(error), may_pass: error.may_pass() }
    }

    /// Tries again to retrieve the manifest from `session`, unless it was finished, and to read it.
    pub fn read(&mut self, session: Option<&Incoming>) -> Option<Manifest> {
        let Document { fd, value } = match (&self.fd, session) {
            (Some(fd), _) => match fd.try_clone() {
                Ok(fd) => Document::of(fd),
                Err(error) => Document { fd: None, value: Err(IncomingError::Read(error)) },
            },
            (None, Some(session)) => Document::retrieve(session, Token(self.file.token)),
            (None, None) => return None,
        };
        self.fd = self.fd.take().or(fd);
        match intact(&self.file, value) {
            Ok(manifest) => Some(manifest),
            Err(error) => {
                (self.why, self.may_pass) = (chain(&error), error.may_pass());
                None
            }
        }
    }
}

/// Returns a manifest that is the one that an index listed.
fn intact(
    listed: &IndexedFile,
    value: Result<(Manifest, Vec<u8>), IncomingError>,
) -> Result<Manifest, IncomingError> {
    let (manifest, bytes) = value?;
    let found = crc32fast::hash(&bytes);
    match found == listed.digest {
        true => Ok(manifest),
        false => Err(IncomingError::Damaged { found, left: listed.digest }),
    }
}

/// A document of the host's session: its file, and its value and bytes.
struct Document<T> {
    fd: Option<OwnedFd>,
    value: Result<(T, Vec<u8>), IncomingError>,
}

impl<T: crate::state::Schema> Document<T> {
    fn retrieve(session: &Incoming, token: Token) -> Self {
        match session.retrieve(token) {
            Ok(fd) => Self::of(fd),
            Err(error) => Self { fd: None, value: Err(error.into()) },
        }
    }

    fn of(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let read = || {
            let length = file.metadata().map_err(IncomingError::Read)?.len();
            if length > MAX_DOCUMENT {
                return Err(IncomingError::TooLarge { found: length, most: MAX_DOCUMENT });
            }
            let mut bytes = zeroed(length as usize).map_err(IncomingError::Read)?;
            file.read_exact_at(&mut bytes, 0).map_err(IncomingError::Read)?;
            Ok((document::read_document(&bytes)?, bytes))
        };
        let value = read();
        Self { fd: Some(file.into()), value }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use luo::builtin::keeper::Keeper;

    use super::*;
    use crate::guests::memfd::document_memfd;

    /// Looks at documents of the host's session.
    fn looked_at(documents: &[(Token, &[u8])]) -> Result<Option<Arrival>, NotSeen> {
        let keeper = Keeper::start();
        let session = keeper.create_session(&host_session()).unwrap();
        for (token, bytes) in documents {
            let file = document_memfd("a test", bytes).unwrap();
            session.preserve(file.as_fd(), *token).unwrap();
        }
        let kept = keeper.switch().unwrap();
        drop(session);
        look(&Keeper::arrive(kept).unwrap())
    }

    #[test]
    fn overwritten_documents_say_that_the_guests_ran_on_and_damaged_ones_do_not() {
        for undone in
            [&[(INDEX_TOKEN, UNDONE), (MANIFEST_TOKEN, UNDONE)][..], &[(INDEX_TOKEN, UNDONE)]]
        {
            assert!(matches!(looked_at(undone), Ok(None)));
        }
        let damaged = [0; UNDONE.len()];
        for other in [
            &[(INDEX_TOKEN, &damaged[..]), (MANIFEST_TOKEN, UNDONE)][..],
            &[(INDEX_TOKEN, UNDONE), (MANIFEST_TOKEN, &damaged)],
            &[(MANIFEST_TOKEN, UNDONE)],
        ] {
            assert!(looked_at(other).is_err());
        }
    }
}
