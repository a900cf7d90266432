//! A state directory: keeps the state of a generation for the next run.
//!
//! ```text
//! DIR/state              the index: the files with their sizes and CRC-32 sums
//!     tree-N.dtb         the handover tree of live update N (`perennial luo show` prints it)
//!     memory-N           the contents of all preserved files; pages of zeros are holes
//! ```
//!
//! N is the number of the live update. A new state is written beside the old one and becomes valid
//! when its index is renamed to `state`; then the old state is removed. So if writing stops at any
//! moment, the directory has either the old state or the new one, never a mixture. A first state
//! that was not completed has no index, and is refused. No write is synced: after a crash of the
//! machine the new state may be damaged, and is refused too. A directory with a file of any other
//! name is foreign: nothing in it is read or written. A run locks its directory.
//!
//! The sums detect damage; they do not protect against an attacker.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::memfd::{Kept, Store, numbers, reopen};
use crate::builtin::OpenFile;
use crate::builtin::tree::{Handover, v1};

mod contents;
pub(crate) mod index;
#[cfg(test)]
mod tests;

use contents::Part;
use index::{Entry, Index};

const INDEX: &str = "state";
const NEW_INDEX: &str = "state.new";

/// An error of a state directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory cannot be created, opened or listed.
    #[error("cannot use {} as a state directory", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// Another run has locked the directory.
    #[error(
        "{} is in use by another run; wait for its end, or use another directory",
        path.display()
    )]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The directory has a file that no state has.
    #[error(
        "{} is not a state directory: it contains `{name}`; use an empty directory",
        path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// The name of the file, escaped.
        name: String,
    },
    /// The first state of the directory was not completed.
    #[error(
        "{} has an incomplete state: the run that wrote it was interrupted; remove the directory \
         to start without a state",
        path.display()
    )]
    Incomplete {
        /// The directory.
        path: PathBuf,
    },
    /// A file differs from the one that was written.
    #[error("{} is damaged: {problem}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The difference.
        problem: String,
    },
    /// The handover tree cannot be decoded.
    #[error("{} is damaged: it cannot be decoded", file.display())]
    Tree {
        /// The file.
        file: PathBuf,
        /// The error of the decoder.
        source: v1::Error,
    },
    /// A file of the state cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// A file of the state cannot be written.
    #[error("cannot write {}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
}

/// The state read from a directory: a handover tree and its files.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tree: Vec<u8>,
    /// The files, by their numbers in the tree.
    pub(super) files: BTreeMap<u64, Kept>,
}

/// A state directory, locked until this value is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    #[expect(dead_code, reason = "closing the file releases the lock")]
    directory: File,
}

impl Directory {
    /// Opens and locks a directory, creates it if it is absent, and reads its state. Returns `None`
    /// as the state of an empty directory.
    pub(super) fn open(path: &Path) -> Result<(Self, Option<State>), Error> {
        let error = |source| Error::Directory { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(error)?;
        let directory = File::open(path).map_err(error)?;
        flock(&directory, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::Busy { path: path.to_owned() })?;
        let this = Self { path: path.to_owned(), directory };
        let names = this.names()?;
        if names.contains(INDEX) {
            let state = this.load()?;
            return Ok((this, Some(state)));
        }
        if names.is_empty() { Ok((this, None)) } else { Err(Error::Incomplete { path: this.path }) }
    }

    /// Returns the names of all files. Errors if a state cannot have one of them.
    fn names(&self) -> Result<BTreeSet<String>, Error> {
        let error = |source| Error::Directory { path: self.path.clone(), source };
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            match name.to_str() {
                Some(name) if is_ours(name) => names.insert(name.to_owned()),
                _ => {
                    let name = name.as_encoded_bytes().escape_ascii().to_string();
                    return Err(Error::Foreign { path: self.path.clone(), name });
                }
            };
        }
        Ok(names)
    }

    fn load(&self) -> Result<State, Error> {
        let bytes = self.read(INDEX)?;
        let index = Index::parse(&bytes).map_err(|problem| self.damaged(INDEX, problem))?;
        let name = index.tree_name();
        let tree = self.read(&name)?;
        if tree.len() as u64 != index.tree_bytes || crc32fast::hash(&tree) != index.tree_sum {
            return Err(self.damaged(&name, "its size or checksum differs from the index".into()));
        }
        let file = || self.path.join(&name);
        let handover = v1::decode(&tree).map_err(|source| Error::Tree { file: file(), source })?;
        let named: BTreeSet<u64> = numbers(&handover).collect();
        if handover.number != index.number
            || named.len() != handover.file_count()
            || !named.iter().eq(index.files.keys())
        {
            return Err(self.damaged(&name, "its number or its files differ from the index".into()));
        }
        Ok(State { tree, files: self.load_files(&index)? })
    }

