//! Detects when the last fd of a session is closed, with one pipe for each session.
//!
//! The fd that represents a session is the write end of a pipe. The kernel counts its copies: in
//! this process and in others, in messages, and across exec. When the last copy is closed, the read
//! end, which this module keeps, reports a hang-up. Nothing is ever written to the pipe. This
//! module only knows the numbers of sessions.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::SessionId;
use super::super::open_file::{Inode, Look};
use crate::mutex::lock;

/// The read ends of the pipes of all sessions that have an fd.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Ends>);

#[derive(Debug, Default)]
struct Ends {
    /// Made with the first session, because that can fail: an epoll instance is an fd.
    epoll: Option<OwnedFd>,
    by_number: BTreeMap<u64, End>,
    last: u64,
}

#[derive(Debug)]
struct End {
    session: SessionId,
    /// The inode of the pipe, which both ends share.
    inode: Inode,
    _reader: OwnedFd,
}

impl Watch {
    /// Makes the fd that represents a session, with O_CLOEXEC. Errors: EMFILE, ENFILE, ENOMEM,
    /// ENOSPC.
    pub(super) fn open(&self, session: SessionId) -> Result<OwnedFd, Errno> {
        let mut ends = self.ends();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let inode = Look::at(&reader)?.inode;
        let number = ends.last + 1;
        let epoll = match ends.epoll.take() {
            Some(epoll) => epoll,
            None => epoll::create(epoll::CreateFlags::CLOEXEC)?,
        };
        // epoll always reports a hang-up, also if no event is requested.
        let nothing = epoll::EventFlags::empty();
        let added = epoll::add(&epoll, &reader, epoll::EventData::new_u64(number), nothing);
        ends.epoll = Some(epoll);
        added?;
        ends.last = number;
        ends.by_number.insert(number, End { session, inode, _reader: reader });
        Ok(writer)
    }

    /// Returns the sessions whose last fd is closed. Returns each session once.
    pub(super) fn ended(&self) -> Vec<SessionId> {
        const AT_ONCE: usize = 64;
        const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut ends = self.ends();
        let mut ended = Vec::new();
        loop {
            let Some(epoll) = &ends.epoll else { return ended };
            let mut events = Vec::with_capacity(AT_ONCE);
            let found = epoll::wait(epoll, spare_capacity(&mut events), Some(&NOW));
            // EINTR is the only failure of a valid call: repeat it.
            if found == Err(Errno::INTR) {
                continue;
            }
            let closed = events.iter().map(|event: &epoll::Event| event.data.u64());
            // Removing the `End` closes the read end, which also removes it from the epoll
            // instance.
            ended.extend(closed.filter_map(|end| ends.by_number.remove(&end)).map(|e| e.session));
            if events.is_empty() {
                return ended;
            }
        }
    }

    /// Returns the session that an fd represents; `None` if it is no session's fd.
    pub(super) fn session_of(&self, fd: impl AsFd) -> Option<SessionId> {
        let inode = Look::at(fd).ok()?.inode;
        let ends = self.ends();
        ends.by_number.values().find(|end| end.inode == inode).map(|end| end.session)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_with_the_last_copy_of_its_fd_and_is_reported_once() {
        let watch = Watch::default();
        let one = watch.open(SessionId(1)).unwrap();
        let other = watch.open(SessionId(2)).unwrap();
        let copy = one.try_clone().unwrap();
        drop(one);
        assert_eq!(watch.ended(), []);
        assert_eq!(watch.session_of(&copy), Some(SessionId(1)));
        drop(copy);
        assert_eq!(watch.ended(), [SessionId(1)]);
        assert_eq!(watch.ended(), []);
        assert_eq!(watch.session_of(&other), Some(SessionId(2)));
        assert_eq!(watch.session_of(std::io::stdin()), None);
    }

    #[test]
    fn more_sessions_than_one_epoll_wait_returns_can_end_together() {
        let watch = Watch::default();
        let fds: Vec<_> = (0..200).map(|id| watch.open(SessionId(id)).unwrap()).collect();
        drop(fds);
        let mut ended = watch.ended();
        ended.sort_unstable();
        assert_eq!(ended, (0..200).map(SessionId).collect::<Vec<_>>());
    }
}
