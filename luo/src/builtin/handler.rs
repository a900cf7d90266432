//! File handlers: how one kind of file is preserved and retrieved.
//!
//! All effects on files happen in a [`Handler`]; the state machine only decides which callback is
//! called when. It keeps the order of `kernel/liveupdate/luo_file.c` (Linux 7.3):
//!
//! ```text
//!  old kernel   can_preserve -> identity -> preserve --> freeze --> (switch)
//!                                              |           |
//!                                              |        unfreeze, if the switch fails
//!                                              v
//!                                          unpreserve, when the session is closed
//!  new kernel   retrieve, at most once --> can_finish --> finish, once
//! ```
//!
//! This module keeps two tables. The list of handlers: the first that can preserve a file gets the
//! file. The table of objects behind files that are preserved, or retrieved and not finished: an
//! object that is in it cannot be preserved. When to call which callback is left to the modules
//! of files and sessions.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use rustix::io::Errno;

use super::flb::FlbId;
use super::label::Compatible;

/// A reference to an open file, like the kernel's `struct file *`. A clone is another reference to
/// the same open file.
pub trait File: Clone + fmt::Debug {
    /// A number that all references to this open file share. No other file that is open at the same
    /// time has this number.
    fn description(&self) -> u64;
}

/// The number by which the handler of the next kernel finds a preserved file, such as an address or
/// an index. Only the handler knows the meaning; the tree carries the number
/// (`luo_file_ser.data`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

/// Whether a file of an incoming session was retrieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retrieval<'a, F> {
    /// The file was never asked for.
    Never,
    /// The retrieved file.
    Done(&'a F),
    /// The errno of [`Handler::retrieve`], which is not called again.
    Failed(Errno),
}

/// Preserves and retrieves one kind of file.
///
/// Callbacks run one at a time. They must not call the state machine.
pub trait Handler<F>: Send {
    /// The name of the format of this handler's handles. In the next kernel, the handler with the
    /// same name gets the handles.
    fn compatible(&self) -> Compatible;

    /// Whether this handler can preserve the file.
    fn can_preserve(&self, file: &F) -> bool;

    /// The object behind the file: two files of one object cannot both be preserved. `None` if each
    /// open file is an object by itself. The kernel's `get_id`.
    fn identity(&self, file: &F) -> Option<u128> {
        let _ = file;
        None
    }

    /// Preserves the file. A failure must change nothing.
    fn preserve(&mut self, file: &F) -> Result<Handle, Errno>;

    /// Prepares a preserved file for the switch, which follows. Returns the handle for the next
    /// kernel, which may differ from `handle`. A failure cancels the switch, and must change
    /// nothing.
    fn freeze(&mut self, file: &F, handle: Handle) -> Result<Handle, Errno> {
        let _ = file;
        Ok(handle)
    }

    /// Undoes [`freeze`](Self::freeze), after a cancelled switch.
    fn unfreeze(&mut self, file: &F, handle: Handle) {
        let _ = (file, handle);
    }

    /// Undoes [`preserve`](Self::preserve).
    fn unpreserve(&mut self, file: &F, handle: Handle);

    /// Makes the file again from its handle. Called at most once for a handle, also if it fails, unless
    /// [`keeps`](Self::keeps) the file.
    fn retrieve(&mut self, handle: Handle) -> Result<F, Errno>;

    /// Whether a file whose [`retrieve`](Self::retrieve) failed with this errno can be retrieved again, because
    /// nothing has changed. Never in the kernel.
    fn keeps(&self, errno: Errno) -> bool {
        let _ = errno;
        false
    }

    /// Whether the file can be finished now. `false` makes the finish of its session fail with
    /// EBUSY.
    fn can_finish(&mut self, retrieval: Retrieval<'_, F>, handle: Handle) -> bool {
        let _ = (retrieval, handle);
        true
    }

    /// Ends the preservation. Discards the file if it was never retrieved.
    fn finish(&mut self, retrieval: Retrieval<'_, F>, handle: Handle);
}

/// The number of a registered handler, in the order of registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandlerId(usize);

/// A registered handler.
struct Entry<F> {
    compatible: Compatible,
    handler: Box<dyn Handler<F>>,
    /// Shared objects that its files depend on, in the order of binding.
    flbs: Vec<FlbId>,
    /// Number of its files that are preserved, or incoming and not finished.
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
    /// Adds a handler. EEXIST if one of that format is registered.
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

    /// Makes each file of handler `id` depend on `flb`. EINVAL if there is no such handler. EEXIST
    /// if they are bound already. EBUSY if the handler has files: `flb` would not count these.
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

    /// Returns the first handler that can preserve `file`.
    pub(super) fn accepting(&self, file: &F) -> Option<HandlerId> {
        self.entries.iter().position(|entry| entry.handler.can_preserve(file)).map(HandlerId)
    }

    /// Returns the handler of a format.
    pub(super) fn of_format(&self, compatible: &Compatible) -> Option<HandlerId> {
        self.by_compatible.get(compatible).copied()
    }

    /// The format of a handler's handles.
    pub(super) fn compatible(&self, id: HandlerId) -> Compatible {
        self.entries[id.0].compatible
    }

    /// Returns a handler. Does not fail: ids come from this list, and no handler is ever removed.
    pub(super) fn get(&mut self, id: HandlerId) -> &mut dyn Handler<F> {
        &mut *self.entries[id.0].handler
    }

    /// The shared objects that files of this handler depend on.
    pub(super) fn flbs(&self, id: HandlerId) -> &[FlbId] {
        &self.entries[id.0].flbs
    }

    /// Adds one to the handler's number of files.
    pub(super) fn file_added(&mut self, id: HandlerId) {
        self.entries[id.0].files += 1;
    }

    /// Takes one from the handler's number of files.
    pub(super) fn file_removed(&mut self, id: HandlerId) {
        self.entries[id.0].files -= 1;
    }

    /// Returns the object behind `file`, according to the handler of the file.
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

/// The object behind a file. No object can be preserved twice at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Identity {
    /// A number that a handler gives to the object.
    Object(HandlerId, u128),
    /// An open file, by [`File::description`].
    Description(u64),
}

/// The objects that are preserved, or retrieved and not finished, in any session
/// (`luo_preserved_files`, Linux 7.3), with the number of files of each.
#[derive(Debug, Default)]
pub(super) struct Identities(HashMap<Identity, usize>);

impl Identities {
    /// Adds an object that is about to be preserved. EBUSY if it is in the table.
    pub(super) fn claim(&mut self, identity: Identity) -> Result<(), Errno> {
        if self.0.contains_key(&identity) {
            return Err(Errno::BUSY);
        }
        self.share(identity);
        Ok(())
    }

    /// Adds an object that was retrieved. It may be in the table already: a process may have opened
    /// and preserved the object by another path.
    pub(super) fn share(&mut self, identity: Identity) {
        *self.0.entry(identity).or_default() += 1;
    }

    /// Undoes one [`claim`](Self::claim) or [`share`](Self::share) of an object.
    pub(super) fn release(&mut self, identity: Identity) {
        match self.0.get_mut(&identity) {
            Some(files) if *files > 1 => *files -= 1,
            _ => drop(self.0.remove(&identity)),
        }
    }
}
