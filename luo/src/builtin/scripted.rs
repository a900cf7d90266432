//! Mock files and handlers, which log the callbacks of the state machine and fail on demand.
//!
//! No file of a kernel fails on demand. A [`Script`] makes handlers and shared objects that log
//! each callback, and fail the callbacks that a test chose. A [`ScriptedFile`] is three numbers.
//! For tests of the state machine, of the orchestrators that are built on it, and of programs that
//! must handle failures.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::{Compatible, File, Flb, Handle, Handler, Retrieval};
use crate::mutex::lock;

/// A reference to a mock file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScriptedFile {
    /// The kind of file, by which handlers accept it.
    pub kind: u32,
    /// The object behind the file, like the inode of a memfd.
    pub object: u32,
    /// The number of the open file, for [`File::description`].
    pub description: u64,
}

impl File for ScriptedFile {
    fn description(&self) -> u64 {
        self.description
    }
}

/// A callback of a handler or a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each has the name of a method of `Handler` or `Flb`")]
pub enum Callback {
    CanPreserve,
    Preserve,
    Freeze,
    Unfreeze,
    Unpreserve,
    Retrieve,
    CanFinish,
    Finish,
    FlbPreserve,
    FlbUnpreserve,
    FlbRetrieve,
    FlbFinish,
}

/// One call of a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The format of the handler or shared object that was called.
    pub who: Compatible,
    /// The method that was called.
    pub callback: Callback,
    /// The object behind the file; 0 for a shared object.
    pub object: u32,
    /// The handle that was passed; 0 for callbacks without a handle.
    pub handle: u64,
    /// The [`Retrieval`] that was passed; `None` for [`Retrieval::Never`], and for callbacks that
    /// have none.
    pub retrieved: Option<Result<(), Errno>>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: Vec<Call>,
    failures: BTreeMap<(Callback, u32), Errno>,
    last_description: u64,
}

/// The log of calls, and the callbacks that fail. Clones share both.
#[derive(Debug, Clone, Default)]
pub struct Script(Arc<Mutex<Inner>>);

impl Script {
    /// The number that [`Handler::freeze`] adds to a handle, to make the frozen handle differ.
    pub const FROZEN: u64 = 1 << 32;

    /// A script in which nothing fails.
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    /// Makes a callback for an object fail from now on; object 0 stands for every shared object.
    /// `CanFinish` and `CanPreserve` then return `false`. Callbacks without a result ignore it.
    pub fn fail(&self, callback: Callback, object: u32, errno: Errno) {
        self.inner().failures.insert((callback, object), errno);
    }

    /// Lets a callback for an object succeed again.
    pub fn mend(&self, callback: Callback, object: u32) {
        self.inner().failures.remove(&(callback, object));
    }

    /// Returns the calls since the last `take_calls`, in order.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.inner().calls)
    }

    /// Opens a file: each call makes another open file.
    pub fn open(&self, kind: u32, object: u32) -> ScriptedFile {
        let mut inner = self.inner();
        inner.last_description += 1;
        ScriptedFile { kind, object, description: inner.last_description }
    }

    /// Makes a handler for files of these kinds. With `by_object`, files with the same `object`
    /// are one object for [`Handler::identity`]; otherwise each open file is an object by itself.
    pub fn handler(
        &self,
        compatible: Compatible,
        kinds: &[u32],
        by_object: bool,
    ) -> ScriptedHandler {
        let kinds = kinds.to_vec();
        ScriptedHandler { compatible, kinds, by_object, script: self.clone() }
    }

    /// Makes a shared object, whose handle is `handle`.
    pub fn flb(&self, compatible: Compatible, handle: u64) -> ScriptedFlb {
        ScriptedFlb { compatible, handle, script: self.clone() }
    }

    fn call(&self, call: Call) -> Result<(), Errno> {
        let mut inner = self.inner();
        inner.calls.push(call);
        inner.failures.get(&(call.callback, call.object)).map_or(Ok(()), |errno| Err(*errno))
    }
}

