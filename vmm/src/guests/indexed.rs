//! What an index says of one session: its name, and the kind, size and digest of each file in it.
//!
//! Every `perennial` reads these bindings, whatever its age. So a host can hold and carry on the session of a VM
//! about which it can read nothing else.

use crate::state::{Node, Reader, Schema, StateError};

/// Most files of one session: a state document and the segments of a VM's RAM, with room for more.
const MAX_FILES: usize = 256;

/// One session. `perennial,index-session-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedSession {
    /// The session's name in LUO.
    pub name: String,
    /// The files in the session.
    pub files: Vec<IndexedFile>,
}

impl IndexedSession {
    /// Whether a file has this token.
    pub fn has(&self, token: u64) -> bool {
        self.files.iter().any(|file| file.token == token)
    }
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

    /// The kind's name in the index.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
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
