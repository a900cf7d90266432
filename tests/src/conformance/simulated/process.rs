//! The open files of a simulated process: simulated files.

use luo::Errno;
use luo::builtin::SessionId;

use super::files::{OpenFile, What};
use crate::conformance::request::Opens;

/// Translates between fds of a process and simulated files.
pub(super) struct SimulatedFiles;

impl Opens for SimulatedFiles {
    type Opened = OpenFile;
    type File = OpenFile;
    type Session = OpenFile;

    fn file(&self, opened: &OpenFile) -> Option<OpenFile> {
        (!matches!(opened.what, What::Path)).then(|| opened.clone())
    }

    fn open_session(&self, session: SessionId) -> Result<OpenFile, Errno> {
        Ok(OpenFile::new(What::Session(session)))
    }

    fn of_session(&self, _session: SessionId, opened: OpenFile) -> OpenFile {
        opened
    }

    fn of_file(&self, file: OpenFile) -> OpenFile {
        file
    }
}
