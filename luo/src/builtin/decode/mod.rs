//! Decodes and answers the ioctl requests of a process on the device and on sessions.
//!
//! The checks are in the order of `kernel/liveupdate/luo_core.c` and `luo_session.c` (Linux 7.3),
//! so that a request with several faults fails with the same errno as in the kernel:
//!
//! 1. the low byte of the number is no request on this kind of fd (device or session): EINVAL
//! 2. the size, the first four bytes of the struct, cannot be read: EFAULT
//! 3. type, direction or size bits of the number are wrong: ENOTTY
//! 4. the session is not of the kind that the request is for: EINVAL
//! 5. the size is less than the struct's: EINVAL
//! 6. the size is more, and a byte behind the struct is not zero (E2BIG) or cannot be read (EFAULT)
//! 7. the struct cannot be read: EFAULT
//!
//! Then the request is executed; a request that returns an fd reserves the fd first. The answer is
//! written back only on success, and only to the struct, not to the bytes behind it. If it cannot
//! be written, the request fails with EFAULT. Then a file stays preserved or retrieved, and a
//! session stays finished, because undoing these would lose something. A session that was created
//! is closed again; a session that was retrieved can be retrieved again (the kernel destroys it;
//! see [`super`]).
//!
//! Requests that the kernel answers without the driver, such as FIOCLEX, are left to the caller.

use rustix::io::Errno;

use super::handler::File;
use super::model::Luo;
use super::session::{SessionId, SessionKind};
use crate::Token;
use crate::uapi::{self, SESSION_NAME_LENGTH};

#[cfg(test)]
mod tests;

/// The process cannot read or write memory at the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the process cannot access memory at this address")]
pub struct Fault;

/// The process that makes a request: its memory, and its fd table.
pub trait Caller<F> {
    /// Reads memory, all of it or none.
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault>;

    /// Writes memory. On a fault, some of the bytes may have been written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// Returns the open file of an fd; `None` if the fd is not open, or was opened with O_PATH.
    fn file(&mut self, fd: i32) -> Option<F>;

    /// Reserves a free fd. EMFILE if none is free.
    fn reserve_fd(&mut self) -> Result<i32, Errno>;

    /// Frees a reserved fd.
    fn release_fd(&mut self, fd: i32);

    /// Makes the file that represents a session, without an fd. Errors: ENFILE, ENOMEM.
    fn open_session(&mut self, session: SessionId) -> Result<(), Errno>;

    /// Drops the file that [`open_session`](Self::open_session) made, without closing the session:
    /// the state machine does that, or makes it retrievable again.
    fn drop_session(&mut self, session: SessionId);

    /// Installs a session's file as a reserved fd, with O_CLOEXEC.
    fn install_session(&mut self, fd: i32, session: SessionId);

    /// Installs a file as a reserved fd, with O_CLOEXEC.
    fn install_file(&mut self, fd: i32, file: F);
}

/// The requests on the device. Compare with `include/uapi/linux/liveupdate.h`.
const DEVICE: [Request; 2] = [
    Request { number: uapi::CREATE_SESSION, size: 72 },
    Request { number: uapi::RETRIEVE_SESSION, size: 72 },
];

/// The requests on a session, each with the only kind of session that allows it; `None` for both.
const SESSION: [(Request, Option<SessionKind>); 4] = [
    (Request { number: uapi::SESSION_PRESERVE_FD, size: 16 }, Some(SessionKind::Outgoing)),
    (Request { number: uapi::SESSION_RETRIEVE_FD, size: 16 }, Some(SessionKind::Incoming)),
    (Request { number: uapi::SESSION_FINISH, size: 8 }, Some(SessionKind::Incoming)),
    (Request { number: uapi::SESSION_GET_NAME, size: 72 }, None),
];

/// The number of a request, and the size of its struct in bytes, which is also the least size that
/// is accepted.
#[derive(Debug, Clone, Copy)]
struct Request {
    number: u32,
    size: usize,
}

impl Request {
    /// Whether `command` has the same low byte as this request.
    fn has_index_of(&self, command: u32) -> bool {
        self.number & 0xff == command & 0xff
    }
}

/// A struct of the process, with the address that the answer is written to.
struct Argument {
    address: u64,
    /// Exactly as many bytes as the struct of the request has.
    bytes: Vec<u8>,
}

impl Argument {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn fd(&self) -> i32 {
        i32::from_le_bytes(self.array(4))
    }

    fn token(&self) -> Token {
        Token(u64::from_le_bytes(self.array(8)))
    }

    fn name(&self) -> [u8; SESSION_NAME_LENGTH] {
        self.array(8)
    }

    /// Returns the bytes at `at`. Panics beyond the end of the struct: its size is in the tables
    /// above.
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes[at..at + N]);
        array
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn respond<F>(&self, caller: &mut impl Caller<F>) -> Result<(), Errno> {
        caller.write(self.address, &self.bytes).map_err(|Fault| Errno::FAULT)
    }
}

impl<F: File> Luo<F> {
    /// Answers a request on the open device. `address` is the third argument of ioctl(2).
    pub fn device_ioctl(
        &mut self,
        caller: &mut impl Caller<F>,
        command: u32,
        address: u64,
    ) -> Result<(), Errno> {
        let request = DEVICE.iter().find(|request| request.has_index_of(command));
        let request = *request.ok_or(Errno::INVAL)?;
        let size = read_size(caller, address)?;
        if command != request.number {
            return Err(Errno::NOTTY);
        }
        let mut argument = read_struct(caller, address, size, request.size)?;
        let fd = caller.reserve_fd()?;
        argument.put(4, &fd.to_le_bytes());
        let answered =
            self.answer_with_session(caller, &argument, request.number == uapi::CREATE_SESSION);
        match answered {
            Ok(session) => caller.install_session(fd, session),
            Err(_) => caller.release_fd(fd),
        }
        answered.map(drop)
    }

