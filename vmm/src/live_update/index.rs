//! The index: a list of all sessions and their files, in a form that every `perennial` can read.
//!
//! LUO can list neither sessions nor tokens, and a host can read a manifest only if it knows the newest
//! binding in it. The index has only sessions, tokens, kinds, sizes and digests, and its binding never
//! changes: a host that cannot read a manifest can still carry everything that the index lists over its
//! own live update. The index is in the host's session, beside the manifest.

use super::manifest::{
    MANIFEST_TOKEN, Manifest, STATE_TOKEN, host_session, segment_token, vm_session,
};
use crate::guests::entry::VmEntry;
pub use crate::guests::indexed::{FileKind, IndexedFile, IndexedSession};
use crate::state::{Node, Reader, Schema, StateError};

/// Most sessions of one index: one for each VM of a manifest, and the host's.
const MAX_SESSIONS: usize = 4097;

/// All sessions that a host leaves to the next one. `perennial,index-v1`, which never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The sessions, the host's own first.
    pub sessions: Vec<IndexedSession>,
}

/// The index and the manifest disagree about a session.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the index says that session `{session}` has {index}, the manifest that it has {manifest}")]
pub struct Disagreement {
    session: String,
    index: String,
    manifest: String,
}

impl Index {
    /// Returns the index that belongs to `manifest`, whose encoding is `bytes`. An index does not list
    /// itself.
    pub fn of(manifest: &Manifest, bytes: &[u8]) -> Self {
        let file = IndexedFile {
            token: MANIFEST_TOKEN.0,
            kind: FileKind::Manifest,
            bytes: bytes.len() as u64,
            digest: crc32fast::hash(bytes),
        };
        let host = IndexedSession { name: host_session().to_string(), files: vec![file] };
        let vms = manifest.vms.iter().map(session_of);
        Self { sessions: std::iter::once(host).chain(vms).collect() }
    }

    /// Errors unless this is the index that was written with `manifest`, whose encoding is `bytes`: unless it has
    /// every session and every file of the manifest. It may have more, which the host that wrote it only carried on.
    pub fn check(&self, manifest: &Manifest, bytes: &[u8]) -> Result<(), Disagreement> {
        let host = host_session();
        for expected in Self::of(manifest, bytes).sessions {
            let found =
                self.session(&expected.name).map(|found| match found.name == host.as_str() {
                    // Beside the manifest, the host's session has documents that were carried on.
                    true => IndexedSession {
                        files: found
                            .files
                            .iter()
                            .filter(|f| expected.has(f.token))
                            .copied()
                            .collect(),
                        name: found.name.clone(),
                    },
                    false => found.clone(),
                });
            if found.as_ref() != Some(&expected) {
                return Err(Disagreement {
                    session: expected.name.clone(),
                    index: describe(found.as_ref()),
                    manifest: describe(Some(&expected)),
                });
            }
        }
        Ok(())
    }

    /// Adds what a host only carries on: whole sessions, and files of sessions that the index has already.
    #[must_use]
    pub fn with(mut self, carried: &[IndexedSession]) -> Self {
        for session in carried {
            match self.sessions.iter_mut().find(|known| known.name == session.name) {
                Some(known) => known.files.extend(&session.files),
                None => self.sessions.push(session.clone()),
            }
        }
        self
    }

    /// Returns the session called `name`.
    pub fn session(&self, name: &str) -> Option<&IndexedSession> {
        self.sessions.iter().find(|session| session.name == name)
    }
}

fn describe(session: Option<&IndexedSession>) -> String {
    let Some(session) = session else { return "nothing".to_owned() };
    let describe = |file: &IndexedFile| {
        let IndexedFile { token, kind, bytes, digest } = file;
        format!("{token}: {} of {bytes} bytes, {digest:08x}", kind.name())
    };
    format!("[{}]", session.files.iter().map(describe).collect::<Vec<_>>().join("; "))
}

/// Returns what an index says of the session of a VM with this entry in the manifest.
pub fn session_of(vm: &VmEntry) -> IndexedSession {
    let state = IndexedFile {
        token: STATE_TOKEN.0,
        kind: FileKind::State,
        bytes: vm.state_bytes,
        digest: vm.state_digest,
    };
    let preserved = vm.segments.iter().enumerate().filter(|(_, segment)| segment.preserved);
    let segments = preserved.map(|(index, segment)| IndexedFile {
        token: segment_token(index).0,
        kind: FileKind::Ram,
        bytes: segment.bytes,
        digest: 0,
    });
    IndexedSession {
        name: vm_session(&vm.machine.name).to_string(),
        files: std::iter::once(state).chain(segments).collect(),
    }
}

