//! Files and handlers that are nothing but a script, to see what the machine does with them.
//!
//! No kind of file of a kernel fails on demand. A [`Script`] makes handlers and shared objects that
//! write down each callback, and fail where they are told to. Nothing is behind a
//! [`ScriptedFile`] but three numbers. For tests of the machine, of what is built on it, and of
//! programs that have to cope with failures.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::{Compatible, File, Flb, Handle, Handler, Retrieval};
use crate::mutex::lock;

/// A reference to a file that is made of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScriptedFile {
    /// What handlers choose by.
    pub kind: u32,
    /// The object behind the file, as the inode of a memfd.
    pub object: u32,
    /// Which open file it is.
    pub description: u64,
}

impl File for ScriptedFile {
    fn description(&self) -> u64 {
        self.description
    }
}

/// A callback of a handler or a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "they are called as the callbacks are")]
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
    /// The handler or shared object.
    pub who: Compatible,
    /// What it was called for.
    pub callback: Callback,
    /// The object behind the file; 0 for a shared object.
    pub object: u32,
    /// The handle it was given; 0 where there is none yet.
    pub handle: u64,
    /// What it was told of the file's retrieval, where it is told: `None` for never.
    pub retrieved: Option<Result<(), Errno>>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: Vec<Call>,
    failures: BTreeMap<(Callback, u32), Errno>,
    last_description: u64,
}

/// What happened, and what is to fail. Clones are the same script.
#[derive(Debug, Clone, Default)]
pub struct Script(Arc<Mutex<Inner>>);

impl Script {
    /// How much [`Handler::freeze`] adds to a handle, so that it can be told from the one before.
    pub const FROZEN: u64 = 1 << 32;

    /// A script in which nothing fails.
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    /// Makes a callback for an object fail from now on; 0 is every shared object. What cannot fail
    /// does not: `CanFinish` says no, `CanPreserve` too, the rest of those without a result ignore it.
    pub fn fail(&self, callback: Callback, object: u32, errno: Errno) {
        self.inner().failures.insert((callback, object), errno);
    }

    /// Lets a callback for an object succeed again.
    pub fn mend(&self, callback: Callback, object: u32) {
        self.inner().failures.remove(&(callback, object));
    }

    /// Takes out what was called since the last time, in order.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.inner().calls)
    }

    /// A file that nobody has opened before.
    pub fn open(&self, kind: u32, object: u32) -> ScriptedFile {
        let mut inner = self.inner();
        inner.last_description += 1;
        ScriptedFile { kind, object, description: inner.last_description }
    }

    /// A handler for files of some kinds. `by_object`: two files of one object are the same to it.
    pub fn handler(
        &self,
        compatible: Compatible,
        kinds: &[u32],
        by_object: bool,
    ) -> ScriptedHandler {
        let kinds = kinds.to_vec();
        ScriptedHandler { compatible, kinds, by_object, script: self.clone() }
    }

    /// A shared object, whose handle is `handle`.
    pub fn flb(&self, compatible: Compatible, handle: u64) -> ScriptedFlb {
        ScriptedFlb { compatible, handle, script: self.clone() }
    }

    fn call(&self, call: Call) -> Result<(), Errno> {
        let mut inner = self.inner();
        inner.calls.push(call);
        inner.failures.get(&(call.callback, call.object)).map_or(Ok(()), |errno| Err(*errno))
    }
}

/// A handler of [`ScriptedFile`]s. A handle is the object's number, plus [`Script::FROZEN`] each time
/// it was frozen; a retrieved file is of the handler's first kind.
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

/// A shared object that is made of a number.
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
