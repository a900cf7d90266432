//! Scripted files as real fds. Each is one end of a socket pair, which no other handler accepts.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use luo::Errno;
use luo::builtin::scripted::{ScriptedFile, ScriptedHandler};
use luo::builtin::{Compatible, Handle, Handler, OpenFile, Retrieval};

use crate::conformance::system::Script;
use crate::mutex::lock;

/// The handler of scripted files. Clones share the script and the known files.
#[derive(Debug, Clone, Default)]
pub(super) struct ScriptedFiles {
    script: Script,
    /// The files by the inode of their socket, with the other end of the pair, which is kept open.
    known: Arc<Mutex<BTreeMap<u64, (ScriptedFile, OwnedFd)>>>,
}

impl ScriptedFiles {
    pub(super) fn script(&self) -> Script {
        self.script.clone()
    }

    /// Opens a file with an object number.
    pub(super) fn open(&self, object: u32) -> Result<OpenFile, Errno> {
        self.socket(self.script.open(1, object))
    }

    fn socket(&self, file: ScriptedFile) -> Result<OpenFile, Errno> {
        let pair = UnixStream::pair().map_err(|_| Errno::MFILE)?;
        let (end, other) = (OwnedFd::from(pair.0), OwnedFd::from(pair.1));
        self.known().insert(rustix::fs::fstat(&end)?.st_ino, (file, other));
        Ok(OpenFile::new(end))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, (ScriptedFile, OwnedFd)>> {
        lock(&self.known)
    }

    fn file(&self, file: &OpenFile) -> Option<ScriptedFile> {
        let inode = rustix::fs::fstat(file.as_fd()).ok()?.st_ino;
        self.known().get(&inode).map(|(file, _)| *file)
    }

    fn handler(&self) -> ScriptedHandler {
        self.script.handler(self.compatible(), &[1], true)
    }

    /// Calls `end` with the script's handler and with the retrieval translated to scripted files.
    fn at_end<T>(
        &self,
        retrieval: &Retrieval<'_, OpenFile>,
        end: impl FnOnce(ScriptedHandler, Retrieval<'_, ScriptedFile>) -> T,
    ) -> T {
        let file = match retrieval {
            Retrieval::Done(file) => self.file(file),
            Retrieval::Failed(errno) => return end(self.handler(), Retrieval::Failed(*errno)),
            Retrieval::Never => None,
        };
        end(self.handler(), file.as_ref().map_or(Retrieval::Never, Retrieval::Done))
    }
}

impl Handler<OpenFile> for ScriptedFiles {
    fn compatible(&self) -> Compatible {
        Compatible::new("scripted-v1").expect("the name is short")
    }

    fn can_preserve(&self, file: &OpenFile) -> bool {
        self.file(file).is_some_and(|file| self.handler().can_preserve(&file))
    }

    fn identity(&self, file: &OpenFile) -> Option<u128> {
        self.handler().identity(&self.file(file)?)
    }

    fn preserve(&mut self, file: &OpenFile) -> Result<Handle, Errno> {
        self.handler().preserve(&self.file(file).ok_or(Errno::INVAL)?)
    }

    fn freeze(&mut self, file: &OpenFile, handle: Handle) -> Result<Handle, Errno> {
        self.handler().freeze(&self.file(file).ok_or(Errno::INVAL)?, handle)
    }

    fn unfreeze(&mut self, file: &OpenFile, handle: Handle) {
        self.file(file).into_iter().for_each(|file| self.handler().unfreeze(&file, handle));
    }

    fn unpreserve(&mut self, file: &OpenFile, handle: Handle) {
        self.file(file).into_iter().for_each(|file| self.handler().unpreserve(&file, handle));
    }

    fn retrieve(&mut self, handle: Handle) -> Result<OpenFile, Errno> {
        self.socket(self.handler().retrieve(handle)?)
    }

    fn can_finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) -> bool {
        self.at_end(&retrieval, |mut handler, retrieval| handler.can_finish(retrieval, handle))
    }

    fn finish(&mut self, retrieval: Retrieval<'_, OpenFile>, handle: Handle) {
        self.at_end(&retrieval, |mut handler, retrieval| handler.finish(retrieval, handle));
    }
}
