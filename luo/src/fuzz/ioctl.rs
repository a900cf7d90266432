//! The requests of a hostile process that controls its memory, over several generations.
//!
//! | step (mod 8) | arguments | action |
//! |---|---|---|
//! | 0 | command u32, address u16, fds u8 | a request on the device |
//! | 1 | session u8, command u32, address u16, fds u8 | a request on a session |
//! | 2 | offset u16, a piece | the process writes to its memory |
//! | 3 | session u8 | a session is closed |
//! | 4 | finalize bool | a reboot |
//! | 5 | kind u8, object u8 | the process opens a file; every fd refers to it from now on |
//! | 6 | callback u8, object u8, fail bool | a callback of a handler starts or stops to fail |
//! | 7 | which u8 | the device is opened or closed, a session is returned, or the last file is closed |

use std::collections::BTreeSet;

use perennial_fuzz::Script;

use crate::Errno;
use crate::builtin::decode::{Caller, Fault};
use crate::builtin::scripted::{Callback, Script as Handlers, ScriptedFile};
use crate::builtin::tree::v1;
use crate::builtin::{Compatible, Limits, Luo, Parameters, SessionId, SessionKind};

const LIMITS: Limits = Limits { sessions: 6, sessions_errno: Errno::NOSPC, files: 4 };
/// Address and size of the process's memory, in bytes. The first half is read-only.
const MEMORY: (u64, usize) = (0x1000, 0x400);
/// Callbacks that can be made to fail.
const BREAKABLE: [Callback; 6] = [
    Callback::CanPreserve,
    Callback::Preserve,
    Callback::Freeze,
    Callback::Retrieve,
    Callback::CanFinish,
    Callback::FlbPreserve,
];

/// The errnos that a request may return.
const ANSWERS: [Errno; 14] = [
    Errno::INVAL,
    Errno::FAULT,
    Errno::NOTTY,
    Errno::TOOBIG,
    Errno::MFILE,
    Errno::NFILE,
    Errno::EXIST,
    Errno::NOENT,
    Errno::NOSPC,
    Errno::BADF,
    Errno::BUSY,
    Errno::SHUTDOWN,
    Errno::NOMEM,
    Errno::OPNOTSUPP,
];

/// Executes a script, and checks that the answers of the state machine agree with the fds and files
/// that it gave out.
pub fn ioctl(input: &[u8]) {
    let mut script = Script::new(input);
    let mut world = World::new();
    while let Some(step) = script.step() {
        world.step(step % 8, &mut script);
    }
    world.reboot(true);
}

struct World {
    handlers: Handlers,
    luo: Luo<ScriptedFile>,
    process: Process,
    /// Sessions of this generation that have an fd.
    sessions: Vec<SessionId>,
}

/// The simulated process.
struct Process {
    memory: Vec<u8>,
    file: Option<ScriptedFile>,
    free_fds: u8,
    reserved: BTreeSet<i32>,
    opened: BTreeSet<SessionId>,
    installed: Vec<SessionId>,
}

impl Process {
    fn at(address: u64, length: usize) -> Result<std::ops::Range<usize>, Fault> {
        let start = address.checked_sub(MEMORY.0).and_then(|at| usize::try_from(at).ok());
        let start = start.ok_or(Fault)?;
        let end = start.checked_add(length).filter(|end| *end <= MEMORY.1).ok_or(Fault)?;
        Ok(start..end)
    }

    fn take(&mut self, fd: i32) {
        assert!(self.reserved.remove(&fd), "fd {fd} was not reserved");
    }
}

impl Caller<ScriptedFile> for Process {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        bytes.copy_from_slice(&self.memory[Self::at(address, bytes.len())?]);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let range = Self::at(address, bytes.len())?;
        if range.start < MEMORY.1 / 2 {
            return Err(Fault);
        }
        self.memory[range].copy_from_slice(bytes);
        Ok(())
    }

    fn file(&mut self, fd: i32) -> Option<ScriptedFile> {
        self.file.filter(|_| fd >= 0)
    }

    fn reserve_fd(&mut self) -> Result<i32, Errno> {
        self.free_fds = self.free_fds.checked_sub(1).ok_or(Errno::MFILE)?;
        let fd = i32::from(self.free_fds);
        self.reserved.insert(fd);
        Ok(fd)
    }

    fn release_fd(&mut self, fd: i32) {
        self.take(fd);
    }

    fn open_session(&mut self, session: SessionId) -> Result<(), Errno> {
        // One in four sessions gets no file.
        if self.free_fds % 4 == 3 {
            return Err(Errno::NFILE);
        }
        assert!(self.opened.insert(session), "the session already has a file");
        Ok(())
    }

    fn drop_session(&mut self, session: SessionId) {
        assert!(self.opened.remove(&session), "the session has no file");
    }

    fn install_session(&mut self, fd: i32, session: SessionId) {
        self.take(fd);
        assert!(self.opened.contains(&session), "a session without a file is installed");
        self.installed.push(session);
    }

    fn install_file(&mut self, fd: i32, file: ScriptedFile) {
        self.take(fd);
        self.file = Some(file);
    }
}

fn start(handlers: &Handlers, tree: Result<Vec<u8>, Errno>) -> Luo<ScriptedFile> {
    let mut luo = Luo::start(Parameters { limits: LIMITS, ..Parameters::default() }, || tree);
    let format = |name| Compatible::new(name).unwrap();
    let flb = luo.register_flb(handlers.flb(format("shared-v1"), 0x100)).unwrap();
    for (name, kinds, by_object) in [("object-v1", [1], true), ("open-v1", [2], false)] {
        let handler = luo.register_handler(handlers.handler(format(name), &kinds, by_object));
        luo.bind_flb(handler.unwrap(), flb).unwrap();
    }
    luo.open_device().unwrap();
    luo
}

