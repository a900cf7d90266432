//! Requests, as they come from a process: a number, an address, and memory that may not be there.
//!
//! The checks come in the order of `kernel/liveupdate/luo_core.c` and `luo_session.c` (Linux 7.3), so
//! that a request with several faults is answered by the same one:
//!
//! 1. the low byte of the number is not a request of this file: EINVAL
//! 2. the size, the first four bytes of the struct, cannot be read: EFAULT
//! 3. type, direction or size bits of the number are wrong: ENOTTY
//! 4. the session is not of the kind that the request is for: EINVAL
//! 5. the size is less than the struct's: EINVAL
//! 6. it is more, and a byte behind the struct is not zero (E2BIG) or cannot be read (EFAULT)
//! 7. the struct cannot be read: EFAULT
//!
//! Then the request is executed; a free fd is looked for before anything else. The answer goes back
//! only on success, and only as far as the struct reaches. If it cannot be written the answer is
//! EFAULT, and what was done stays done where undoing it would lose something: a file stays
//! preserved or retrieved, a session finished. A session that was created is closed again, one
//! that was retrieved is returned (the kernel destroys it; see [`super`]).
//!
//! What the kernel answers before the driver is asked (FIOCLEX and its like) is left to the caller.

use rustix::io::Errno;

use super::handler::File;
use super::model::Luo;
use super::session::{Kind, SessionId};
use crate::Token;
use crate::uapi::{self, SESSION_NAME_LENGTH};

#[cfg(test)]
mod tests;

/// The address is not one that the process can read, or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the process has no such memory")]
pub struct Fault;

/// The process that makes a request: its memory, and its table of fds.
pub trait Caller<F> {
    /// Reads memory, all of it or none.
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault>;

    /// Writes memory. What is written before a fault is undefined.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// The open file behind an fd, unless it is none or was opened with O_PATH.
    fn file(&mut self, fd: i32) -> Option<F>;

    /// Finds a free fd and reserves it. EMFILE: there is none.
    fn reserve_fd(&mut self) -> Result<i32, Errno>;

    /// Gives a reserved fd back.
    fn release_fd(&mut self, fd: i32);

    /// Makes the file that stands for a session, not yet behind any fd. ENFILE, ENOMEM.
    fn open_session(&mut self, session: SessionId) -> Result<(), Errno>;

    /// Drops the file that [`open_session`](Self::open_session) made. The machine closes or returns
    /// the session itself.
    fn drop_session(&mut self, session: SessionId);

    /// Puts a session's file behind a reserved fd, with O_CLOEXEC.
    fn install_session(&mut self, fd: i32, session: SessionId);

    /// Puts a file behind a reserved fd, with O_CLOEXEC.
    fn install_file(&mut self, fd: i32, file: F);
}

/// A request on the device, to be proofread beside the header.
const DEVICE: [Request; 2] = [
    Request { number: uapi::CREATE_SESSION, size: 72 },
    Request { number: uapi::RETRIEVE_SESSION, size: 72 },
];

/// A request on a session, and the kind it is for, if for one only.
const SESSION: [(Request, Option<Kind>); 4] = [
    (Request { number: uapi::SESSION_PRESERVE_FD, size: 16 }, Some(Kind::Outgoing)),
    (Request { number: uapi::SESSION_RETRIEVE_FD, size: 16 }, Some(Kind::Incoming)),
    (Request { number: uapi::SESSION_FINISH, size: 8 }, Some(Kind::Incoming)),
    (Request { number: uapi::SESSION_GET_NAME, size: 72 }, None),
];

/// The number of a request, and the size of its struct, which is also the least that is taken.
#[derive(Debug, Clone, Copy)]
struct Request {
    number: u32,
    size: usize,
}

impl Request {
    /// Whether the low byte of `command` is this request's.
    fn has_index_of(&self, command: u32) -> bool {
        self.number & 0xff == command & 0xff
    }
}

/// A struct that was read, and where its answer goes.
struct Argument {
    address: u64,
    /// What the process says its struct has; never less than the struct.
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

    /// The bytes at `at`, all of which are in the struct: the table above says how long it is.
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
    /// Answers a request on the open device. `address` is its third argument.
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
            self.make_and_tell(caller, &argument, request.number == uapi::CREATE_SESSION);
        match answered {
            Ok(session) => caller.install_session(fd, session),
            Err(_) => caller.release_fd(fd),
        }
        answered.map(drop)
    }

    /// Creates or retrieves a session. One that the caller cannot be told of is closed, or returned.
    fn make_and_tell<C: Caller<F>>(
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

    /// Answers a request on a session. `address` is its third argument. EBADF: no such session.
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
            uapi::SESSION_RETRIEVE_FD => self.retrieve_fd_and_tell(caller, session, argument),
            uapi::SESSION_FINISH => {
                refuse_reserved(&argument)?;
                self.finish(session)?;
                argument.respond(caller)
            }
            _ => self.tell_name(caller, session, argument),
        }
    }

    fn retrieve_fd_and_tell(
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

    fn tell_name(
        &mut self,
        caller: &mut impl Caller<F>,
        session: SessionId,
        mut argument: Argument,
    ) -> Result<(), Errno> {
        refuse_reserved(&argument)?;
        argument.put(8, &self.session_name(session)?.to_field());
        argument.respond(caller)
    }
}

fn refuse_reserved(argument: &Argument) -> Result<(), Errno> {
    if argument.u32(4) == 0 { Ok(()) } else { Err(Errno::INVAL) }
}

fn read_size<F>(caller: &mut impl Caller<F>, address: u64) -> Result<u64, Errno> {
    let mut size = [0; 4];
    caller.read(address, &mut size).map_err(|Fault| Errno::FAULT)?;
    Ok(u64::from(u32::from_le_bytes(size)))
}

/// Reads a struct of `known` bytes from one of `size` bytes.
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
    // `known` fits as well: it is not more than `size`.
    expect_zeros(caller, address + known_size, end)?;
    let mut bytes = vec![0; known];
    caller.read(address, &mut bytes).map_err(|Fault| Errno::FAULT)?;
    Ok(Argument { address, bytes })
}

/// Reads from `address` to `end` page by page: the first byte that is not zero, or not there, says
/// what the answer is.
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
