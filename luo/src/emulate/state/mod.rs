//! A generation that waits in a directory for the next run.
//!
//! ```text
//! DIR/state              the index: which files there are, how long, and their CRC-32
//!     tree-N.dtb         the handover tree of live update N (`perennial luo show` prints it)
//!     memfd-N-K          the contents of file K, with a hole where a page is zero
//! ```
//!
//! All files carry the number of their live update. A new state is written beside the old one, and
//! counts from the moment when its index takes the name `state`; only then is the old one removed.
//! So there is the old state or the new one, whenever the writing stops, and never a mixture; a first
//! one that was not completed has no index, and is refused. What is in the directory and not of this
//! form makes it foreign: nothing is read from it or written to it. Whoever runs on it has it locked.
//!
//! The sums protect against damage, not against an enemy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, syncfs};

use super::memfd::{Kept, Store, numbers, reopen};
use crate::builtin::OpenFile;
use crate::builtin::tree::{Handover, v1};

mod contents;
mod index;
#[cfg(test)]
mod tests;

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
         remove the directory to start anew",
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
    /// Open, and so locked.
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
        let mut files = BTreeMap::new();
        for (number, entry) in &index.files {
            files.insert(*number, self.load_file(&index.file_name(*number), entry)?);
        }
        Ok(State { tree, files })
    }

    fn load_file(&self, name: &str, entry: &Entry) -> Result<Kept, Error> {
        let error = |source| Error::Read { file: self.path.join(name), source };
        let file = File::open(self.path.join(name)).map_err(error)?;
        let length = file.metadata().map_err(error)?.len();
        if length != entry.size {
            return Err(self.damaged(name, format!("it has {length} bytes, not {}", entry.size)));
        }
        let memfd = contents::memfd().map_err(error)?;
        let sum = contents::copy(&file, &memfd, entry.size).map_err(error)?;
        if sum != entry.sum {
            return Err(self.damaged(name, "it is not what the index says".into()));
        }
        contents::dress(&memfd, entry).map_err(error)?;
        let Entry { size, position, seals, mode, sum: _ } = *entry;
        Ok(Kept { file: OpenFile::new(memfd.into()), size, position, seals, mode })
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
        let error = |source: io::Error| Error::Write { file: self.path.join(INDEX), source };
        // All of the new state is there before anything says so.
        syncfs(&self.directory).map_err(|errno| error(errno.into()))?;
        self.write(NEW_INDEX, index.to_string().as_bytes())?;
        fs::rename(self.path.join(NEW_INDEX), self.path.join(INDEX)).map_err(error)?;
        self.directory.sync_all().map_err(error)?;
        self.remove_all_but(&index)
    }

    fn save_files(
        &self,
        handover: &Handover,
        store: &Store,
        index: &mut Index,
    ) -> Result<(), Error> {
        for number in numbers(handover) {
            let name = index.file_name(number);
            let error = |source| Error::Write { file: self.path.join(&name), source };
            let kept = store.get(number).ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
            // At its own position: the program's is not to move.
            let flags = rustix::fs::OFlags::RDONLY;
            let from = reopen(&kept.file, flags).map_err(|errno| error(errno.into()))?;
            let to = self.create(&name).map_err(error)?;
            let sum = contents::copy(&File::from(from), &to, kept.size).map_err(error)?;
            let Kept { size, position, seals, mode, file: _ } = kept;
            index.files.insert(number, Entry { size, position, seals, mode, sum });
        }
        Ok(())
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let written = self.create(name).and_then(|mut file| {
            io::Write::write_all(&mut file, bytes)?;
            file.sync_all()
        });
        written.map_err(|source| Error::Write { file: self.path.join(name), source })
    }

    fn remove_all_but(&self, index: &Index) -> Result<(), Error> {
        let files = index.files.keys().map(|number| index.file_name(*number));
        let wanted: BTreeSet<String> = files.chain([INDEX.to_owned(), index.tree_name()]).collect();
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
    let memfd = name.strip_prefix("memfd-").and_then(|rest| rest.split_once('-'));
    [INDEX, NEW_INDEX].contains(&name)
        || tree.is_some_and(is_number)
        || memfd.is_some_and(|(update, number)| is_number(update) && is_number(number))
}
