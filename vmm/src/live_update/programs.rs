//! The programs of earlier hosts, which travel along, so that there is a way back to them.
//!
//! A host that leaves preserves its own program, before it pauses a VM. The next host holds the program as it holds
//! a preserved VM (`guests/held.rs`), and passes it on with its own. Nothing depends on a program: if there is no
//! room for it, or it is lost, a line in the log says so and the live update goes on.
//!
//! Each program is in a session of its own, so that a `perennial` that does not know such sessions carries it on, as
//! it does every session that it does not know. The session's name has the program's version, because the index,
//! whose binding never changes, has no place for one. The index lists the programs from the oldest to the newest.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use luo::{Orchestrator, Outgoing, SessionName, Token};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals};

use super::index::{FileKind, IndexedFile, IndexedSession};
use crate::causes::chain;
use crate::guests::held::Held;
use crate::guests::memfd::zeroed;
use crate::guests::ram;

/// Start of the names of sessions with a program. The digest and the version follow: `perennial-program-0a1b2c3d-0.1.0`.
const PREFIX: &str = "perennial-program-";
/// Token of the program in its session.
const PROGRAM_TOKEN: Token = Token(0);
/// Largest program, in bytes. A static one has about 8 MiB.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most programs that a host holds.
pub const MAX_HELD: usize = 4;
/// Memory of the machine that copying a program leaves for everything else, in bytes.
const SPARE_BYTES: u64 = 64 << 20;
/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// A program cannot be kept, or one that is held cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// The file cannot be read, or the copy cannot be written.
    #[error("cannot {attempt} the program")]
    Io {
        /// The attempted action.
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A session or its file cannot be had from LUO.
    #[error(transparent)]
    Luo(#[from] luo::Error),
    /// The program is larger than any that is kept.
    #[error("the program has {found} bytes, at most {MAX_BYTES} are kept")]
    TooLarge {
        /// Its size in bytes.
        found: u64,
    },
    /// The machine has too little memory for a copy.
    #[error(
        "a copy of the program takes {} MiB, and the host has {} MiB available, {} MiB of which must stay free: \
         free memory, and try again",
        .bytes >> 20,
        .available >> 20,
        SPARE_BYTES >> 20
    )]
    NoRoom {
        /// Size of the program in bytes.
        bytes: u64,
        /// `MemAvailable`, in bytes.
        available: u64,
    },
    /// The program has another size than was preserved.
    #[error("the program is damaged: it has {found} bytes, the index says {left}")]
    Size {
        /// Size of the retrieved file.
        found: u64,
        /// Size in the index.
        left: u64,
    },
    /// The program has other contents than were preserved.
    #[error("the program is damaged: it has the digest {found:08x}, the index says {left:08x}")]
    Digest {
        /// CRC-32 of the retrieved file.
        found: u32,
        /// CRC-32 in the index.
        left: u32,
    },
}

fn io_error(attempt: &'static str) -> impl Fn(io::Error) -> ProgramError {
    move |source| ProgramError::Io { attempt, source }
}

/// The program of an earlier host.
#[derive(Debug)]
pub struct Program {
    held: Held,
    file: IndexedFile,
    /// Whether the running program is the same. Found out once, because both must be read for it.
    is_own: OnceCell<bool>,
}

impl Program {
    /// Takes a session for that of a program. Hands it back if it is none.
    pub fn of(held: Held) -> Result<Self, Held> {
        match (held.name().as_str().starts_with(PREFIX), held.files()) {
            (true, [file]) if file.kind == FileKind::Program && file.token == PROGRAM_TOKEN.0 => {
                let file = *file;
                Ok(Self { held, file, is_own: OnceCell::new() })
            }
            _ => Err(held),
        }
    }

    /// What the index says of the program.
    pub fn file(&self) -> IndexedFile {
        self.file
    }

    /// The version of the program, as the host said that preserved it.
    pub fn version(&self) -> Option<&str> {
        let (_digest, version) = self.held.name().as_str().strip_prefix(PREFIX)?.split_once('-')?;
        Some(version)
    }

    /// The program, for a person.
    pub fn describe(&self) -> String {
        let version = self.version().unwrap_or("of unknown version");
        format!("the earlier perennial {version} (digest {:08x})", self.file.digest)
    }