impl World {
    fn new() -> Self {
        let handlers = Handlers::new();
        let luo = start(&handlers, Err(Errno::NOENT));
        let process = Process {
            memory: vec![0; MEMORY.1],
            file: None,
            free_fds: 0,
            reserved: BTreeSet::new(),
            opened: BTreeSet::new(),
            installed: Vec::new(),
        };
        Self { handlers, luo, process, sessions: Vec::new() }
    }

    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        match step {
            0 => {
                let (command, address) = (script.u32(), script.u16());
                let answer = self.request(script, |luo, process| {
                    luo.device_ioctl(process, command, address.into())
                });
                if answer == Err(Errno::EXIST) {
                    assert!(self.has_session_named_at(address.into()), "EEXIST for a free name");
                }
            }
            1 => {
                let Some(session) = self.session(script) else { return };
                let (command, address) = (script.u32(), script.u16());
                let _ = self.request(script, |luo, process| {
                    luo.session_ioctl(process, session, command, address.into())
                });
            }
            2 => {
                let at = usize::from(script.u16()) % MEMORY.1;
                let piece = script.piece();
                self.process.memory.iter_mut().skip(at).zip(piece).for_each(|(to, is)| *to = *is);
            }
            3 => {
                let Some(session) = self.session(script) else { return };
                self.sessions.retain(|other| *other != session);
                self.process.opened.remove(&session);
                let closed = self.luo.close_session(session);
                assert!(matches!(closed, Ok(()) | Err(Errno::BUSY)), "{closed:?}");
                assert_eq!(self.luo.kind(session), Err(Errno::BADF));
            }
            4 => self.reboot(script.bool()),
            5 => {
                let (kind, object) = (script.u8() % 4, script.u8() % 8);
                self.process.file = Some(self.handlers.open(kind.into(), object.into()));
            }
            6 => {
                let callback = BREAKABLE[usize::from(script.u8()) % BREAKABLE.len()];
                let object = u32::from(script.u8() % 8);
                match script.bool() {
                    true => self.handlers.fail(callback, object, Errno::NOMEM),
                    false => self.handlers.mend(callback, object),
                }
            }
            _ => match script.u8() % 4 {
                0 => drop(self.luo.open_device()),
                1 => drop(self.luo.close_device()),
                2 => self.process.file = None,
                _ => self.return_a_session(script),
            },
        }
    }

    /// Returns a session, as the emulator does if it cannot install a file for the session.
    fn return_a_session(&mut self, script: &mut Script<'_>) {
        let Some(session) = self.session(script) else { return };
        if self.luo.return_session(session).is_ok() {
            self.sessions.retain(|other| *other != session);
            self.process.opened.remove(&session);
        }
    }

    fn session(&self, script: &mut Script<'_>) -> Option<SessionId> {
        let index = usize::from(script.u8());
        (!self.sessions.is_empty()).then(|| self.sessions[index % self.sessions.len()])
    }

    /// Whether an outgoing session has the name in the struct at `address`.
    fn has_session_named_at(&self, address: u64) -> bool {
        let name = &self.process.memory[Process::at(address + 8, 64).unwrap()];
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        self.sessions.iter().any(|session| {
            self.luo.kind(*session) == Ok(SessionKind::Outgoing)
                && self.luo.session_name(*session).unwrap().as_bytes() == name
        })
    }

    /// Executes a request with the number of free fds that the script gives.
    fn request(
        &mut self,
        script: &mut Script<'_>,
        ask: impl FnOnce(&mut Luo<ScriptedFile>, &mut Process) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let Self { luo, process, sessions, .. } = self;
        process.free_fds = script.u8();
        let before = process.memory.clone();
        let answer = ask(luo, process);
        assert_eq!(process.reserved, BTreeSet::new(), "{answer:?}: an fd stays reserved");
        if let Err(errno) = answer {
            assert!(ANSWERS.contains(&errno), "{errno:?}");
            assert_eq!(process.memory, before, "{errno:?}: an error wrote to memory");
            assert_eq!(process.installed, [], "{errno:?}: an error installed a session");
        }
        sessions.append(&mut process.installed);
        assert_eq!(process.opened, sessions.iter().copied().collect(), "files and sessions differ");
        for session in sessions {
            luo.kind(*session).unwrap();
            luo.session_name(*session).unwrap();
        }
        answer
    }

    /// Reboots, and starts the next generation if the reboot succeeds.
    fn reboot(&mut self, finalize: bool) {
        let mut tree = None;
        let answer = self.luo.reboot(|bytes| {
            tree = Some(bytes.to_vec());
            if finalize { Ok(()) } else { Err(Errno::IO) }
        });
        match (answer, tree) {
            (Ok(()), Some(tree)) => {
                let handover = v1::decode(&tree).unwrap();
                assert!(handover.sessions.len() <= LIMITS.sessions);
                self.luo = start(&self.handlers, Ok(tree));
                self.sessions.clear();
                self.process.opened.clear();
                self.process.file = None;
            }
            (answer, _) => {
                assert!(matches!(answer, Err(Errno::NOMEM | Errno::AGAIN)), "{answer:?}");
                assert!(!self.luo.is_handed_over());
            }
        }
        self.handlers.take_calls();
    }
}
