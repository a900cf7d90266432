//! The ioctls themselves, one function each. Nothing else in this crate is unsafe.
//!
//! Each function hands the kernel a struct of `uapi` that says its own size, and takes over the fd
//! that the kernel made for it. What an errno means is said in `error`.
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

/// Makes an outgoing session on the device.
pub(crate) fn create_session(device: BorrowedFd<'_>, name: &SessionName) -> Result<OwnedFd, Errno> {
    let mut session = NamedSession { size: size::<NamedSession>(), fd: -1, name: name.to_array() };
    // SAFETY: CREATE_SESSION reads and writes one NamedSession.
    let request = unsafe { Updater::<{ uapi::CREATE_SESSION }, _>::new(&mut session) };
    call(device, request)?;
    // SAFETY: the kernel just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(session.fd) })
}

/// Takes an incoming session from the device. The struct is writable, as it must be: a response
/// that the kernel cannot deliver destroys the session.
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

/// Preserves the file behind `fd`, any number, in an outgoing session.
pub(crate) fn preserve_fd(session: BorrowedFd<'_>, fd: RawFd, token: Token) -> Result<(), Errno> {
    let mut file = TokenedFd { size: size::<TokenedFd>(), fd, token: token.0 };
    // SAFETY: SESSION_PRESERVE_FD reads and writes one TokenedFd. It borrows the fd.
    let request = unsafe { Updater::<{ uapi::SESSION_PRESERVE_FD }, _>::new(&mut file) };
    call(session, request)
}

/// A new fd of a file in an incoming session.
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

/// The name of a session of either kind. Bytes after its NUL mean nothing.
pub(crate) fn get_name(session: BorrowedFd<'_>) -> Result<[u8; SESSION_NAME_LENGTH], Errno> {
    let mut name = GetName { size: size::<GetName>(), reserved: 0, name: [0; SESSION_NAME_LENGTH] };
    // SAFETY: SESSION_GET_NAME reads and writes one GetName.
    let request = unsafe { Updater::<{ uapi::SESSION_GET_NAME }, _>::new(&mut name) };
    call(session, request)?;
    Ok(name.name)
}

fn call(fd: BorrowedFd<'_>, request: impl Ioctl) -> Result<(), Errno> {
    // SAFETY: the request holds the struct that its number promises (see each caller). A file that
    // is not LUO's could take the number for another request of its own: type 0xBA is LUO's alone
    // in the kernel's ioctl-number.rst.
    unsafe { ioctl(fd, request) }.map(drop)
}

/// Whether `session` is an incoming one. The kernel is asked to preserve no file at all: an
/// incoming session refuses the request as such, an outgoing one the missing file.
pub(crate) fn is_incoming(session: BorrowedFd<'_>) -> Result<bool, Errno> {
    const NO_FILE: RawFd = -1;
    match preserve_fd(session, NO_FILE, Token(u64::MAX)) {
        Err(Errno::INVAL) => Ok(true),
        Ok(()) | Err(Errno::BADF | Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// [`preserve_fd`] of a file that is surely open.
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
