//! File-lifecycle-bound data (FLB): an object that many files share and that lives as long as the
//! first and the last of them.
//!
//! A shared object is bound to handlers. It is preserved before the first file of any of them, and
//! unpreserved after the last; in the next kernel it is retrieved when somebody asks, and finished
//! after the last dependent file is finished. The count of dependent files travels with it. Follows
//! `kernel/liveupdate/luo_flb.c` (Linux 7.3); the seed had none. That an object which nobody asked
//! for is retrieved before it is finished (so that there is something to finish), and that the
//! objects of one handler are undone in reverse, is decided here.

use std::collections::BTreeMap;
use std::fmt;

use rustix::io::Errno;

use super::handler::Handle;
use super::label::Compatible;
use super::tree::FlbRecord;

/// Most shared objects of one machine: one page of records (`abi/luo.h`, Linux 7.3).
pub const MAX_FLBS: usize = 63;

/// One shared object, and how to carry it. Callbacks must not call into the machine.
pub trait Flb: Send {
    /// The name of the format of its handle, which no other shared object has.
    fn compatible(&self) -> Compatible;

    /// Starts to preserve the object, for the first dependent file.
    fn preserve(&mut self) -> Result<Handle, Errno>;

    /// Undoes [`preserve`](Self::preserve), after the last dependent file.
    fn unpreserve(&mut self, handle: Handle);

    /// Makes the object again. After a failure it can be asked again.
    fn retrieve(&mut self, handle: Handle) -> Result<(), Errno>;

    /// Ends the preservation of the retrieved object.
    fn finish(&mut self, handle: Handle);
}

/// A registered shared object. Numbers follow the order of registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlbId(usize);

/// What came in for a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// Its record is still in the tree.
    Waiting,
    /// It is made again.
    Retrieved,
    /// The last dependent file is finished.
    Finished,
}

struct Entry {
    compatible: Compatible,
    flb: Box<dyn Flb>,
    /// Dependent files of this kernel, and the handle while there is one.
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

/// All shared objects, in the order of their registration, and what came in.
#[derive(Debug, Default)]
pub(super) struct Flbs {
    entries: Vec<Entry>,
    by_compatible: BTreeMap<Compatible, FlbId>,
    /// Records of the previous kernel: handle, and dependent files that are not finished.
    incoming: BTreeMap<Compatible, (Handle, u64)>,
}

impl Flbs {
    /// Takes over the records of the previous kernel. EEXIST: two of one format.
    pub(super) fn set_incoming(&mut self, records: &[FlbRecord]) -> Result<(), Errno> {
        for FlbRecord { compatible, data, count } in records {
            if self.incoming.insert(*compatible, (Handle(*data), *count)).is_some() {
                return Err(Errno::EXIST);
            }
        }
        Ok(())
    }

    /// Adds an object. EEXIST: one of that format is there. ENOSPC: there are [`MAX_FLBS`].
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

    /// Whether there is such an object.
    pub(super) fn contains(&self, id: FlbId) -> bool {
        id.0 < self.entries.len()
    }

    /// Counts one more dependent file on each of `ids`; preserves those that had none. A failure
    /// takes back what was done, in reverse.
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

    /// Counts one dependent file less on each of `ids`, in reverse; unpreserves those without any.
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

    /// Makes an object of the previous kernel again, unless that was done. ENOENT: none came in;
    /// ENODATA: it is finished.
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

    /// Counts one dependent file of the previous kernel as finished on each of `ids`, in reverse;
    /// finishes those without any left. One that cannot even be retrieved then is given up.
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

    /// What the next kernel has to know: the objects that have dependent files.
    pub(super) fn records(&self) -> Vec<FlbRecord> {
        let record = |entry: &Entry| {
            let (Handle(data), count) = entry.outgoing?;
            Some(FlbRecord { compatible: entry.compatible, data, count })
        };
        self.entries.iter().filter_map(record).collect()
    }
}
