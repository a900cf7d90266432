//! The operations from which the cases are built.
//!
//! A [`World`] is a system and one process on it, which makes every call for which a case names no other
//! process. Every request of the protocol is one method. [`same`] and [`refused`] compare the result
//! with the expected one; the first difference ends the case. If several cases share one system, each
//! adds its own suffix to the names of its sessions ([`World::scoped`]).

use std::collections::BTreeSet;

use luo::Errno;
use luo::uapi;

use super::file::{FileCall, What};
use super::profile::{Deviation, Need};
use super::system::{
    Answer, Argument, Call, Callback, Called, Direction, Fd, Letter, NEXT_KERNEL_DIED, Next, Place,
    Process, Reopen, System,
};

/// Why a case failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure(pub(crate) String);

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self(format!("the call failed with {errno:?}, it should succeed"))
    }
}

/// The result of a case.
pub(crate) type Outcome = Result<(), Failure>;

/// Errors unless a request failed with this errno.
#[track_caller]
pub(crate) fn refused<T>(answer: Result<T, Errno>, errno: Errno) -> Outcome {
    let line = std::panic::Location::caller();
    match answer {
        Err(found) if found == errno => Ok(()),
        Err(found) => {
            Err(Failure(format!("{line}: the call failed with {found:?}, not {errno:?}")))
        }
        Ok(_) => Err(Failure(format!("{line}: the call succeeded, it should fail with {errno:?}"))),
    }
}

/// Errors unless the two values are equal.
#[track_caller]
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Outcome {
    let line = std::panic::Location::caller();
    if found == expected {
        return Ok(());
    }
    Err(Failure(format!("{line}: found {found:?}, expected {expected:?}")))
}

/// A system and the process that runs a case.
pub(crate) struct World {
    system: Box<dyn System>,
    pub(crate) me: Process,
    scope: String,
    deviated: BTreeSet<Deviation>,
}

impl World {
    pub(crate) fn new(system: Box<dyn System>) -> Self {
        Self::scoped(system, String::new())
    }

    /// A world that appends `scope` to every session name.
    pub(crate) fn scoped(mut system: Box<dyn System>, scope: String) -> Self {
        let me = system.spawn();
        Self { system, me, scope, deviated: BTreeSet::new() }
    }

    /// Whether the system has this deviation. If it has, that is recorded for the table of results.
    pub(crate) fn deviates(&mut self, deviation: Deviation) -> bool {
        let deviates = self.system.profile().deviations.contains(&deviation);
        if deviates {
            self.deviated.insert(deviation);
        }
        deviates
    }

    /// The deviations that the case found.
    pub(crate) fn deviated(self) -> BTreeSet<Deviation> {
        self.deviated
    }

    /// Whether the system has a feature.
    pub(crate) fn has(&self, need: Need) -> bool {
        self.system.profile().lacks(need).is_none()
    }

    // --- processes -----------------------------------------------------------------------------

    pub(crate) fn spawn(&mut self) -> Process {
        self.system.spawn()
    }

    pub(crate) fn fork(&mut self, process: Process) -> Process {
        self.system.fork(process)
    }

    pub(crate) fn kill(&mut self, process: Process) {
        self.system.kill(process);
    }

