//! The device: one opener at a time, and the moment when what came in becomes sessions.
//!
//! Sessions of the previous kernel are built when the device is opened for the first time, once, and
//! whatever comes of it stays: after a failure every open is EIO until the next switch. Sessions do
//! not depend on the device; closing it frees nothing but the place of the opener. Follows
//! `kernel/liveupdate/luo_core.c` (the same in the seed and in Linux 7.3).

use rustix::io::Errno;

use super::handler::File;
use super::model::Luo;
use super::session::{IncomingSession, SessionId};
use super::tree::SessionRecord;

/// Whether the device is open, and what became of the incoming sessions.
#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) in_use: bool,
    /// Known as soon as the device was opened once, or if the start found that it cannot be.
    pub(super) deserialized: Option<Result<(), Errno>>,
}

impl<F: File> Luo<F> {
    /// Opens the device. ENOENT: live update is disabled, there is none. EBUSY: it is open. EIO:
    /// what the previous kernel left cannot be read; [`deserialize_error`](Self::deserialize_error)
    /// says why.
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

    /// The last reference to the open device is gone. EBADF: it is not open.
    pub fn close_device(&mut self) -> Result<(), Errno> {
        if std::mem::take(&mut self.device.in_use) { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Why the device cannot be opened: ENOENT: no handler for the format of a file; EEXIST: two
    /// sessions of one name, two files of one under one token, or two shared objects of one format.
    pub fn deserialize_error(&self) -> Option<Errno> {
        self.device.deserialized.and_then(Result::err)
    }

    fn deserialize(&mut self) -> Result<(), Errno> {
        if let Some(outcome) = self.device.deserialized {
            return outcome;
        }
        // Sessions built before a failure stay: what they hold is not to be freed.
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