/// A handler of [`ScriptedFile`]s. A handle is the object's number, plus [`Script::FROZEN`] for
/// each freeze. A retrieved file has the handler's first kind.
#[derive(Debug)]
pub struct ScriptedHandler {
    compatible: Compatible,
    kinds: Vec<u32>,
    by_object: bool,
    script: Script,
}

impl ScriptedHandler {
    fn call(&self, callback: Callback, object: u32, handle: u64) -> Result<(), Errno> {
        self.script.call(Call { who: self.compatible, callback, object, handle, retrieved: None })
    }

    fn call_at_end(
        &self,
        callback: Callback,
        retrieval: &Retrieval<'_, ScriptedFile>,
        Handle(handle): Handle,
    ) -> Result<(), Errno> {
        let retrieved = match retrieval {
            Retrieval::Never => None,
            Retrieval::Done(_) => Some(Ok(())),
            Retrieval::Failed(errno) => Some(Err(*errno)),
        };
        let (who, object) = (self.compatible, object_of(handle));
        self.script.call(Call { who, callback, object, handle, retrieved })
    }
}

fn object_of(handle: u64) -> u32 {
    (handle % Script::FROZEN) as u32
}

impl Handler<ScriptedFile> for ScriptedHandler {
    fn compatible(&self) -> Compatible {
        self.compatible
    }

    fn can_preserve(&self, file: &ScriptedFile) -> bool {
        let allowed = self.call(Callback::CanPreserve, file.object, 0).is_ok();
        allowed && self.kinds.contains(&file.kind)
    }

    fn identity(&self, file: &ScriptedFile) -> Option<u128> {
        self.by_object.then(|| file.object.into())
    }

    fn preserve(&mut self, file: &ScriptedFile) -> Result<Handle, Errno> {
        self.call(Callback::Preserve, file.object, 0)?;
        Ok(Handle(file.object.into()))
    }

    fn freeze(&mut self, file: &ScriptedFile, handle: Handle) -> Result<Handle, Errno> {
        self.call(Callback::Freeze, file.object, handle.0)?;
        Ok(Handle(handle.0.wrapping_add(Script::FROZEN)))
    }

    fn unfreeze(&mut self, file: &ScriptedFile, handle: Handle) {
        let _ = self.call(Callback::Unfreeze, file.object, handle.0);
    }

    fn unpreserve(&mut self, file: &ScriptedFile, handle: Handle) {
        let _ = self.call(Callback::Unpreserve, file.object, handle.0);
    }

    fn retrieve(&mut self, Handle(handle): Handle) -> Result<ScriptedFile, Errno> {
        let object = object_of(handle);
        self.call(Callback::Retrieve, object, handle)?;
        Ok(self.script.open(self.kinds.first().copied().unwrap_or_default(), object))
    }

    fn can_finish(&mut self, retrieval: Retrieval<'_, ScriptedFile>, handle: Handle) -> bool {
        self.call_at_end(Callback::CanFinish, &retrieval, handle).is_ok()
    }

    fn finish(&mut self, retrieval: Retrieval<'_, ScriptedFile>, handle: Handle) {
        let _ = self.call_at_end(Callback::Finish, &retrieval, handle);
    }
}

/// A mock shared object, which is a number.
#[derive(Debug)]
pub struct ScriptedFlb {
    compatible: Compatible,
    handle: u64,
    script: Script,
}

impl ScriptedFlb {
    fn call(&self, callback: Callback, handle: u64) -> Result<(), Errno> {
        let who = self.compatible;
        self.script.call(Call { who, callback, object: 0, handle, retrieved: None })
    }
}

impl Flb for ScriptedFlb {
    fn compatible(&self) -> Compatible {
        self.compatible
    }

    fn preserve(&mut self) -> Result<Handle, Errno> {
        self.call(Callback::FlbPreserve, 0)?;
        Ok(Handle(self.handle))
    }

    fn unpreserve(&mut self, handle: Handle) {
        let _ = self.call(Callback::FlbUnpreserve, handle.0);
    }

    fn retrieve(&mut self, handle: Handle) -> Result<(), Errno> {
        self.call(Callback::FlbRetrieve, handle.0)
    }

    fn finish(&mut self, handle: Handle) {
        let _ = self.call(Callback::FlbFinish, handle.0);
    }
}
