//! File descriptors that another program has left open for this one, which `perennial run` lends to devices
//! (`fd=3`). Any other host lends none: it starts its VMs again after an update, when the program that could open
//! the files again is gone.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use crate::inherited_fd::take;
use crate::mutex::lock;

/// A process has one set of descriptors, hence a static. `None`: this process lends none.
static FILES: Mutex<Option<Files>> = Mutex::new(None);

/// The descriptors that were taken so far, by number.
type Files = BTreeMap<RawFd, OwnedFd>;

/// Lets devices have the descriptors that this process has inherited.
pub fn lend() {
    lock(&FILES).get_or_insert_default();
}

/// Keeps a file that this process has opened, for [`duplicate`], as long as the process runs. Returns its number.
/// Errors if this process lends none.
pub fn keep(file: OwnedFd) -> Result<RawFd, String> {
    let number = file.as_raw_fd();
    let mut files = lock(&FILES);
    files.as_mut().ok_or(NOT_LENT)?.insert(number, file);
    Ok(number)
}

const NOT_LENT: &str = "a file descriptor can be given to `perennial run` only: the VMs of a host outlive the program \
                        that could open it again; name a tap with tap=";

/// Returns a copy of the descriptor `number`. The error says why there is none, and what to do.
pub fn duplicate(number: RawFd) -> Result<OwnedFd, String> {
    let mut files = lock(&FILES);
    let files = files.as_mut().ok_or(NOT_LENT)?;
    let file = match files.entry(number) {
        Entry::Occupied(taken) => taken.into_mut(),
        Entry::Vacant(place) => place.insert(take(number).map_err(|error| error.to_string())?),
    };
    file.try_clone().map_err(|error| format!("fd {number} cannot be duplicated: {error}"))
}
