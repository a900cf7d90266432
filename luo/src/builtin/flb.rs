//! File-lifecycle-bound data (FLB): a *shared object* of several files, which lives from the first
//! file to the last.
//!
//! A shared object is bound to handlers; the files of these handlers depend on it. It is preserved
//! before the first dependent file, and unpreserved after the last. In the next kernel it is
//! retrieved on demand, and finished after the last dependent file is finished. The tree has the
//! number of dependent files. Follows `kernel/liveupdate/luo_flb.c` (Linux 7.3); the seed has no
//! FLB. Two rules are this module's own: an object that was never asked for is retrieved before it
//! is finished, so that there is an object to finish; and the objects of one handler are undone in
//! reverse order.

use std::collections::BTreeMap;
use std::fmt;

use rustix::io::Errno;

use super::handler::Handle;
use super::label::Compatible;
use super::tree::FlbRecord;

/// Most shared objects of one kernel: one page of records (`abi/luo.h`, Linux 7.3).
pub const MAX_FLBS: usize = 63;

/// Preserves and retrieves one shared object. Callbacks must not call the state machine.
pub trait Flb: Send {
    /// The name of the format of the object's handle. No other shared object has this name.
    fn compatible(&self) -> Compatible;

    /// Preserves the object, for the first dependent file.
    fn preserve(&mut self) -> Result<Handle, Errno>;

    /// Undoes [`preserve`](Self::preserve), after the last dependent file.
    fn unpreserve(&mut self, handle: Handle);

    /// Makes the object again from its handle. May be called again after a failure.
    fn retrieve(&mut self, handle: Handle) -> Result<(), Errno>;

    /// Ends the preservation of the retrieved object.
    fn finish(&mut self, handle: Handle);
}

/// The number of a registered shared object, in the order of registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlbId(usize);

/// The state of a shared object of the previous kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// Not retrieved yet, or not in the tree of the previous kernel.
    Waiting,
    /// Retrieved, and not finished.
    Retrieved,
    /// The last dependent file is finished.
    Finished,
}

struct Entry {
    compatible: Compatible,
    flb: Box<dyn Flb>,
    /// The handle and the number of dependent files of this kernel; `None` if not preserved.
    outgoing: Option<(Handle, u64)>,
    arrival: Arrival,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("compatible", &self.compatible)
            .field("outgoing", &self.outgoing)
            .field("arrival", &self.arrival)
            .finish_non_exhaustive()
    }
}

/// All shared objects in the order of registration, and the records of the previous kernel.
#[derive(Debug, Default)]
pub(super) struct Flbs {
    entries: Vec<Entry>,
    by_compatible: BTreeMap<Compatible, FlbId>,
    /// Records of the previous kernel: handle, and number of files that are not finished.
    incoming: BTreeMap<Compatible, (Handle, u64)>,
}

impl Flbs {
    /// Takes over the records of the previous kernel. EEXIST if two have one format.
    pub(super) fn set_incoming(&mut self, records: &[FlbRecord]) -> Result<(), Errno> {
        for FlbRecord { compatible, data, count } in records {
            if self.incoming.insert(*compatible, (Handle(*data), *count)).is_some() {
                return Err(Errno::EXIST);
            }
        }
        Ok(())
    }

    /// Adds an object. EEXIST if one of that format is registered. ENOSPC if [`MAX_FLBS`] are.
    pub(super) fn register(&mut self, flb: Box<dyn Flb>) -> Result<FlbId, Errno> {
        let compatible = flb.compatible();
        let id = FlbId(self.entries.len());
        if self.by_compatible.contains_key(&compatible) {
            return Err(Errno::EXIST);
        }
        if self.entries.len() >= MAX_FLBS {
            return Err(Errno::NOSPC);
        }
        self.by_compatible.insert(compatible, id);
        self.entries.push(Entry { compatible, flb, outgoing: None, arrival: Arrival::Waiting });
        Ok(id)
    }

    /// Whether object `id` is registered.
    pub(super) fn contains(&self, id: FlbId) -> bool {
        id.0 < self.entries.len()
    }

    /// Adds one dependent file to each of `ids`; preserves those that had none. A failure undoes
    /// the objects before it, in reverse order.
    pub(super) fn preserve(&mut self, ids: &[FlbId]) -> Result<(), Errno> {
        for (done, id) in ids.iter().enumerate() {
            let entry = &mut self.entries[id.0];
            let counted = match entry.outgoing {
                Some((handle, files)) => Ok((handle, files + 1)),
                None => entry.flb.preserve().map(|handle| (handle, 1)),
            };
            match counted {
                Ok(outgoing) => entry.outgoing = Some(outgoing),
                Err(errno) => {
                    self.unpreserve(&ids[..done]);
                    return Err(errno);
                }
            }
        }
        Ok(())
    }

    /// Removes one dependent file from each of `ids`, in reverse order; unpreserves those that
    /// have none left.
    pub(super) fn unpreserve(&mut self, ids: &[FlbId]) {
        for id in ids.iter().rev() {
            let entry = &mut self.entries[id.0];
            entry.outgoing = match entry.outgoing {
                Some((handle, 1)) => {
                    entry.flb.unpreserve(handle);
                    None
                }
                Some((handle, files)) => Some((handle, files - 1)),
                None => None,
            };
        }
    }

    /// Retrieves an object of the previous kernel, unless it is retrieved already. EINVAL if the
    /// object is not registered. ENOENT if the previous kernel preserved no such object. ENODATA if
    /// it is finished.
    pub(super) fn retrieve(&mut self, id: FlbId) -> Result<(), Errno> {
        let entry = self.entries.get_mut(id.0).ok_or(Errno::INVAL)?;
        match entry.arrival {
            Arrival::Finished => return Err(Errno::NODATA),
            Arrival::Retrieved => return Ok(()),
            Arrival::Waiting => {}
        }
        let (handle, _) = self.incoming.get(&entry.compatible).ok_or(Errno::NOENT)?;
        entry.flb.retrieve(*handle)?;
        entry.arrival = Arrival::Retrieved;
        Ok(())
    }

    /// Marks one dependent file of the previous kernel as finished for each of `ids`, in reverse
    /// order; finishes the objects that have none left. An object that is not retrieved yet is
    /// retrieved first; if that fails, the object is lost.
    pub(super) fn finish(&mut self, ids: &[FlbId]) {
        for id in ids.iter().rev() {
            let compatible = self.entries[id.0].compatible;
            let Some((handle, files)) = self.incoming.get_mut(&compatible) else { continue };
            *files = files.saturating_sub(1);
            let handle = *handle;
            if *files > 0 {
                continue;
            }
            let retrieved = self.retrieve(*id);
            let entry = &mut self.entries[id.0];
            if retrieved.is_ok() {
                entry.flb.finish(handle);
            }
            entry.arrival = Arrival::Finished;
        }
    }

    /// Returns the records for the next kernel: the objects that have dependent files.
    pub(super) fn records(&self) -> Vec<FlbRecord> {
        let record = |entry: &Entry| {
            let (Handle(data), count) = entry.outgoing?;
            Some(FlbRecord { compatible: entry.compatible, data, count })
        };
        self.entries.iter().filter_map(record).collect()
    }
}
