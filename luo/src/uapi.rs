//! The kernel's interface. Compare it with `include/uapi/linux/liveupdate.h` (Linux 7.3).
//!
//! Every request is `_IO(0xBA, nr)`, without direction or size bits, and takes a pointer to a
//! struct whose first field is its own size in bytes. No logic here.

/// The ioctl type of every request (`LIVEUPDATE_IOCTL_TYPE`).
pub const IOCTL_TYPE: u32 = 0xBA;

/// Size of a session's name in bytes, with the terminating NUL
/// (`LIVEUPDATE_SESSION_NAME_LENGTH`).
pub const SESSION_NAME_LENGTH: usize = 64;

/// Path of the device, on a kernel with LUO.
pub const DEVICE: &str = "/dev/liveupdate";

/// The kernel's `_IO(LIVEUPDATE_IOCTL_TYPE, nr)`.
const fn io(nr: u32) -> u32 {
    (IOCTL_TYPE << 8) | nr
}

/// `LIVEUPDATE_IOCTL_CREATE_SESSION`, on the device, with [`NamedSession`].
pub const CREATE_SESSION: u32 = io(0x00);
/// `LIVEUPDATE_IOCTL_RETRIEVE_SESSION`, on the device, with [`NamedSession`].
pub const RETRIEVE_SESSION: u32 = io(0x01);
/// `LIVEUPDATE_SESSION_PRESERVE_FD`, on an outgoing session, with [`TokenedFd`].
pub const SESSION_PRESERVE_FD: u32 = io(0x40);
/// `LIVEUPDATE_SESSION_RETRIEVE_FD`, on an incoming session, with [`TokenedFd`].
pub const SESSION_RETRIEVE_FD: u32 = io(0x41);
/// `LIVEUPDATE_SESSION_FINISH`, on an incoming session, with [`Finish`].
pub const SESSION_FINISH: u32 = io(0x42);
/// `LIVEUPDATE_SESSION_GET_NAME`, on a session of either kind, with [`GetName`].
pub const SESSION_GET_NAME: u32 = io(0x43);

/// `struct liveupdate_ioctl_create_session` and `struct liveupdate_ioctl_retrieve_session`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NamedSession {
    /// Size of this struct in bytes.
    pub size: u32,
    /// Out: the session's fd, with O_CLOEXEC.
    pub fd: i32,
    /// In: the name, NUL-terminated.
    pub name: [u8; SESSION_NAME_LENGTH],
}

/// `struct liveupdate_session_preserve_fd` and `struct liveupdate_session_retrieve_fd`.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
pub struct TokenedFd {
    /// Size of this struct in bytes.
    pub size: u32,
    /// In for preserve: the file. Out for retrieve: a new fd of it, with O_CLOEXEC.
    pub fd: i32,
    /// In: the key of the file in the session.
    pub token: u64,
}

/// `struct liveupdate_session_finish`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Finish {
    /// Size of this struct in bytes.
    pub size: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// `struct liveupdate_session_get_name`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GetName {
    /// Size of this struct in bytes.
    pub size: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Out: the name, NUL-terminated; bytes after the NUL have no meaning.
    pub name: [u8; SESSION_NAME_LENGTH],
}

const _: () = {
    use std::mem::{align_of, offset_of, size_of};

    assert!(size_of::<NamedSession>() == 72 && align_of::<NamedSession>() == 4);
    assert!(offset_of!(NamedSession, fd) == 4 && offset_of!(NamedSession, name) == 8);
    assert!(size_of::<TokenedFd>() == 16 && align_of::<TokenedFd>() == 8);
    assert!(offset_of!(TokenedFd, fd) == 4 && offset_of!(TokenedFd, token) == 8);
    assert!(size_of::<Finish>() == 8 && offset_of!(Finish, reserved) == 4);
    assert!(size_of::<GetName>() == 72 && offset_of!(GetName, name) == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_have_the_numbers_of_the_header() {
        let numbers = [
            CREATE_SESSION,
            RETRIEVE_SESSION,
            SESSION_PRESERVE_FD,
            SESSION_RETRIEVE_FD,
            SESSION_FINISH,
            SESSION_GET_NAME,
        ];
        assert_eq!(numbers, [0xBA00, 0xBA01, 0xBA40, 0xBA41, 0xBA42, 0xBA43]);
    }
}
