//! Simulated files: memfds, which a handler carries over the switch, and kinds that no handler carries.
//!
//! The handler behaves as the kernel's handler for memfds as far as cases can observe: a file arrives
//! with its position and contents at the switch, and a file that was not retrieved is discarded when its
//! session is finished.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use luo::Errno;
use luo::builtin::scripted::{ScriptedFile, ScriptedHandler};
use luo::builtin::{Compatible, File, Handle, Handler, Retrieval, SessionId};

use crate::mutex::lock;

/// The kind of a file.
#[derive(Debug, Clone)]
pub(super) enum What {
    Device,
    Session(SessionId),
    Memfd(Arc<Inode>),
    Scripted(ScriptedFile),
    Null,
    Path,
}

/// The object behind a memfd.
#[derive(Debug)]
pub(super) struct Inode {
    number: u64,
    contents: Mutex<Vec<u8>>,
}

/// An open file.
#[derive(Debug)]
pub(super) struct Opened {
    number: u64,
    pub(super) what: What,
    position: Mutex<usize>,
}

fn next_number() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

impl Opened {
    fn inode(&self) -> Result<&Inode, Errno> {
        match &self.what {
            What::Memfd(inode) => Ok(inode),
            _ => Err(Errno::INVAL),
        }
    }

    pub(super) fn read(&self, length: usize) -> Result<Vec<u8>, Errno> {
        let contents = lock(&self.inode()?.contents);
        let mut position = lock(&self.position);
        let rest = contents.get(*position..).unwrap_or_default();
        let bytes = rest[..length.min(rest.len())].to_vec();
        *position += bytes.len();
        Ok(bytes)
    }

    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<usize, Errno> {
        let mut contents = lock(&self.inode()?.contents);
        let end = offset + bytes.len();
        if contents.len() < end {
            contents.resize(end, 0);
        }
        contents[offset..end].copy_from_slice(bytes);
        Ok(bytes.len())
    }
}

/// A reference to an open file.
#[derive(Debug, Clone)]
pub(super) struct OpenFile(Arc<Opened>);

impl OpenFile {
    pub(super) fn new(what: What) -> Self {
        Self(Arc::new(Opened { number: next_number(), what, position: Mutex::new(0) }))
    }

    pub(super) fn memfd() -> Self {
        Self::holding(Vec::new())
    }

    fn holding(contents: Vec<u8>) -> Self {
        let contents = Mutex::new(contents);
        Self::new(What::Memfd(Arc::new(Inode { number: next_number(), contents })))
    }

    /// Whether this is the only reference.
    pub(super) fn is_last(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl Deref for OpenFile {
    type Target = Opened;

    fn deref(&self) -> &Opened {
        &self.0
    }
}

impl PartialEq for OpenFile {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl File for OpenFile {
    fn description(&self) -> u64 {
        self.number
    }
}

/// Memory that survives the switch: memfds and their positions.
pub(super) type Carried = Arc<Mutex<BTreeMap<u64, (Arc<Inode>, usize)>>>;

/// The handler of memfds.
pub(super) struct MemfdHandler {
    carried: Carried,
}

impl MemfdHandler {
    pub(super) fn new(carried: Carried) -> Self {
        Self { carried }
    }
}

impl Handler<OpenFile> for MemfdHandler {
    fn compatible(&self) -> Compatible {
        Compatible::new("memfd-v2").expect("the name is short")
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        matches!(file.what, What::Memfd(_))
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        file.inode().ok().map(|inode| inode.number.into())
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        let What::Memfd(inode) = &file.what else { return Err(Errno::INVAL) };
        let position = *lock(&file.position);
        lock(&self.carried).insert(inode.number, (Arc::clone(inode), position));
        Ok(Handle(inode.number))
    }

    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        self.preserve(file)?;
        Ok(handle)
    }

    fn unpreserve(&mut self, _: &OpenFile, handle: Handle) {
        lock(&self.carried).remove(&handle.0);
    }

    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let (old, position) = lock(&self.carried).remove(&handle.0).ok_or(Errno::IO)?;
        let file = OpenFile::holding(lock(&old.contents).clone());
        *lock(&file.position) = position;
        Ok(file)
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        if retrieval == Retrieval::Never {
            lock(&self.carried).remove(&handle.0);
        }
    }
}

/// The handler of scripted files.
pub(super) struct ScriptedFiles(pub(super) ScriptedHandler);

fn scripted(file: &OpenFile) -> Option<&ScriptedFile> {
    match &file.what {
        What::Scripted(file) => Some(file),
        _ => None,
    }
}

impl ScriptedFiles {
    /// Translates a retrieval to scripted files.
    fn retrieval<'a>(retrieval: Retrieval<'a, OpenFile>) -> Retrieval<'a, ScriptedFile> {
        match retrieval {
            Retrieval::Done(file) => scripted(file).map_or(Retrieval::Never, Retrieval::Done),
            Retrieval::Failed(errno) => Retrieval::Failed(errno),
            Retrieval::Never => Retrieval::Never,
        }
    }
}

impl Handler<OpenFile> for ScriptedFiles {
    fn compatible(&self) -> Compatible {
        self.0.compatible()
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        scripted(file).is_some_and(|file| self.0.can_preserve(file))
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        self.0.identity(scripted(file)?)
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        self.0.preserve(scripted(file).ok_or(Errno::INVAL)?)
    }

    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        self.0.freeze(scripted(file).ok_or(Errno::INVAL)?, handle)
    }

    fn unfreeze(&mut self, file: &OpenFile, handle: Handle) {
        scripted(file).into_iter().for_each(|file| self.0.unfreeze(file, handle));
    }

    fn unpreserve(&mut self, file: &OpenFile, handle: Handle) {
        scripted(file).into_iter().for_each(|file| self.0.unpreserve(file, handle));
    }

    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        let file = self.0.retrieve(handle)?;
        Ok(OpenFile::new(What::Scripted(file)))
    }

    fn can_finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) -> bool {
        self.0.can_finish(Self::retrieval(retrieval), handle)
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        self.0.finish(Self::retrieval(retrieval), handle);
    }
}
