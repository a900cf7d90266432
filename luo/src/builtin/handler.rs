//! File handlers: who knows how to carry one kind of file.
//!
//! A [`Handler`] has all the effects on files that the state machine has; the machine only decides
//! which callback comes when. It promises the order of `kernel/liveupdate/luo_file.c` (Linux 7.3):
//!
//! ```text
//!  old kernel   can_preserve -> identity -> preserve --> freeze --> (switch)
//!                                              |           |
//!                                              |        unfreeze, on failure of any other file
//!                                              v
//!                                          unpreserve, when the session is closed
//!  new kernel   retrieve, at most once --> can_finish --> finish, once
//! ```
//!
//! This module keeps the list of handlers, of which the first that can preserve a file takes it,
//! and the table of files that are preserved or retrieved and not finished: no object is in it
//! twice. When a callback is due is left to the modules of files and sessions.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use rustix::io::Errno;

use super::flb::FlbId;
use super::label::Compatible;

/// A reference to an open file, as the kernel's `struct file *`. A clone is another reference to
/// the same open file.
pub trait File: Clone + fmt::Debug {
    /// A number that all references to this open file share, and no other open file has now.
    fn description(&self) -> u64;
}

/// What a handler wrote down about a preserved file: an address, an index, whatever its own kind
/// in the next kernel can follow. The machine carries it (`luo_file_ser.data`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

/// What became of a file of an incoming session so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retrieval<'a, F> {
    /// Nobody asked for it.
    Never,
    /// It was retrieved, as this file.
    Done(&'a F),
    /// [`Handler::retrieve`] failed. It is not asked again.
    Failed(Errno),
}

/// One kind of file, and how to carry it.
///
/// Callbacks run one at a time. They must not call into the machine.
pub trait Handler<F>: Send {
    /// The name of the format of its handles. The handler of that name in the next kernel gets them.
    fn compatible(&self) -> Compatible;

    /// Whether this is a file of its kind.
    fn can_preserve(&self, file: &F) -> bool;

    /// The object behind the file: two files of one object cannot both be preserved. `None`: each
    /// open file is its own object. The kernel's `get_id`.
    fn identity(&self, file: &F) -> Option<u128> {
        let _ = file;
        None
    }

    /// Starts to preserve the file. A failure changes nothing.
    fn preserve(&mut self, file: &F) -> Result<Handle, Errno>;

    /// Takes the last look at the file before the switch; may replace the handle. A failure
    /// changes nothing, and calls the switch off.
    fn freeze(&mut self, file: &F, handle: Handle) -> Result<Handle, Errno> {
        let _ = file;
        Ok(handle)
    }

    /// Undoes [`freeze`](Self::freeze): the switch was called off.
    fn unfreeze(&mut self, file: &F, handle: Handle) {
        let _ = (file, handle);
    }

    /// Undoes [`preserve`](Self::preserve).
    fn unpreserve(&mut self, file: &F, handle: Handle);

    /// Makes the file again. Called at most once for a handle, whatever comes of it.
    fn retrieve(&mut self, handle: Handle) -> Result<F, Errno>;

    /// Whether the file can be finished now.
    fn can_finish(&mut self, retrieval: Retrieval<'_, F>, handle: Handle) -> bool {
        let _ = (retrieval, handle);
        true
    }

    /// Ends the preservation. What was never retrieved is discarded here.
    fn finish(&mut self, retrieval: Retrieval<'_, F>, handle: Handle);
}

/// A registered handler. Numbers follow the order of registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandlerId(usize);

/// A handler, and what depends on it.
struct Entry<F> {
    compatible: Compatible,
    handler: Box<dyn Handler<F>>,
    /// Shared objects that come and go with its files, in the order in which they were bound.
    flbs: Vec<FlbId>,
    /// Files of its that are preserved, or came in and are not finished.
    files: usize,
}

impl<F> fmt::Debug for Entry<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("compatible", &self.compatible)
            .field("flbs", &self.flbs)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

/// All handlers, in the order of their registration.
#[derive(Debug)]
pub(super) struct Handlers<F> {
    entries: Vec<Entry<F>>,
    by_compatible: BTreeMap<Compatible, HandlerId>,
}

impl<F> Default for Handlers<F> {
    fn default() -> Self {
        Self { entries: Vec::new(), by_compatible: BTreeMap::new() }
    }
}

impl<F> Handlers<F> {
    /// Adds a handler. EEXIST: one of that format is there.
    pub(super) fn register(&mut self, handler: Box<dyn Handler<F>>) -> Result<HandlerId, Errno> {
        let compatible = handler.compatible();
        let id = HandlerId(self.entries.len());
        if self.by_compatible.contains_key(&compatible) {
            return Err(Errno::EXIST);
        }
        self.by_compatible.insert(compatible, id);
        self.entries.push(Entry { compatible, handler, flbs: Vec::new(), files: 0 });
        Ok(id)
    }