    fn load_files(&self, index: &Index) -> Result<BTreeMap<u64, Kept>, Error> {
        let name = index.memory_name();
        let error = |source| Error::Read { file: self.path.join(&name), source };
        let memory = File::open(self.path.join(&name)).map_err(error)?;
        let length = memory.metadata().map_err(error)?.len();
        let rooms = index.files.values().map(|entry| contents::room(entry.size));
        let expected = rooms.reduce(|a, b| a?.checked_add(b?)).unwrap_or(Some(0));
        if expected != Some(length) {
            let problem = format!("its size of {length} bytes differs from the index");
            return Err(self.damaged(&name, problem));
        }
        let (mut files, mut start) = (BTreeMap::new(), 0);
        for (number, entry) in &index.files {
            // The check above makes sure that the sizes do not overflow and fit the file.
            let end = start + contents::room(entry.size).unwrap_or_default();
            let from = Part { file: &memory, start, end };
            let (file, sum) = contents::load(from, entry).map_err(error)?;
            if sum != entry.sum {
                let problem = format!("the checksum of file {number} in it differs from the index");
                return Err(self.damaged(&name, problem));
            }
            let Entry { size, position, seals, mode, sum: _ } = *entry;
            let file = OpenFile::new(file.into());
            files.insert(*number, Kept { file, size, position, seals, mode });
            start = end;
        }
        Ok(files)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let file = self.path.join(name);
        fs::read(&file).map_err(|source| Error::Read { file, source })
    }

    fn damaged(&self, name: &str, problem: String) -> Error {
        Error::Damaged { file: self.path.join(name), problem }
    }

    /// Writes a state, which replaces the present state.
    pub(super) fn save(&self, tree: &[u8], store: &Store) -> Result<(), Error> {
        let handover = v1::decode(tree)
            .map_err(|source| Error::Tree { file: self.path.join(INDEX), source })?;
        let mut index = Index::new(handover.number, tree);
        self.write(&index.tree_name(), tree)?;
        self.save_files(&handover, store, &mut index)?;
        self.write(NEW_INDEX, index.to_string().as_bytes())?;
        fs::rename(self.path.join(NEW_INDEX), self.path.join(INDEX))
            .map_err(|source| Error::Write { file: self.path.join(INDEX), source })?;
        // The new state is valid from here on. Files that cannot be removed now are removed after
        // the next save.
        let _ = self.remove_all_but(&index);
        Ok(())
    }

    fn save_files(
        &self,
        handover: &Handover,
        store: &Store,
        index: &mut Index,
    ) -> Result<(), Error> {
        let name = index.memory_name();
        let error = |source| Error::Write { file: self.path.join(&name), source };
        let memory = self.create(&name).map_err(error)?;
        let mut start = 0;
        // In the order of the index, which may differ from the order in the tree.
        for number in numbers(handover).collect::<BTreeSet<u64>>() {
            let kept = store.get(number).ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
            let Kept { size, position, seals, mode, file } = kept;
            // A new open file description, because copying moves the file position.
            let from = reopen(&file, OFlags::RDONLY).map_err(|errno| error(errno.into()))?;
            let from = Part { file: &from.into(), start: 0, end: size };
            let end = contents::room(size).and_then(|room| room.checked_add(start));
            let end = end.ok_or_else(|| error(io::ErrorKind::FileTooLarge.into()))?;
            let sum = contents::copy(from, Part { file: &memory, start, end }).map_err(error)?;
            index.files.insert(number, Entry { size, position, seals, mode, sum });
            start = end;
        }
        memory.set_len(start).map_err(error)
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let written = self.create(name).and_then(|mut file| io::Write::write_all(&mut file, bytes));
        written.map_err(|source| Error::Write { file: self.path.join(name), source })
    }

    fn remove_all_but(&self, index: &Index) -> Result<(), Error> {
        let wanted = BTreeSet::from([INDEX.to_owned(), index.tree_name(), index.memory_name()]);
        for name in self.names()?.difference(&wanted) {
            let file = self.path.join(name);
            fs::remove_file(&file).map_err(|source| Error::Write { file, source })?;
        }
        Ok(())
    }
}

/// Whether a state can have a file of this name.
fn is_ours(name: &str) -> bool {
    let is_number = |text: &str| text.parse().is_ok_and(|number: u64| number.to_string() == text);
    let tree = name.strip_prefix("tree-").and_then(|rest| rest.strip_suffix(".dtb"));
    let memory = name.strip_prefix("memory-");
    [INDEX, NEW_INDEX].contains(&name)
        || tree.is_some_and(is_number)
        || memory.is_some_and(is_number)
}
