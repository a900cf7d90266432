//! The device: it can be open once at a time, and its first opening builds the incoming sessions.
//!
//! Incoming sessions are built from the records of the previous kernel. This is tried once: after a
//! failure every open fails with EIO until the next switch. Sessions do not depend on the device;
//! closing it only allows the next opening. Follows
//! `kernel/liveupdate/luo_core.c` (the same in the seed and in Linux 7.3).

use rustix::io::Errno;

use super::handler::File;
use super::model::Luo;
use super::session::{IncomingSession, SessionId};
use super::tree::SessionRecord;

/// Whether the device is open, and whether the incoming sessions were built.
#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) in_use: bool,
    /// The result of building the incoming sessions; `None` before the first opening. Start sets an
    /// error if the records of shared objects are not valid.
    pub(super) deserialized: Option<Result<(), Errno>>,
}

impl<F: File> Luo<F> {
    /// Opens the device. ENOENT if live update is disabled: there is no device then. EBUSY if the
    /// device is open. EIO if the incoming sessions cannot be built;
    /// [`deserialize_error`](Self::deserialize_error) says why.
    pub fn open_device(&mut self) -> Result<(), Errno> {
        if !self.is_enabled() {
            return Err(Errno::NOENT);
        }
        if self.device.in_use {
            return Err(Errno::BUSY);
        }
        self.deserialize().map_err(|_| Errno::IO)?;
        self.device.in_use = true;
        Ok(())
    }

    /// Closes the device, after the last reference to it is gone. EBADF if it is not open.
    pub fn close_device(&mut self) -> Result<(), Errno> {
        if std::mem::take(&mut self.device.in_use) { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Returns why opening the device fails with EIO. ENOENT: no handler has the format of a file.
    /// EEXIST: two sessions have one name, two files of a session have one token, or two shared
    /// objects have one format.
    pub fn deserialize_error(&self) -> Option<Errno> {
        self.device.deserialized.and_then(Result::err)
    }

    fn deserialize(&mut self) -> Result<(), Errno> {
        if let Some(outcome) = self.device.deserialized {
            return outcome;
        }
        // Sessions built before a failure stay, so that their files are not freed.
        let records = std::mem::take(&mut self.arrived);
        let outcome = records.iter().try_for_each(|record| self.deserialize_session(record));
        self.device.deserialized = Some(outcome);
        outcome
    }

    fn deserialize_session(&mut self, record: &SessionRecord) -> Result<(), Errno> {
        let id: SessionId = self.new_session_id();
        let mut session = IncomingSession::new(record.name);
        let files = record.files.iter().try_for_each(|file| {
            let arrived = self.registry.deserialize(file)?;
            session.files.push(file.token, arrived)
        });
        self.incoming.insert(id, record.name, session)?;
        files
    }
}
