//! The ioctls of the device and of sessions, one function each.
//!
//! Each function passes the kernel a struct of `uapi`, which has its size in its first field, and owns the
//! fd that the kernel creates for it. The meaning of each errno is in `error`.
#![expect(unsafe_code, reason = "ioctls take pointers and make file descriptors")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, Updater, ioctl};

use crate::uapi::{self, Finish, GetName, NamedSession, SESSION_NAME_LENGTH, TokenedFd};
use crate::{SessionName, Token};

/// The size that a struct of `uapi` carries; none has more than 72 bytes.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// Creates an outgoing session on the device.
pub(crate) fn create_session(device: BorrowedFd<'_>, name: &SessionName) -> Result<OwnedFd, Errno> {
    let mut session = NamedSession { size: size::<NamedSession>(), fd: -1, name: name.to_array() };
    // SAFETY: CREATE_SESSION reads and writes one NamedSession.
    let request = unsafe { Updater::<{ uapi::CREATE_SESSION }, _>::new(&mut session) };
    call(device, request)?;
    // SAFETY: the kernel just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(session.fd) })
}

/// Retrieves an incoming session from the device. The struct must be writable: if the kernel cannot write
/// its response, it destroys the session.
pub(crate) fn retrieve_session(
    device: BorrowedFd<'_>,
    name: &SessionName,
) -> Result<OwnedFd, Errno> {
    let mut session = NamedSession { size: size::<NamedSession>(), fd: -1, name: name.to_array() };
    // SAFETY: RETRIEVE_SESSION reads and writes one NamedSession.
    let request = unsafe { Updater::<{ uapi::RETRIEVE_SESSION }, _>::new(&mut session) };
    call(device, request)?;
    // SAFETY: the kernel just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(session.fd) })
}

/// Preserves the file behind `fd`, which may be any number, in an outgoing session.
pub(crate) fn preserve_fd(session: BorrowedFd<'_>, fd: RawFd, token: Token) -> Result<(), Errno> {
    let mut file = TokenedFd { size: size::<TokenedFd>(), fd, token: token.0 };
    // SAFETY: SESSION_PRESERVE_FD reads and writes one TokenedFd. It borrows the fd.
    let request = unsafe { Updater::<{ uapi::SESSION_PRESERVE_FD }, _>::new(&mut file) };
    call(session, request)
}

/// Returns a new fd of a file in an incoming session.
pub(crate) fn retrieve_fd(session: BorrowedFd<'_>, token: Token) -> Result<OwnedFd, Errno> {
    let mut file = TokenedFd { size: size::<TokenedFd>(), fd: -1, token: token.0 };
    // SAFETY: SESSION_RETRIEVE_FD reads and writes one TokenedFd.
    let request = unsafe { Updater::<{ uapi::SESSION_RETRIEVE_FD }, _>::new(&mut file) };
    call(session, request)?;
    // SAFETY: the kernel just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(file.fd) })
}

/// Finishes an incoming session.
pub(crate) fn finish(session: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut finish = Finish { size: size::<Finish>(), reserved: 0 };
    // SAFETY: SESSION_FINISH reads and writes one Finish.
    let request = unsafe { Updater::<{ uapi::SESSION_FINISH }, _>::new(&mut finish) };
    call(session, request)
}

/// Returns the name of a session of either kind. Bytes after its NUL have no meaning.
pub(crate) fn get_name(session: BorrowedFd<'_>) -> Result<[u8; SESSION_NAME_LENGTH], Errno> {
    let mut name = GetName { size: size::<GetName>(), reserved: 0, name: [0; SESSION_NAME_LENGTH] };
    // SAFETY: SESSION_GET_NAME reads and writes one GetName.
    let request = unsafe { Updater::<{ uapi::SESSION_GET_NAME }, _>::new(&mut name) };
    call(session, request)?;
    Ok(name.name)
}

fn call(fd: BorrowedFd<'_>, request: impl Ioctl) -> Result<(), Errno> {
    // SAFETY: `request` is the struct that belongs to the number (see each caller). A file of another
    // driver does not know the number: type 0xBA belongs to LUO alone (the kernel's ioctl-number.rst).
    unsafe { ioctl(fd, request) }.map(drop)
}

/// Whether `session` is an incoming session. Asks the kernel to preserve the fd -1: an incoming session
/// refuses the request, an outgoing session refuses the fd.
pub(crate) fn is_incoming(session: BorrowedFd<'_>) -> Result<bool, Errno> {
    const NO_FILE: RawFd = -1;
    match preserve_fd(session, NO_FILE, Token(u64::MAX)) {
        Err(Errno::INVAL) => Ok(true),
        Ok(()) | Err(Errno::BADF | Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// [`preserve_fd`] of a file that is open.
pub(crate) fn preserve(
    session: BorrowedFd<'_>,
    fd: BorrowedFd<'_>,
    token: Token,
) -> Result<(), Errno> {
    preserve_fd(session, fd.as_raw_fd(), token)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_that_is_not_luo_refuses_every_request() {
        let null = File::open("/dev/null").unwrap();
        let fd = null.as_fd();
        let name = SessionName::new("web").unwrap();
        assert_eq!(create_session(fd, &name).unwrap_err(), Errno::NOTTY);
        assert_eq!(retrieve_session(fd, &name).unwrap_err(), Errno::NOTTY);
        assert_eq!(preserve(fd, fd, Token(0)).unwrap_err(), Errno::NOTTY);
        assert_eq!(retrieve_fd(fd, Token(0)).unwrap_err(), Errno::NOTTY);
        assert_eq!(finish(fd).unwrap_err(), Errno::NOTTY);
        assert_eq!(get_name(fd).unwrap_err(), Errno::NOTTY);
        assert_eq!(is_incoming(fd).unwrap_err(), Errno::NOTTY);
    }
}
