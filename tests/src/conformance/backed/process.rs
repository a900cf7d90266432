//! The open files of a simulated process: real fds under simulated numbers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::{OpenFile, SessionId};

use super::fd_of;
use crate::conformance::fds;
use crate::conformance::request::Opens;

/// The object to which an fd of a process refers.
#[derive(Debug)]
pub(super) enum Opened {
    Device(Arc<()>),
    Session(SessionId, OwnedFd),
    File(OwnedFd),
}

impl Clone for Opened {
    /// Duplicates the real fd: the copy refers to the same open file.
    fn clone(&self) -> Self {
        let copy = |fd: &OwnedFd| fd.try_clone().expect("the limit of fds suffices");
        match self {
            Self::Device(device) => Self::Device(Arc::clone(device)),
            Self::Session(id, fd) => Self::Session(*id, copy(fd)),
            Self::File(fd) => Self::File(copy(fd)),
        }
    }
}

/// The fds of a process.
pub(super) type Table = fds::Table<Opened>;

/// Creates the real fd of a session.
pub(super) type OpenSession<'a> = &'a dyn Fn(SessionId) -> Result<OwnedFd, Errno>;

/// Translates between fds of a process and real files.
pub(super) struct RealFiles<'a>(pub(super) OpenSession<'a>);

impl Opens for RealFiles<'_> {
    type Opened = Opened;
    type File = OpenFile;
    type Session = OwnedFd;

    /// The device has no real file here. A pipe, which no handler preserves, stands in for it.
    fn file(&self, opened: &Opened) -> Option<OpenFile> {
        match opened {
            Opened::Session(_, file) | Opened::File(file) => {
                OpenFile::of(file.as_fd()).expect("the limit of fds suffices")
            }
            Opened::Device(_) => {
                let (nothing, _) = std::io::pipe().ok()?;
                Some(OpenFile::new(nothing.into()))
            }
        }
    }

    fn open_session(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        (self.0)(session)
    }

    fn of_session(&self, session: SessionId, opened: OwnedFd) -> Opened {
        Opened::Session(session, opened)
    }

    fn of_file(&self, file: OpenFile) -> Opened {
        Opened::File(fd_of(&file))
    }
}
