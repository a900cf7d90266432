//! The state machine of the built-in LUO with simulated processes.
//!
//! An fd is an entry in a table of reference-counted open files, the memory of a process is the bytes of
//! its request, and files are the values in [`files`]. The machine receives what a kernel would pass to
//! it: requests, and the last close of the device and of each session.

mod files;
mod process;

use luo::Errno;
use luo::builtin::scripted::Script;
use luo::builtin::{Compatible, Luo, Parameters};

use super::fds::Processes;
use super::file::{self, FileCall};
use super::profile::{self, Profile};
use super::request::Request;
use super::system::{
    Answer, Argument, Call, Called, Direction, Fd, Letter, Next, Process, Reopen, System,
};
use files::{Carried, MemfdHandler, OpenFile, ScriptedFiles, What};
use process::SimulatedFiles;

pub(crate) struct Simulated {
    luo: Luo<OpenFile>,
    carried: Carried,
    script: Script,
    processes: Processes<OpenFile>,
}

impl Simulated {
    pub(crate) fn new() -> Self {
        let (carried, script) = (Carried::default(), Script::new());
        Self {
            luo: start(Err(Errno::NOENT), &carried, &script),
            carried,
            script,
            processes: Processes::default(),
        }
    }

    fn opened(&self, fd: Fd) -> Result<&OpenFile, Errno> {
        Ok(&self.processes.entry(fd)?.opened)
    }

    fn ioctl(&mut self, fd: Fd, command: u32, mut argument: Argument) -> Result<Answer, Errno> {
        let what = self.opened(fd)?.what.clone();
        let table = self.processes.table(fd.process)?;
        let sent = argument.bytes.clone();
        let mut request = Request::new(SimulatedFiles, table, &mut argument);
        let address = request.address();
        let result = match what {
            What::Device => self.luo.device_ioctl(&mut request, command, address),
            What::Session(id) => self.luo.session_ioctl(&mut request, id, command, address),
            _ => Err(Errno::NOTTY),
        };
        argument.answer(result, &sent)
    }

    /// Drops a reference. If it was the last one to the device or a session, closes that in the machine.
    fn put(&mut self, opened: OpenFile) {
        if !opened.is_last() {
            return;
        }
        let closed = match opened.what {
            What::Device => self.luo.close_device(),
            What::Session(session) => self.luo.close_session(session),
            _ => Ok(()),
        };
        // The kernel ignores the result of a release as well.
        let _ = closed;
    }
}

fn start(tree: Result<Vec<u8>, Errno>, carried: &Carried, script: &Script) -> Luo<OpenFile> {
    let mut luo = Luo::start(Parameters::default(), || tree);
    luo.register_handler(MemfdHandler::new(carried.clone())).expect("the machine is enabled");
    let format = Compatible::new("scripted-v1").expect("the name is short");
    let scripted = ScriptedFiles(script.handler(format, &[1], true));
    luo.register_handler(scripted).expect("its format is not registered yet");
    luo
}

impl System for Simulated {
    fn profile(&self) -> &'static Profile {
        &profile::MACHINE
    }

    fn spawn(&mut self) -> Process {
        self.processes.spawn()
    }

    fn fork(&mut self, process: Process) -> Process {
        self.processes.fork(process)
    }

    fn kill(&mut self, process: Process) {
        self.processes.kill(process).for_each(|opened| self.put(opened));
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        self.processes.send(fd)
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        self.processes.receive(letter, by).unwrap_or_else(|unread| {
            self.put(unread);
            None
        })
    }

    fn call(&mut self, process: Process, call: Call) -> Result<Answer, Errno> {
        let fd = |number| Fd { process, number };
        match call {
            Call::LimitFds(limited) => {
                self.processes.table(process)?.limit(limited);
                Ok(Answer::default())
            }
            Call::OpenDevice { read_only: _ } => {
                self.luo.open_device()?;
                self.processes.install(process, OpenFile::new(What::Device))
            }
            Call::Open(file::What::Memfd) => self.processes.install(process, OpenFile::memfd()),
            Call::Open(file::What::Null) => {
                self.processes.install(process, OpenFile::new(What::Null))
            }
            Call::OpenScripted(object) => {
                let file = self.script.open(1, object);
                self.processes.install(process, OpenFile::new(What::Scripted(file)))
            }
            Call::Reopen(number, how) => {
                let what = match how {
                    Reopen::Path => What::Path,
                    Reopen::ReadWrite | Reopen::ReadOnly => self.opened(fd(number))?.what.clone(),
                };
                self.processes.install(process, OpenFile::new(what))
            }
            Call::Dup(number) => {
                let opened = self.opened(fd(number))?.clone();
                self.processes.install(process, opened)
            }
            Call::Close(number) => {
                let opened = self.processes.table(process)?.take(number).ok_or(Errno::BADF)?;
                self.put(opened);
                Ok(Answer::default())
            }
            Call::Ioctl(number, command, argument) => self.ioctl(fd(number), command, argument),
            Call::ClosesOnExec(number) => {
                Ok(Answer::number(self.processes.entry(fd(number))?.closes_on_exec))
            }
            Call::IsSameOpenFile(one, other) => {
                Ok(Answer::number(self.opened(fd(one))? == self.opened(fd(other))?))
            }
            Call::File(number, FileCall::Read(length)) => {
                self.opened(fd(number))?.read(length).map(Answer::bytes)
            }
            Call::File(number, FileCall::WriteAt(offset, bytes)) => {
                let written = self.opened(fd(number))?.write_at(offset as usize, &bytes)?;
                Ok(Answer::number(written as i64))
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn direct(&mut self, direction: Direction) -> Result<Vec<Called>, Errno> {
        Ok(direction.give(&self.script))
    }

    fn switch(&mut self, _: Next) -> Result<(), Errno> {
        let mut tree = Vec::new();
        self.luo.reboot(|bytes| {
            tree = bytes.to_vec();
            Ok(())
        })?;
        self.processes.clear();
        self.luo = start(Ok(tree), &self.carried, &self.script);
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.luo.liveupdate_number()
    }
}
