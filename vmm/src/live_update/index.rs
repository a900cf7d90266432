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
use crate::state::{Node, Reader, Schema, StateError};

/// Most sessions of one index: one for each VM of a manifest, and the host's.
const MAX_SESSIONS: usize = 4097;
/// Most files of one session: a state document and the segments of a VM's RAM, with room for more.
const MAX_FILES: usize = 256;

/// All sessions that a host leaves to the next one. `perennial,index-v1`, which never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The sessions, the host's own first.
    pub sessions: Vec<IndexedSession>,
}

/// One session. `perennial,index-session-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedSession {
    /// The session's name in LUO.
    pub name: String,
    /// The files in the session.
    pub files: Vec<IndexedFile>,
}

/// One preserved file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedFile {
    /// The file's token in the session.
    pub token: u64,
    /// Kind of file.
    pub kind: FileKind,
    /// Size in bytes.
    pub bytes: u64,
    /// CRC-32 (IEEE 802.3) of the contents; 0 for RAM, whose contents the host does not read.
    pub digest: u32,
}

/// Kind of a preserved file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A segment of guest RAM.
    Ram,
    /// A VM's state document.
    State,
    /// The manifest of a host.
    Manifest,
    /// An index.
    Index,
    /// A program.
    Program,
}

impl FileKind {
    const ALL: [(Self, &str); 5] = [
        (Self::Ram, "ram"),
        (Self::State, "state"),
        (Self::Manifest, "manifest"),
        (Self::Index, "index"),
        (Self::Program, "program"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }
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

    /// Errors unless this is the index that belongs to `manifest`, whose encoding is `bytes`.
    pub fn check(&self, manifest: &Manifest, bytes: &[u8]) -> Result<(), Disagreement> {
        let expected = Self::of(manifest, bytes);
        let all = self.sessions.iter().chain(&expected.sessions).map(|session| &session.name);
        for name in all {
            let (index, manifest) = (self.describe(name), expected.describe(name));
            if index != manifest {
                return Err(Disagreement { session: name.clone(), index, manifest });
            }
        }
        Ok(())
    }

    fn describe(&self, name: &str) -> String {
        match self.sessions.iter().find(|session| session.name == name) {
            None => "nothing".to_owned(),
            Some(session) => {
                let describe = |file: &IndexedFile| {
                    let IndexedFile { token, kind, bytes, digest } = file;
                    format!("{token}: {} of {bytes} bytes, {digest:08x}", kind.name())
                };
                format!("[{}]", session.files.iter().map(describe).collect::<Vec<_>>().join("; "))
            }
        }
    }
}

fn session_of(vm: &VmEntry) -> IndexedSession {
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

impl Schema for IndexedSession {
    const COMPATIBLE: &'static [&'static str] = &["perennial,index-session-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { name, files } = self;
        node.put_str("session-name", name);
        let kinds: Vec<&str> = files.iter().map(|file| file.kind.name()).collect();
        node.put_strings("kinds", &kinds);
        let list = |value: fn(&IndexedFile) -> u64| files.iter().map(value).collect::<Vec<_>>();
        node.put_u64s("tokens", &list(|file| file.token));
        node.put_u64s("bytes", &list(|file| file.bytes));
        node.put_u64s("digests", &list(|file| file.digest.into()));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let name = reader.str("session-name")?;
        let kinds = reader.string_list("kinds")?;
        let lists = [reader.u64s("tokens")?, reader.u64s("bytes")?, reader.u64s("digests")?];
        if kinds.len() > MAX_FILES || lists.iter().any(|list| list.len() != kinds.len()) {
            let lengths = lists.map(|list| list.len());
            let problem = format!(
                "{} kinds (at most {MAX_FILES}), but {lengths:?} tokens, sizes and digests",
                kinds.len()
            );
            return Err(reader.invalid("kinds", problem));
        }
        let [tokens, bytes, digests] = lists;
        let mut files = Vec::with_capacity(kinds.len());
        for (((kind, token), bytes), digest) in kinds.iter().zip(tokens).zip(bytes).zip(digests) {
            let known = FileKind::parse(kind);
            let kind =
                known.ok_or_else(|| reader.invalid("kinds", format!("unknown kind `{kind}`")))?;
            let digest = u32::try_from(digest).map_err(|_| {
                reader.invalid("digests", format!("{digest:#x} has more than 32 bits"))
            })?;
            if files.iter().any(|file: &IndexedFile| file.token == token) {
                return Err(reader.invalid("tokens", format!("two files have the token {token}")));
            }
            files.push(IndexedFile { token, kind, bytes, digest });
        }
        Ok(Self { name, files })
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
        touched.vms.clear();
        let error = sample().check(&touched, b"a manifest").unwrap_err().to_string();
        assert!(error.contains("the manifest that it has nothing"), "{error}");
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
