//! What is behind a process's fds, which are real ones under made-up numbers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::{OpenFile, SessionId};

use super::fd_of;
use crate::conformance::fds;
use crate::conformance::request::Opens;

/// What is behind an fd.
#[derive(Debug)]
pub(super) enum Opened {
    Device(Arc<()>),
    Session(SessionId, OwnedFd),
    File(OwnedFd),
}

impl Clone for Opened {
    /// Another fd of the same open file.
    fn clone(&self) -> Self {
        let copy = |fd: &OwnedFd| fd.try_clone().expect("the test may have that many fds");
        match self {
            Self::Device(device) => Self::Device(Arc::clone(device)),
            Self::Session(id, fd) => Self::Session(*id, copy(fd)),
            Self::File(fd) => Self::File(copy(fd)),
        }
    }
}

/// The fds of a process.
pub(super) type Table = fds::Table<Opened>;

/// Makes the fd that stands for a session.
pub(super) type OpenSession<'a> = &'a dyn Fn(SessionId) -> Result<OwnedFd, Errno>;

/// Real files.
pub(super) struct RealFiles<'a>(pub(super) OpenSession<'a>);

impl Opens for RealFiles<'_> {
    type Opened = Opened;
    type File = OpenFile;
    type Session = OwnedFd;

    /// The device has no open file here: something stands in for it that nobody preserves.
    fn file(&self, opened: &Opened) -> Option<OpenFile> {
        match opened {
            Opened::Session(_, file) | Opened::File(file) => {
                OpenFile::of(file.as_fd()).expect("the test may have that many fds")
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
