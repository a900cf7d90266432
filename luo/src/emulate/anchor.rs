//! The file that the program gets as the device or as a session, and how its last close is noticed.
//!
//! The program's fd can be copied by dup and fork, sent over sockets, and closed by exec or by the
//! death of a process, so only Linux can count the references. Therefore the program gets one
//! socket of a pair: when its last reference is closed, the supervisor's socket is hung up. Of all
//! kinds of pairs the program's side of this one behaves most like the device: it is a listening
//! socket, to which the supervisor's socket is connected, and the connection is never accepted.
//! Reading fails with EINVAL at once, mapping with ENODEV and seeking with ESPIPE, and no operation
//! blocks. Differences from the device: writing fails with ENOTCONN instead of EINVAL, the fd can
//! be added to an epoll, and its link in `/proc/self/fd` is that of a socket.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with, sockopt,
};

/// A new pair of sockets.
#[derive(Debug)]
pub(super) struct Anchor {
    /// The program's socket.
    pub(super) theirs: OwnedFd,
    /// The supervisor's socket. It is hung up when the last reference to `theirs` is closed.
    pub(super) ours: OwnedFd,
    /// The kernel's unique number of `theirs` (SO_COOKIE).
    pub(super) cookie: u64,
}

impl Anchor {
    /// Creates a pair. ENFILE: the supervisor has no free fd.
    pub(super) fn new() -> Result<Self, Errno> {
        Self::make().map_err(of_the_system)
    }

    /// The kernel chooses an abstract name for the listening socket, so no file appears.
    fn make() -> Result<Self, Errno> {
        let socket =
            || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let theirs = socket()?;
        bind(&theirs, &SocketAddrUnix::new_unnamed())?;
        listen(&theirs, 0)?;
        let ours = socket()?;
        connect(&ours, &getsockname(&theirs)?)?;
        let cookie = sockopt::socket_cookie(&theirs)?;
        Ok(Self { theirs, ours, cookie })
    }
}

/// The errno that the program gets for a failure of the supervisor. EMFILE becomes ENFILE, because
/// for the program the supervisor's limit on fds is a limit of the system.
pub(super) fn of_the_system(errno: Errno) -> Errno {
    if errno == Errno::MFILE { Errno::NFILE } else { errno }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::{read, write};

    use super::*;

    fn is_hung_up(ours: &OwnedFd) -> bool {
        let now = Timespec::try_from(Duration::ZERO).unwrap();
        let mut fds = [PollFd::new(ours, PollFlags::empty())];
        poll(&mut fds, Some(&now)).unwrap();
        fds[0].revents().contains(PollFlags::HUP)
    }

    #[test]
    fn ours_is_hung_up_after_the_last_close_of_theirs() {
        let Anchor { theirs, ours, .. } = Anchor::new().unwrap();
        let copy = theirs.try_clone().unwrap();
        assert!(!is_hung_up(&ours));
        drop(theirs);
        assert!(!is_hung_up(&ours));
        drop(copy);
        assert!(is_hung_up(&ours));
    }

    #[test]
    fn theirs_never_blocks() {
        let Anchor { theirs, ours: _ours, .. } = Anchor::new().unwrap();
        assert_eq!(read(&theirs, &mut [0; 8]).unwrap_err(), Errno::INVAL);
        assert_eq!(write(&theirs, b"x").unwrap_err(), Errno::NOTCONN);
    }

    #[test]
    fn copies_have_the_cookie_and_other_pairs_have_not() {
        let (one, other) = (Anchor::new().unwrap(), Anchor::new().unwrap());
        let copy = one.theirs.try_clone().unwrap();
        assert_eq!(sockopt::socket_cookie(&copy), Ok(one.cookie));
        assert_ne!(one.cookie, other.cookie);
    }
}
