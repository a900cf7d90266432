//! The words in which the cases are told.
//!
//! A [`World`] is a fresh system and one process on it, which does what no case says another does.
//! Every request of the protocol is one method; what comes back is held against what should, and
//! the first difference ends the case.

use luo::Errno;
use luo::uapi;

use crate::system::{Argument, Callback, Deviation, Fd, Place, Process, Script, System};

/// Why a case failed.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self(format!("it answered {errno:?} where it should have succeeded"))
    }
}

/// How a case ends.
pub(crate) type Outcome = Result<(), Failure>;

/// A request that was answered by an errno.
#[track_caller]
pub(crate) fn refused<T>(answer: Result<T, Errno>, errno: Errno) -> Outcome {
    let line = std::panic::Location::caller();
    match answer {
        Err(found) if found == errno => Ok(()),
        Err(found) => Err(Failure(format!("{line}: it answered {found:?}, not {errno:?}"))),
        Ok(_) => Err(Failure(format!("{line}: it succeeded, it should answer {errno:?}"))),
    }
}

/// Two values that should be the same.
#[track_caller]
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Outcome {
    let line = std::panic::Location::caller();
    if found == expected {
        return Ok(());
    }
    Err(Failure(format!("{line}: it is {found:?}, it should be {expected:?}")))
}

/// A system and a process.
pub(crate) struct World {
    pub(crate) system: Box<dyn System>,
    pub(crate) me: Process,
}

impl World {
    pub(crate) fn new(mut system: Box<dyn System>) -> Self {
        let me = system.spawn();
        Self { system, me }
    }

    pub(crate) fn deviates(&self, deviation: Deviation) -> bool {
        self.system.deviates(deviation)
    }

    pub(crate) fn open(&mut self) -> Result<Fd, Errno> {
        self.system.open_device(self.me, false)
    }

    pub(crate) fn close(&mut self, fd: Fd) -> Result<(), Errno> {
        self.system.close(fd)
    }

    pub(crate) fn dup(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.system.dup(fd)
    }

    pub(crate) fn memfd(&mut self, contents: &str) -> Result<Fd, Errno> {
        self.system.memfd(self.me, contents.as_bytes())
    }

    /// A file that does as the script says.
    pub(crate) fn scripted(&mut self, object: u32) -> Result<Fd, Errno> {
        self.system.scripted(self.me, object).ok_or(Errno::OPNOTSUPP)
    }

    pub(crate) fn script(&self) -> Result<Script, Errno> {
        self.system.script().ok_or(Errno::OPNOTSUPP)
    }

    /// What was called since the last time, of a few kinds.
    pub(crate) fn calls(&self, kinds: &[Callback]) -> Result<Vec<(Callback, u32)>, Errno> {
        let calls = self.script()?.take_calls().into_iter();
        let calls = calls.filter(|call| kinds.contains(&call.callback));
        Ok(calls.map(|call| (call.callback, call.object)).collect())
    }

    /// Makes a request and gives back the memory of its argument.
    pub(crate) fn ioctl(
        &mut self,
        fd: Fd,
        command: u32,
        bytes: Vec<u8>,
        place: Place,
    ) -> Result<Vec<u8>, Errno> {
        let mut argument = Argument { bytes, place };
        self.system.ioctl(fd, command, &mut argument)?;
        Ok(argument.bytes)
    }

    pub(crate) fn create(&mut self, device: Fd, name: &[u8]) -> Result<Fd, Errno> {
        self.create_at(device, name, Place::Writable)
    }

    pub(crate) fn create_at(&mut self, device: Fd, name: &[u8], place: Place) -> Result<Fd, Errno> {
        let answer = self.ioctl(device, uapi::CREATE_SESSION, named(72, name), place)?;
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
        let answer = self.ioctl(device, uapi::RETRIEVE_SESSION, named(72, name), place)?;
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

    pub(crate) fn name(&mut self, session: Fd) -> Result<Vec<u8>, Errno> {
        let sent = [words(72, 0), vec![0; 64]].concat();
        let answer = self.ioctl(session, uapi::SESSION_GET_NAME, sent, Place::Writable)?;
        assert_eq!(second(&answer), 0, "`reserved` comes back as 0");
        Ok(answer[8..].split(|byte| *byte == 0).next().unwrap_or_default().to_vec())
    }

    /// A session of this process, made with a device that is closed again.
    pub(crate) fn session(&mut self, name: &str) -> Result<Fd, Errno> {
        let device = self.open()?;
        let session = self.create(device, name.as_bytes());
        self.close(device)?;
        session
    }

    /// A session with a memfd under each token, which holds what is said.
    pub(crate) fn session_with(&mut self, name: &str, files: &[(u64, &str)]) -> Result<Fd, Errno> {
        let session = self.session(name)?;
        for (token, contents) in files {
            let file = self.memfd(contents)?;
            self.preserve(session, file, *token)?;
            self.close(file)?;
        }
        Ok(session)
    }

    /// A session with scripted files, each under its object as token.
    pub(crate) fn scripted_session(&mut self, name: &str, objects: &[u32]) -> Result<Fd, Errno> {
        let session = self.session(name)?;
        for object in objects {
            let file = self.scripted(*object)?;
            self.preserve(session, file, u64::from(*object))?;
        }
        Ok(session)
    }

    /// The incoming session of this name, made with a device that is closed again.
    pub(crate) fn incoming(&mut self, name: &str) -> Result<Fd, Errno> {
        let device = self.open()?;
        let session = self.retrieve_session(device, name.as_bytes());
        self.close(device)?;
        session
    }

    /// A session "web" with such files, after the switch and retrieved.
    pub(crate) fn arrived(&mut self, files: &[(u64, &str)]) -> Result<Fd, Errno> {
        self.session_with("web", files)?;
        self.switch()?;
        self.incoming("web")
    }

    /// Switches; the process after that is another one.
    pub(crate) fn switch(&mut self) -> Result<(), Errno> {
        self.system.switch()?;
        self.me = self.system.spawn();
        Ok(())
    }

    /// What is in a file from its position on.
    pub(crate) fn contents(&mut self, fd: Fd) -> Result<String, Errno> {
        let bytes = self.system.read(fd, 4096)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether a file is preserved: another session cannot have it.
    pub(crate) fn is_preserved(&mut self, fd: Fd) -> Result<bool, Errno> {
        let process = std::mem::replace(&mut self.me, fd.process);
        let probe = self.session("is it preserved?");
        self.me = process;
        let probe = probe?;
        let answer = self.preserve(probe, fd, 0);
        self.close(probe)?;
        match answer {
            Ok(()) => Ok(false),
            Err(Errno::BUSY) => Ok(true),
            Err(errno) => Err(errno),
        }
    }
}

/// Two words: the size and what follows it.
pub(crate) fn words(size: u32, second: i32) -> Vec<u8> {
    [size.to_le_bytes(), second.to_le_bytes()].concat()
}

/// An argument with a name field, 72 bytes, whatever its size says.
pub(crate) fn named(size: u32, name: &[u8]) -> Vec<u8> {
    let mut field = [0; 64];
    field[..name.len()].copy_from_slice(name);
    [&words(size, -1)[..], &field].concat()
}

/// An argument with a token, 16 bytes, whatever its size says.
pub(crate) fn tokened(size: u32, fd: i32, token: u64) -> Vec<u8> {
    [&words(size, fd)[..], &token.to_le_bytes()].concat()
}

/// The second word of an argument.
pub(crate) fn second(bytes: &[u8]) -> i32 {
    i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])
}
