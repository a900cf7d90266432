//! The steps before the switch, and how they are undone when one fails.
//!
//! ```text
//!  freeze    session 1: file 1, 2, ..   session 2: file 1, 2, ..
//!            (sessions in the order of creation, files in the order of preservation)
//!  write     the tree, and pass it to `finalize`
//!
//!  on failure of file k of session n; or of `finalize`, after every file was frozen:
//!  unfreeze  session n: file 1 .. k-1   session n-1: file 1, 2, ..   .. session 1
//! ```
//!
//! Either all sessions are handed over, and cannot be taken back, or nothing has changed. The order
//! is that of `kernel/liveupdate/luo_session.c` and `luo_file.c` (Linux 7.3). Only the seed has the
//! step `finalize`, and leaves sessions frozen if it fails; here that failure is undone like any
//! other.

use rustix::io::Errno;

use super::file::{Preserved, Registry};
use super::handler::File;
use super::model::Luo;
use super::session::{OutgoingSession, TokenFiles};
use super::tree::{SessionRecord, v1};

impl<F: File> Luo<F> {
    /// Hands over all outgoing sessions. Incoming sessions are not handed over: those that are not
    /// finished are lost with this kernel.
    ///
    /// `finalize` gets the tree in the layout [`v1`], and puts it where the next kernel looks for
    /// it. If live update is disabled, this does nothing and does not call `finalize`. A failure
    /// changes nothing, and the call can be repeated. It returns the errno of the first file that
    /// cannot be frozen, EAGAIN if the tree cannot be written or `finalize` fails, or ESHUTDOWN if
    /// all sessions are handed over already. After success every session call fails with ESHUTDOWN.
    pub fn reboot(
        &mut self,
        finalize: impl FnOnce(&[u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if !self.is_enabled() {
            return Ok(());
        }
        self.check_running()?;
        self.freeze_sessions()?;
        let mut tree = self.outgoing_tree.clone();
        tree.sessions = self.session_records();
        tree.flbs = self.registry.flbs.records();
        let written = v1::encode(&tree).map_err(|_| Errno::AGAIN);
        if let Err(errno) = written.and_then(|bytes| finalize(&bytes).map_err(|_| Errno::AGAIN)) {
            self.unfreeze_sessions(self.outgoing.len());
            return Err(errno);
        }
        self.outgoing_tree = tree;
        self.handed_over = true;
        Ok(())
    }

    /// Whether [`reboot`](Self::reboot) succeeded, with live update enabled.
    pub fn is_handed_over(&self) -> bool {
        self.handed_over
    }

    fn freeze_sessions(&mut self) -> Result<(), Errno> {
        let registry = &mut self.registry;
        let frozen = self.outgoing.iter_mut().enumerate().try_for_each(|(before, session)| {
            freeze_files(registry, session).map_err(|errno| (before, errno))
        });
        frozen.map_err(|(before, errno)| {
            self.unfreeze_sessions(before);
            errno
        })
    }

    /// Unfreezes the first `count` sessions, last first.
    fn unfreeze_sessions(&mut self, count: usize) {
        let after = self.outgoing.len() - count;
        for session in self.outgoing.iter().rev().skip(after) {
            unfreeze_files(&mut self.registry, &session.files, session.files.len());
        }
    }

    fn session_records(&self) -> Vec<SessionRecord> {
        let record = |session: &OutgoingSession<F>| SessionRecord {
            name: session.name,
            files: session.files.iter().map(|(token, f)| self.registry.record(f, *token)).collect(),
        };
        self.outgoing.iter().map(record).collect()
    }
}

/// Freezes all files of a session, or none.
fn freeze_files<F: File>(
    registry: &mut Registry<F>,
    session: &mut OutgoingSession<F>,
) -> Result<(), Errno> {
    let frozen =
        session.files.iter_mut().enumerate().try_for_each(|(before, (_, file))| {
            registry.freeze(file).map_err(|errno| (before, errno))
        });
    frozen.map_err(|(before, errno)| {
        unfreeze_files(registry, &session.files, before);
        errno
    })
}

/// Unfreezes the first `count` files, in their order.
fn unfreeze_files<F: File>(
    registry: &mut Registry<F>,
    files: &TokenFiles<Preserved<F>>,
    count: usize,
) {
    files.iter().take(count).for_each(|(_, file)| registry.unfreeze(file));
}