    /// Makes each file of `id` depend on `flb`. EINVAL: no such handler; EBUSY: it has files, which
    /// would be counted wrongly; EEXIST: it does already.
    pub(super) fn bind(&mut self, id: HandlerId, flb: FlbId) -> Result<(), Errno> {
        let entry = self.entries.get_mut(id.0).ok_or(Errno::INVAL)?;
        if entry.flbs.contains(&flb) {
            return Err(Errno::EXIST);
        }
        if entry.files > 0 {
            return Err(Errno::BUSY);
        }
        entry.flbs.push(flb);
        Ok(())
    }

    /// The first handler that can preserve `file`.
    pub(super) fn accepting(&self, file: &F) -> Option<HandlerId> {
        self.entries.iter().position(|entry| entry.handler.can_preserve(file)).map(HandlerId)
    }

    /// The handler of a format.
    pub(super) fn of_format(&self, compatible: &Compatible) -> Option<HandlerId> {
        self.by_compatible.get(compatible).copied()
    }

    /// The format of a handler's handles.
    pub(super) fn compatible(&self, id: HandlerId) -> Compatible {
        self.entries[id.0].compatible
    }

    /// A handler, to be called. Ids come from this list and handlers stay in it.
    pub(super) fn get(&mut self, id: HandlerId) -> &mut dyn Handler<F> {
        &mut *self.entries[id.0].handler
    }

    /// The shared objects that files of this handler depend on.
    pub(super) fn flbs(&self, id: HandlerId) -> &[FlbId] {
        &self.entries[id.0].flbs
    }

    /// Counts a file of this handler in.
    pub(super) fn file_added(&mut self, id: HandlerId) {
        self.entries[id.0].files += 1;
    }

    /// Counts a file of this handler out.
    pub(super) fn file_removed(&mut self, id: HandlerId) {
        self.entries[id.0].files -= 1;
    }

    /// The object behind `file`, as the handler that takes it sees it.
    pub(super) fn identity(&self, id: HandlerId, file: &F) -> Identity
    where
        F: File,
    {
        match self.entries[id.0].handler.identity(file) {
            Some(object) => Identity::Object(id, object),
            None => Identity::Description(file.description()),
        }
    }
}

/// What must not be preserved twice at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Identity {
    /// An object that a handler knows.
    Object(HandlerId, u128),
    /// An open file.
    Description(u64),
}

/// The objects that are preserved, or retrieved and not finished, in any session
/// (`luo_preserved_files`, Linux 7.3), and how many files hold each.
#[derive(Debug, Default)]
pub(super) struct Identities(HashMap<Identity, usize>);

impl Identities {
    /// Enters an object that is to be preserved. EBUSY: it is there.
    pub(super) fn claim(&mut self, identity: Identity) -> Result<(), Errno> {
        if self.0.contains_key(&identity) {
            return Err(Errno::BUSY);
        }
        self.share(identity);
        Ok(())
    }

    /// Enters an object that was retrieved. It can be there: somebody may have found another way
    /// to it, and preserved it.
    pub(super) fn share(&mut self, identity: Identity) {
        *self.0.entry(identity).or_default() += 1;
    }

    /// Takes an object out, once for each time that it was entered.
    pub(super) fn release(&mut self, identity: Identity) {
        match self.0.get_mut(&identity) {
            Some(files) if *files > 1 => *files -= 1,
            _ => drop(self.0.remove(&identity)),
        }
    }
}