impl Schema for Index {
    const COMPATIBLE: &'static [&'static str] = &["perennial,index-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { sessions } = self;
        for (index, session) in sessions.iter().enumerate() {
            node.push(session.to_node(&format!("session@{index:x}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let sessions: Vec<IndexedSession> = reader.sequence("session")?;
        let mut names: Vec<&str> = sessions.iter().map(|session| session.name.as_str()).collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        match twice {
            _ if sessions.len() > MAX_SESSIONS => {
                let problem = format!("{} sessions, at most {MAX_SESSIONS}", sessions.len());
                Err(reader.invalid("session", problem))
            }
            Some(name) => Err(reader.invalid("session", format!("two sessions are called {name}"))),
            None => Ok(Self { sessions }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_update::manifest::tests::sample as manifest;
    use crate::state::contract::{contract_tests, refusal};

    fn sample() -> Index {
        Index::of(&manifest(), b"a manifest")
    }

    contract_tests! {
        Index,
        sample: sample,
        changes: [
            |i| i.sessions[0].name.push('x'),
            |i| i.sessions[0].files[0].token += 1,
            |i| i.sessions[0].files[0].kind = FileKind::Index,
            |i| i.sessions[0].files[0].kind = FileKind::Program,
            |i| i.sessions[0].files[0].bytes += 1,
            |i| i.sessions[0].files[0].digest += 1,
            |i| i.sessions[1].files.truncate(1),
            |i| i.sessions[1].files.clear(),
            |i| i.sessions.clear(),
        ],
        golden: "index-v1",
    }

    mod session {
        use super::*;

        contract_tests! {
            IndexedSession,
            sample: || super::sample().sessions[1].clone(),
            changes: [|s| s.name.push('x'), |s| s.files.swap(0, 1)],
            golden: "index-session-v1",
        }
    }

    #[test]
    fn an_index_lists_what_is_preserved_and_nothing_else() {
        let index = sample();
        let names: Vec<&str> = index.sessions.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["perennial-host", "perennial-vm-web-1"]);
        let kinds: Vec<_> = index.sessions[1].files.iter().map(|f| (f.token, f.kind)).collect();
        // The second segment of the sample was never touched.
        assert_eq!(kinds, [(0, FileKind::State), (1, FileKind::Ram)]);
    }

    #[test]
    fn an_index_of_another_manifest_is_refused_with_both_sides() {
        sample().check(&manifest(), b"a manifest").unwrap();
        let error = sample().check(&manifest(), b"another").unwrap_err().to_string();
        assert!(error.contains("`perennial-host` has [0: manifest of 10 bytes"), "{error}");
        assert!(error.contains("that it has [0: manifest of 7 bytes"), "{error}");
        let mut touched = manifest();
        touched.vms[0].segments[1].preserved = true;
        let error = sample().check(&touched, b"a manifest").unwrap_err().to_string();
        assert!(error.contains("`perennial-vm-web-1`") && error.contains("2: ram"), "{error}");
        let mut index = sample();
        index.sessions.truncate(1);
        let error = index.check(&manifest(), b"a manifest").unwrap_err().to_string();
        assert!(error.contains("`perennial-vm-web-1` has nothing"), "{error}");
    }

    #[test]
    fn what_a_host_only_carried_on_is_in_the_index_and_in_no_manifest() {
        let mut index = sample();
        let mut carried = index.sessions[1].clone();
        carried.name = "perennial-vm-db".to_owned();
        index.sessions.push(carried);
        let manifest_of_another =
            IndexedFile { token: 2, kind: FileKind::Manifest, bytes: 9, digest: 9 };
        index.sessions[0].files.push(manifest_of_another);
        index.check(&manifest(), b"a manifest").unwrap();
        // But nothing is added to the session of a VM that the manifest has.
        index.sessions[1].files.push(manifest_of_another);
        index.check(&manifest(), b"a manifest").unwrap_err();
    }

    #[test]
    fn an_index_that_contradicts_itself_is_refused() {
        let refused = |change| refusal(sample(), change);
        assert!(
            refused(|i| i.sessions.push(i.sessions[0].clone())).contains("two sessions are called")
        );
        assert!(
            refused(|i| i.sessions[1].files[1].token = 0).contains("two files have the token 0")
        );
    }
}