    /// Creates or retrieves a session, and writes the answer. If that fails, closes the created
    /// session, or makes the retrieved session retrievable again.
    fn answer_with_session<C: Caller<F>>(
        &mut self,
        caller: &mut C,
        argument: &Argument,
        create: bool,
    ) -> Result<SessionId, Errno> {
        let (name, open) = (argument.name(), |id| caller.open_session(id));
        let session = if create {
            self.create_session(&name, open)?
        } else {
            self.retrieve_session(&name, open)?
        };
        let Err(errno) = argument.respond(caller) else { return Ok(session) };
        caller.drop_session(session);
        if create {
            self.close_session(session)?;
        } else {
            self.return_session(session)?;
        }
        Err(errno)
    }

    /// Answers a request on a session. `address` is the third argument of ioctl(2). EBADF if there
    /// is no such session.
    pub fn session_ioctl(
        &mut self,
        caller: &mut impl Caller<F>,
        session: SessionId,
        command: u32,
        address: u64,
    ) -> Result<(), Errno> {
        let request = SESSION.iter().find(|(request, _)| request.has_index_of(command));
        let (request, kind) = *request.ok_or(Errno::INVAL)?;
        let size = read_size(caller, address)?;
        if command != request.number {
            return Err(Errno::NOTTY);
        }
        let found = self.kind(session)?;
        if kind.is_some_and(|kind| kind != found) {
            return Err(Errno::INVAL);
        }
        let argument = read_struct(caller, address, size, request.size)?;
        match request.number {
            uapi::SESSION_PRESERVE_FD => {
                let file = caller.file(argument.fd());
                self.preserve_fd(session, argument.token(), file)?;
                argument.respond(caller)
            }
            uapi::SESSION_RETRIEVE_FD => self.answer_with_file(caller, session, argument),
            uapi::SESSION_FINISH => {
                check_reserved_is_zero(&argument)?;
                self.finish(session)?;
                argument.respond(caller)
            }
            _ => self.answer_with_name(caller, session, argument),
        }
    }

    fn answer_with_file(
        &mut self,
        caller: &mut impl Caller<F>,
        session: SessionId,
        mut argument: Argument,
    ) -> Result<(), Errno> {
        let fd = caller.reserve_fd()?;
        argument.put(4, &fd.to_le_bytes());
        let file = self.retrieve_fd(session, argument.token());
        match file.and_then(|file| argument.respond(caller).map(|()| file)) {
            Ok(file) => {
                caller.install_file(fd, file);
                Ok(())
            }
            Err(errno) => {
                caller.release_fd(fd);
                Err(errno)
            }
        }
    }

    fn answer_with_name(
        &mut self,
        caller: &mut impl Caller<F>,
        session: SessionId,
        mut argument: Argument,
    ) -> Result<(), Errno> {
        check_reserved_is_zero(&argument)?;
        argument.put(8, &self.session_name(session)?.to_field());
        argument.respond(caller)
    }
}

fn check_reserved_is_zero(argument: &Argument) -> Result<(), Errno> {
    if argument.u32(4) == 0 { Ok(()) } else { Err(Errno::INVAL) }
}

fn read_size<F>(caller: &mut impl Caller<F>, address: u64) -> Result<u64, Errno> {
    let mut size = [0; 4];
    caller.read(address, &mut size).map_err(|Fault| Errno::FAULT)?;
    Ok(u64::from(u32::from_le_bytes(size)))
}

/// Reads the first `known` bytes of a struct of `size` bytes, and checks that the rest is zero.
fn read_struct<F>(
    caller: &mut impl Caller<F>,
    address: u64,
    size: u64,
    known: usize,
) -> Result<Argument, Errno> {
    let known_size = known as u64;
    if size < known_size {
        return Err(Errno::INVAL);
    }
    let end = address.checked_add(size).ok_or(Errno::FAULT)?;
    // `address + known` does not overflow either: `known` is at most `size`.
    expect_zeros(caller, address + known_size, end)?;
    let mut bytes = vec![0; known];
    caller.read(address, &mut bytes).map_err(|Fault| Errno::FAULT)?;
    Ok(Argument { address, bytes })
}

/// Checks that all bytes from `address` to `end` are zero, page by page. E2BIG or EFAULT, whichever
/// comes first: a byte that is not zero, or a page that cannot be read.
fn expect_zeros<F>(caller: &mut impl Caller<F>, mut address: u64, end: u64) -> Result<(), Errno> {
    const PAGE: usize = 4096;
    let mut buffer = [0; PAGE];
    while address < end {
        let in_page = PAGE - (address % PAGE as u64) as usize;
        let length = usize::try_from(end - address).map_or(in_page, |rest| rest.min(in_page));
        let page = &mut buffer[..length];
        caller.read(address, page).map_err(|Fault| Errno::FAULT)?;
        if page.iter().any(|byte| *byte != 0) {
            return Err(Errno::TOOBIG);
        }
        address += length as u64;
    }
    Ok(())
}
