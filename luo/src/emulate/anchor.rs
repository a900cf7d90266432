//! The file that stands for the device or a session in the program, and the end of it.
//!
//! Linux itself has to keep count of it: it is copied by dup and fork, sent over sockets, dropped by
//! exec and by death. So it is a socket of a pair, and when the last reference to the program's is
//! gone ours is hung up. Among the kinds of pairs this is the one whose program side behaves
//! most like the device: a listening socket to which ours is connected without ever being accepted.
//! Reading it fails with EINVAL at once, it cannot be mapped (ENODEV) or sought (ESPIPE), and
//! nothing ever blocks on it. What differs: writing says ENOTCONN instead of EINVAL, it can be added
//! to an epoll, and its link in `/proc/self/fd` is that of a socket.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with, sockopt,
};

/// A pair, just made.
#[derive(Debug)]
pub(super) struct Anchor {
    /// For the program.
    pub(super) theirs: OwnedFd,
    /// Hung up when the last reference to the other is gone.
    pub(super) ours: OwnedFd,
    /// The number of `theirs`, which no other socket gets.
    pub(super) cookie: u64,
}

impl Anchor {
    /// Makes a pair. ENFILE: this process has no more fds, which to the program is the system.
    pub(super) fn new() -> Result<Self, Errno> {
        Self::make().map_err(of_the_system)
    }

    /// The name of the listening socket is chosen by the kernel, in no file system.
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

/// The errno to the program of a failure here.
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
    fn ours_is_hung_up_with_the_last_reference_to_theirs() {
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
    fn a_pair_is_known_by_its_cookie() {
        let (one, other) = (Anchor::new().unwrap(), Anchor::new().unwrap());
        let copy = one.theirs.try_clone().unwrap();
        assert_eq!(sockopt::socket_cookie(&copy), Ok(one.cookie));
        assert_ne!(one.cookie, other.cookie);
    }
}