    pub(crate) fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        self.system.send(fd)
    }

    pub(crate) fn receive(&mut self, letter: Letter, by: Process) -> Result<Fd, Errno> {
        self.system.receive(letter, Some(by)).ok_or(Errno::BADF)
    }

    pub(crate) fn lose(&mut self, letter: Letter) {
        self.system.receive(letter, None);
    }

    pub(crate) fn call(&mut self, call: Call) -> Result<Answer, Errno> {
        self.system.call(self.me, call)
    }

    fn call_for_fd(&mut self, process: Process, call: Call) -> Result<Fd, Errno> {
        let answer = self.system.call(process, call)?;
        Ok(Fd { process, number: answer.number as i32 })
    }

    pub(crate) fn limit_fds(&mut self, limited: bool) -> Result<(), Errno> {
        self.call(Call::LimitFds(limited)).map(drop)
    }

    // --- files ---------------------------------------------------------------------------------

    pub(crate) fn open(&mut self) -> Result<Fd, Errno> {
        self.open_in(self.me, false)
    }

    pub(crate) fn open_in(&mut self, process: Process, read_only: bool) -> Result<Fd, Errno> {
        self.call_for_fd(process, Call::OpenDevice { read_only })
    }

    pub(crate) fn close(&mut self, fd: Fd) -> Result<(), Errno> {
        self.system.call(fd.process, Call::Close(fd.number)).map(drop)
    }

    pub(crate) fn dup(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.call_for_fd(fd.process, Call::Dup(fd.number))
    }

    pub(crate) fn reopen(&mut self, fd: Fd, how: Reopen) -> Result<Fd, Errno> {
        self.call_for_fd(fd.process, Call::Reopen(fd.number, how))
    }

    pub(crate) fn memfd(&mut self, contents: &str) -> Result<Fd, Errno> {
        self.memfd_in(self.me, contents)
    }

    pub(crate) fn memfd_in(&mut self, process: Process, contents: &str) -> Result<Fd, Errno> {
        let fd = self.call_for_fd(process, Call::Open(What::Memfd))?;
        if !contents.is_empty() {
            self.write_at(fd, 0, contents)?;
        }
        Ok(fd)
    }

    /// A new file of any kind.
    pub(crate) fn file(&mut self, what: What) -> Result<Fd, Errno> {
        self.call_for_fd(self.me, Call::Open(what))
    }

    /// A scripted file with this object number ([`World::fail`]).
    pub(crate) fn scripted(&mut self, object: u32) -> Result<Fd, Errno> {
        self.call_for_fd(self.me, Call::OpenScripted(object))
    }

    /// Performs an operation on a file and returns its number.
    pub(crate) fn on(&mut self, fd: Fd, call: FileCall) -> Result<i64, Errno> {
        Ok(self.system.call(fd.process, Call::File(fd.number, call))?.number)
    }

    /// Performs an operation on a file and returns its bytes.
    pub(crate) fn bytes_of(&mut self, fd: Fd, call: FileCall) -> Result<Vec<u8>, Errno> {
        Ok(self.system.call(fd.process, Call::File(fd.number, call))?.bytes)
    }

    /// Reads up to `length` bytes at the file position, and advances the position.
    pub(crate) fn read(&mut self, fd: Fd, length: usize) -> Result<Vec<u8>, Errno> {
        self.bytes_of(fd, FileCall::Read(length))
    }

    /// The contents of a file from its position, at most 4096 bytes.
    pub(crate) fn contents(&mut self, fd: Fd) -> Result<String, Errno> {
        let bytes = self.read(fd, 4096)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Writes the whole text at an offset.
    pub(crate) fn write_at(&mut self, fd: Fd, offset: u64, text: &str) -> Result<(), Errno> {
        let written = self.on(fd, FileCall::WriteAt(offset, text.as_bytes().to_vec()))?;
        if written == text.len() as i64 { Ok(()) } else { Err(Errno::IO) }
    }

    pub(crate) fn closes_on_exec(&mut self, fd: Fd) -> Result<bool, Errno> {
        let answer = self.system.call(fd.process, Call::ClosesOnExec(fd.number))?;
        Ok(answer.number != 0)
    }

    pub(crate) fn is_same_open_file(&mut self, one: Fd, other: Fd) -> Result<bool, Errno> {
        assert_eq!(one.process, other.process, "fds of different processes cannot be compared");
        let call = Call::IsSameOpenFile(one.number, other.number);
        Ok(self.system.call(one.process, call)?.number != 0)
    }

    // --- the script ----------------------------------------------------------------------------

    pub(crate) fn fail(&mut self, callback: Callback, object: u32, errno: Errno) -> Outcome {
        let fail = Direction::Fail(callback, object, errno.raw_os_error());
        Ok(self.system.direct(fail).map(drop)?)
    }

    pub(crate) fn mend(&mut self, callback: Callback, object: u32) -> Outcome {
        Ok(self.system.direct(Direction::Mend(callback, object)).map(drop)?)
    }

    /// The callbacks of these kinds since the last call of this method, in their order.
    pub(crate) fn calls(&mut self, kinds: &[Callback]) -> Result<Vec<Called>, Errno> {
        let mut calls = self.system.direct(Direction::Tell)?;
        calls.retain(|(callback, _)| kinds.contains(callback));
        Ok(calls)
    }

    // --- requests ------------------------------------------------------------------------------

    /// Makes a request and returns the contents of its argument afterwards.
    pub(crate) fn ioctl(
        &mut self,
        fd: Fd,
        command: u32,
        bytes: Vec<u8>,
        place: Place,
    ) -> Result<Vec<u8>, Errno> {
        let call = Call::Ioctl(fd.number, command, Argument { bytes, place });
        Ok(self.system.call(fd.process, call)?.bytes)
    }

    /// A session name with this world's suffix, as the system receives it. Invalid names stay unchanged.
    pub(crate) fn full_name(&self, name: &[u8]) -> Vec<u8> {
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        let scoped = [&name[..end], self.scope.as_bytes(), &name[end..]].concat();
        let is_name = end > 0 && scoped.len() < uapi::SESSION_NAME_LENGTH;
        if is_name { scoped } else { name.to_vec() }
    }

    pub(crate) fn create(&mut self, device: Fd, name: &[u8]) -> Result<Fd, Errno> {
        self.create_at(device, name, Place::Writable)
    }

    pub(crate) fn create_at(&mut self, device: Fd, name: &[u8], place: Place) -> Result<Fd, Errno> {
        let sent = named(72, &self.full_name(name));
        let answer = self.ioctl(device, uapi::CREATE_SESSION, sent, place)?;
        Ok(Fd { process: device.process, number: second(&answer) })
    }

    pub(crate) fn retrieve_session(&mut self, device: Fd, name: &[u8]) -> Result<Fd, Errno> {
        self.retrieve_session_at(device, name, Place::Writable)
    }

    pub(crate) fn retrieve_session_at(
        &mut self,
        device: Fd,
        name: &[u8],
        place: Place,
    ) -> Result<Fd, Errno> {
        let sent = named(72, &self.full_name(name));
        let answer = self.ioctl(device, uapi::RETRIEVE_SESSION, sent, place)?;
        Ok(Fd { process: device.process, number: second(&answer) })
    }

    pub(crate) fn preserve(&mut self, session: Fd, file: Fd, token: u64) -> Result<(), Errno> {
        self.preserve_at(session, file.number, token, Place::Writable)
    }

    pub(crate) fn preserve_at(
        &mut self,
        session: Fd,
        file: i32,
        token: u64,
        place: Place,
    ) -> Result<(), Errno> {
        let sent = tokened(16, file, token);
        let answer = self.ioctl(session, uapi::SESSION_PRESERVE_FD, sent.clone(), place)?;
        assert_eq!(answer, sent, "the struct comes back unchanged");
        Ok(())
    }

    pub(crate) fn retrieve(&mut self, session: Fd, token: u64) -> Result<Fd, Errno> {
        self.retrieve_at(session, token, Place::Writable)
    }

    pub(crate) fn retrieve_at(
        &mut self,
        session: Fd,
        token: u64,
        place: Place,
    ) -> Result<Fd, Errno> {
        let sent = tokened(16, -1, token);
        let answer = self.ioctl(session, uapi::SESSION_RETRIEVE_FD, sent, place)?;
        Ok(Fd { process: session.process, number: second(&answer) })
    }

    pub(crate) fn finish(&mut self, session: Fd) -> Result<(), Errno> {
        self.finish_with(session, 0, Place::Writable)
    }

    pub(crate) fn finish_with(
        &mut self,
        session: Fd,
        reserved: i32,
        place: Place,
    ) -> Result<(), Errno> {
        self.ioctl(session, uapi::SESSION_FINISH, words(8, reserved), place).map(drop)
    }

    /// The name of a session, without this world's suffix.
    pub(crate) fn name(&mut self, session: Fd) -> Result<Vec<u8>, Errno> {
        let sent = [words(72, 0), vec![0; 64]].concat();
        let answer = self.ioctl(session, uapi::SESSION_GET_NAME, sent, Place::Writable)?;
        assert_eq!(second(&answer), 0, "`reserved` comes back as 0");
        let name = answer[8..].split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(name.strip_suffix(self.scope.as_bytes()).unwrap_or(name).to_vec())
    }

    // --- common first steps of cases -----------------------------------------------------------

    /// Creates a session of this process; opens the device for it and closes it again.
    pub(crate) fn session(&mut self, name: &str) -> Result<Fd, Errno> {
        self.session_in(self.me, name)
    }

    fn session_in(&mut self, process: Process, name: &str) -> Result<Fd, Errno> {
        let device = self.open_in(process, false)?;
        let session = self.create(device, name.as_bytes());
        self.close(device)?;
        session
    }

    /// Creates a session with a memfd of the given contents under each token.
    pub(crate) fn session_with(&mut self, name: &str, files: &[(u64, &str)]) -> Result<Fd, Errno> {
        let session = self.session(name)?;
        for (token, contents) in files {
            let file = self.memfd(contents)?;
            self.preserve(session, file, *token)?;
            self.close(file)?;
        }
        Ok(session)
    }

    /// Creates a session "web" with this file under token 1.
    pub(crate) fn session_of(&mut self, file: Fd) -> Result<Fd, Errno> {
        let session = self.session("web")?;
        self.preserve(session, file, 1)?;
        Ok(session)
    }

    /// Creates a session with scripted files, each under its object number as token.
    pub(crate) fn scripted_session(&mut self, name: &str, objects: &[u32]) -> Result<Fd, Errno> {
        let session = self.session(name)?;
        for object in objects {
            let file = self.scripted(*object)?;
            self.preserve(session, file, u64::from(*object))?;
        }
        Ok(session)
    }

    /// Retrieves the incoming session of this name; opens the device for it and closes it again.
    pub(crate) fn incoming(&mut self, name: &str) -> Result<Fd, Errno> {
        let device = self.open()?;
        let session = self.retrieve_session(device, name.as_bytes());
        self.close(device)?;
        session
    }

    /// Creates a session "web" with these files, switches, and retrieves the session.
    pub(crate) fn arrived(&mut self, files: &[(u64, &str)]) -> Result<Fd, Errno> {
        self.session_with("web", files)?;
        self.switch()?;
        self.incoming("web")
    }

    /// Preserves a file, switches, and retrieves the file.
    pub(crate) fn carried(&mut self, file: Fd) -> Result<Fd, Errno> {
        self.session_of(file)?;
        self.switch()?;
        let session = self.incoming("web")?;
        self.retrieve(session, 1)
    }

    /// Switches to the next kernel. Afterwards [`World::me`] is a new process.
    pub(crate) fn switch(&mut self) -> Result<(), Errno> {
        self.switch_to(Next::Kernel)
    }

    pub(crate) fn switch_to(&mut self, next: Next) -> Result<(), Errno> {
        self.system.switch(next)?;
        self.me = self.system.spawn();
        Ok(())
    }

    pub(crate) fn liveupdate_number(&self) -> u64 {
        self.system.liveupdate_number()
    }

    /// Switches, and errors unless the next kernel rejects the handover with a panic.
    #[track_caller]
    pub(crate) fn switch_to_death(&mut self) -> Outcome {
        refused(self.switch(), NEXT_KERNEL_DIED)?;
        let words = self.system.last_words().unwrap_or_default();
        match words.contains("The incoming tree failed to initialize properly [-22]") {
            true => Ok(()),
            false => Err(Failure(format!("the next kernel ended with another panic: {words:?}"))),
        }
    }

    pub(crate) fn change_memory(
        &mut self,
        offset: usize,
        old: &str,
        new: &str,
    ) -> Result<usize, Errno> {
        self.system.change_memory(offset, old.as_bytes(), new.as_bytes())
    }

    /// Whether a file is preserved: then a second session cannot preserve it.
    pub(crate) fn is_preserved(&mut self, fd: Fd) -> Result<bool, Errno> {
        let probe = self.session_in(fd.process, "is it preserved?")?;
        let answer = self.preserve(probe, fd, 0);
        self.close(probe)?;
        match answer {
            Ok(()) => Ok(false),
            Err(Errno::BUSY) => Ok(true),
            Err(errno) => Err(errno),
        }
    }

    /// Makes these calls of this process at the same time, and returns the answer of each.
    pub(crate) fn together(
        &mut self,
        calls: Vec<Call>,
    ) -> Result<Vec<Result<Answer, Errno>>, Errno> {
        let each = self.call(Call::Together(calls))?.each;
        Ok(each.into_iter().map(|one| one.map_err(Errno::from_raw_os_error)).collect())
    }
}

/// The call that makes a request with a writable argument.
pub(crate) fn request(fd: Fd, command: u32, bytes: Vec<u8>) -> Call {
    Call::Ioctl(fd.number, command, Argument { bytes, place: Place::Writable })
}

/// The first two words of an argument: its size, and the word after it.
pub(crate) fn words(size: u32, second: i32) -> Vec<u8> {
    [size.to_le_bytes(), second.to_le_bytes()].concat()
}

/// An argument with a name field: always 72 bytes, even if `size` differs.
pub(crate) fn named(size: u32, name: &[u8]) -> Vec<u8> {
    let mut field = [0; 64];
    field[..name.len()].copy_from_slice(name);
    [&words(size, -1)[..], &field].concat()
}

/// An argument with a token: always 16 bytes, even if `size` differs.
pub(crate) fn tokened(size: u32, fd: i32, token: u64) -> Vec<u8> {
    [&words(size, fd)[..], &token.to_le_bytes()].concat()
}

/// The second word of an argument.
pub(crate) fn second(bytes: &[u8]) -> i32 {
    i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])
}
