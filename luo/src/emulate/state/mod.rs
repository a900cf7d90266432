//! A generation that waits in a directory for the next run.
//!
//! ```text
//! DIR/state              the index: which files there are, how long, and their CRC-32
//!     tree-N.dtb         the handover tree of live update N (`perennial luo show` prints it)
//!     memory-N           the contents of all its files, with a hole where a page is zero
//! ```
//!
//! All files carry the number of their live update. A new state is written beside the old one, and
//! counts from the moment when its index takes the name `state`; only then is the old one removed.
//! So there is the old state or the new one, whenever the writing stops, and never a mixture; a first
//! one that was not completed has no index, and is refused. Nothing waits for the disk: if the machine
//! itself crashes, the new state may be damaged, and is refused, too. What is in the directory and not of this
//! form makes it foreign: nothing is read from it or written to it. Whoever runs on it has it locked.
//!
//! The sums protect against damage, not against an enemy.

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

/// What is wrong with a state directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be made, opened or listed.
    #[error("cannot use {} as a state directory", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else runs on it.
    #[error("{} is in use by another run", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// It has something in it that no state has.
    #[error("{} is no state directory: it has `{name}` in it", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What is in it, escaped.
        name: String,
    },
    /// Its first state was begun and not completed.
    #[error(
        "{} has an incomplete state: the run that wrote it did not come to its end; \
         remove the directory to start again without it",
        path.display()
    )]
    Incomplete {
        /// The directory.
        path: PathBuf,
    },
    /// Not what was written.
    #[error("{} is damaged: {problem}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What differs.
        problem: String,
    },
    /// A tree that is no tree.
    #[error("{} is damaged", file.display())]
    Tree {
        /// The file.
        file: PathBuf,
        /// Why.
        source: v1::Error,
    },
    /// A file of it cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of it cannot be written.
    #[error("cannot write {}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a directory had: a tree, and the files that it names.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tree: Vec<u8>,
    pub(super) files: BTreeMap<u64, Kept>,
}

/// A state directory that is ours until this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    #[expect(dead_code, reason = "closing it releases the lock")]
    directory: File,
}

impl Directory {
    /// Opens a directory, which is made if it is absent, and reads the state that is in it.
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

    /// The names in the directory, all of which a state could have.
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
            return Err(self.damaged(&name, "it is not what the index says".into()));
        }
        let file = || self.path.join(&name);
        let handover = v1::decode(&tree).map_err(|source| Error::Tree { file: file(), source })?;
        let named: BTreeSet<u64> = numbers(&handover).collect();
        if handover.number != index.number
            || named.len() != handover.file_count()
            || !named.iter().eq(index.files.keys())
        {
            return Err(self.damaged(&name, "it is not of the same state as the index".into()));
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
            let problem = format!("it has {length} bytes, which is not what the index says");
            return Err(self.damaged(&name, problem));
        }
        let (mut files, mut start) = (BTreeMap::new(), 0);
        for (number, entry) in &index.files {
            // All of it is in the file, as was just seen.
            let end = start + contents::room(entry.size).unwrap_or_default();
            let from = Part { file: &memory, start, end };
            let (file, sum) = contents::load(from, entry).map_err(error)?;
            if sum != entry.sum {
                let problem = format!("file {number} in it is not what the index says");
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

    /// Writes a state, which replaces the one that is there.
    pub(super) fn save(&self, tree: &[u8], store: &Store) -> Result<(), Error> {
        let handover = v1::decode(tree)
            .map_err(|source| Error::Tree { file: self.path.join(INDEX), source })?;
        let mut index = Index::new(handover.number, tree);
        self.write(&index.tree_name(), tree)?;
        self.save_files(&handover, store, &mut index)?;
        self.write(NEW_INDEX, index.to_string().as_bytes())?;
        fs::rename(self.path.join(NEW_INDEX), self.path.join(INDEX))
            .map_err(|source| Error::Write { file: self.path.join(INDEX), source })?;
        // It counts from here on. What stays of the old one is removed with this one.
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
        // In the order of the index, which is not that of the tree.
        for number in numbers(handover).collect::<BTreeSet<u64>>() {
            let kept = store.get(number).ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
            let Kept { size, position, seals, mode, file } = kept;
            // At its own position: the program's is not to move.
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