    /// Takes the program out of the last host's session, unless it `stays` there.
    pub fn take(&mut self, luo: &dyn Orchestrator, stays: bool) -> Result<(), ProgramError> {
        self.held.collect(luo, false)?;
        if stays {
            return Ok(());
        }
        self.held.release()?;
        self.leave_pool()
    }

    /// Copies the program out of a pool, where it would take room from the VMs.
    fn leave_pool(&mut self) -> Result<(), ProgramError> {
        let file = File::from(self.held.file(PROGRAM_TOKEN)?);
        // Only memfds have seals: it has left the pool already.
        if fcntl_get_seals(&file).is_ok() {
            return Ok(());
        }
        check_room(self.file.bytes)?;
        let memory = File::from(luo::memfd("program", self.file.bytes)?);
        copy(&file, Some(&memory), self.file.bytes)?;
        self.held.replace(PROGRAM_TOKEN, memory.into());
        Ok(())
    }

    /// Preserves the program for the next host. `None` if its session stays where it is.
    fn preserve(&self, luo: &dyn Orchestrator) -> Result<Option<Outgoing>, ProgramError> {
        if !luo.backend().memory_is_dax_files() {
            return Ok(self.held.preserve(luo)?);
        }
        // As memory of the pool, which need not be copied in the blackout.
        let file = File::from(self.held.file(PROGRAM_TOKEN)?);
        let (memory, _) = copy_for(luo, &file, self.file.bytes)?;
        let session = luo.create_session(self.held.name())?;
        session.preserve(memory.as_fd(), PROGRAM_TOKEN)?;
        Ok(Some(session))
    }

    /// Lets the program go. Nothing depends on it, so a failure is only logged.
    pub fn give_up(self) {
        let Some(session) = self.held.into_session() else { return };
        if let Err(failure) = session.finish() {
            tracing::warn!("{}", chain(&failure.error).join(": "));
        }
    }

    /// Whether the running program is the same.
    pub fn is_own(&self) -> bool {
        let compare = || {
            own().is_ok_and(|(file, bytes)| {
                // Most other programs have another size.
                bytes == self.file.bytes
                    && copy(&file, None, bytes).is_ok_and(|digest| digest == self.file.digest)
            })
        };
        *self.is_own.get_or_init(compare)
    }

    /// Returns an executable copy of the program, which is checked and which nobody can change any more.
    pub fn executable(&self) -> Result<File, ProgramError> {
        let IndexedFile { bytes: left, digest: wanted, .. } = self.file;
        let source = File::from(self.held.file(PROGRAM_TOKEN)?);
        let found = source.metadata().map_err(io_error("read"))?.len();
        if found != left {
            return Err(ProgramError::Size { found, left });
        }
        check_room(left)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = luo::executable_memfd("perennial", flags);
        let memory = File::from(memory.map_err(|errno| io_error("copy")(errno.into()))?);
        let found = copy(&source, Some(&memory), left)?;
        if found != wanted {
            return Err(ProgramError::Digest { found, left: wanted });
        }
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&memory, seals).map_err(|errno| io_error("seal")(errno.into()))?;
        Ok(memory)
    }
}

/// What travels to the next host beside the VMs.
#[derive(Debug, Default)]
pub struct Travelling {
    /// The sessions. Dropping them undoes it.
    _sessions: Vec<Outgoing>,
    /// What the next index has to list of them.
    pub indexed: Vec<IndexedSession>,
}

/// Preserves the programs that are held, and the running one as the newest. Those for which that fails do not go along.
pub fn preserve(luo: &dyn Orchestrator, held: &[Program]) -> Travelling {
    let (mut sessions, mut indexed) = (Vec::new(), Vec::new());
    for program in held {
        match program.preserve(luo) {
            Ok(session) => {
                sessions.extend(session);
                indexed.push(program.held.indexed());
            }
            Err(error) => does_not_go_along(&program.describe(), &error),
        }
    }
    match preserve_own(luo) {
        Ok((session, of_own)) => {
            sessions.push(session);
            indexed.push(of_own);
        }
        Err(error) => does_not_go_along("this host's own program", &error),
    }
    Travelling { _sessions: sessions, indexed }
}

fn does_not_go_along(what: &str, error: &dyn std::error::Error) {
    let why = chain(error).join(": ");
    tracing::warn!("{what} does not go along, so later hosts have no way back to it: {why}");
}

/// Preserves the running program in a session of its own.
fn preserve_own(luo: &dyn Orchestrator) -> Result<(Outgoing, IndexedSession), ProgramError> {
    let (file, bytes) = own().map_err(io_error("read"))?;
    if bytes > MAX_BYTES {
        return Err(ProgramError::TooLarge { found: bytes });
    }
    let (memory, digest) = copy_for(luo, &file, bytes)?;
    let name = format!("{PREFIX}{digest:08x}-{}", env!("CARGO_PKG_VERSION"));
    let name = SessionName::new(name).map_err(|e| io_error("name")(io::Error::other(e)))?;
    let session = luo.create_session(&name)?;
    session.preserve(memory.as_fd(), PROGRAM_TOKEN)?;
    let file = IndexedFile { token: PROGRAM_TOKEN.0, kind: FileKind::Program, bytes, digest };
    Ok((session, IndexedSession { name: name.to_string(), files: vec![file] }))
}

/// Chooses what a host goes on holding of programs, which are in the order of their age. `is_needed` says that a VM is
/// preserved that one of them may have written. Without such a VM only the newest is of use: the last host's.
pub fn choose(programs: &mut Vec<Program>, is_needed: bool) {
    let (own, mut others): (Vec<_>, Vec<_>) = programs.drain(..).partition(Program::is_own);
    let most = if is_needed { MAX_HELD } else { 1 };
    let surplus = others.len().saturating_sub(most);
    // The oldest may have written a VM that is preserved for long, the newest is the last host's.
    let first = usize::from(is_needed && surplus > 0);
    let surplus: Vec<_> = others.drain(first..first + surplus).collect();
    own.into_iter().chain(surplus).for_each(Program::give_up);
    *programs = others;
}

/// The digest of the running program's file, which tells builds of one version apart: its session is called by it. `None`
/// if the file cannot be read.
pub fn own_digest() -> Option<u32> {
    static DIGEST: OnceLock<Option<u32>> = OnceLock::new();
    *DIGEST.get_or_init(|| own().ok().and_then(|(file, bytes)| copy(&file, None, bytes).ok()))
}

/// The version of the running program, with its digest.
pub fn own_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match own_digest() {
        Some(digest) => format!("{version}+{digest:08x}"),
        None => version.to_owned(),
    }
}

/// Returns the running program, and its size in bytes.
fn own() -> io::Result<(File, u64)> {
    let file = File::open("/proc/self/exe")?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

/// Copies the first `bytes` bytes of a program to memory that `luo` need not copy in the blackout. Returns their CRC-32
/// too.
fn copy_for(luo: &dyn Orchestrator, from: &File, bytes: u64) -> Result<(File, u32), ProgramError> {
    // A pool has its own memory, and says itself if there is not enough.
    if !luo.backend().memory_is_dax_files() {
        check_room(bytes)?;
    }
    let memory = File::from(luo.create_memory("program", bytes)?);
    let digest = copy(from, Some(&memory), bytes)?;
    Ok((memory, digest))
}

/// Errors if a copy of `bytes` bytes would leave too little memory.
fn check_room(bytes: u64) -> Result<(), ProgramError> {
    let available = ram::available_bytes().map_err(io_error("find memory for"))?;
    match bytes.saturating_add(SPARE_BYTES) > available {
        true => Err(ProgramError::NoRoom { bytes, available }),
        false => Ok(()),
    }
}

/// Reads the first `bytes` bytes of `from`, and writes them to `to` if there is one. Returns their CRC-32.
fn copy(from: &File, to: Option<&File>, bytes: u64) -> Result<u32, ProgramError> {
    let mut digest = crc32fast::Hasher::new();
    let mut piece = zeroed(PIECE.min(bytes) as usize).map_err(io_error("read"))?;
    let mut at = 0;
    while at < bytes {
        let piece = &mut piece[..(bytes - at).min(PIECE) as usize];
        from.read_exact_at(piece, at).map_err(io_error("read"))?;
        digest.update(piece);
        if let Some(to) = to {
            to.write_all_at(piece, at).map_err(io_error("copy"))?;
        }
        at += piece.len() as u64;
    }
    Ok(digest.finalize())
}

#[cfg(test)]
mod tests;
