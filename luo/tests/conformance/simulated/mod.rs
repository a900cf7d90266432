//! The state machine of the built-in LUO with processes around it that are not there.
//!
//! fds are tables of counted open files, memory is a request's own bytes, and files are a few values
//! in [`files`]. The machine gets from it what a kernel would tell it: requests, and the last close
//! of the device and of each session.

mod files;
mod process;

use std::collections::BTreeMap;

use luo::Errno;
use luo::builtin::{Compatible, Luo, Parameters};

use crate::system::{Argument, Deviation, Fd, Letter, Process, Script, System};
use files::{Carried, MemfdHandler, OpenFile, ScriptedFiles, What};
use process::{Entry, Request, Table};

pub(crate) struct Simulated {
    luo: Luo<OpenFile>,
    carried: Carried,
    script: Script,
    processes: BTreeMap<Process, Table>,
    last_process: u32,
    letters: BTreeMap<usize, OpenFile>,
}

impl Simulated {
    pub(crate) fn new() -> Self {
        let (carried, script) = (Carried::default(), Script::new());
        Self {
            luo: start(Err(Errno::NOENT), &carried, &script),
            carried,
            script,
            processes: BTreeMap::new(),
            last_process: 0,
            letters: BTreeMap::new(),
        }
    }

    fn table(&mut self, process: Process) -> Result<&mut Table, Errno> {
        self.processes.get_mut(&process).ok_or(Errno::SRCH)
    }

    fn opened(&self, fd: Fd) -> Result<&OpenFile, Errno> {
        let table = self.processes.get(&fd.process).ok_or(Errno::SRCH)?;
        table.get(fd.number).map(|entry| &entry.opened).ok_or(Errno::BADF)
    }

    fn install(&mut self, process: Process, opened: OpenFile) -> Result<Fd, Errno> {
        let table = self.table(process)?;
        let number = table.reserve()?;
        table.put(number, Entry { opened, closes_on_exec: false });
        Ok(Fd { process, number })
    }

    /// Drops a reference. The last one to the device or a session is told to the machine.
    fn put(&mut self, opened: OpenFile) {
        if !opened.is_last() {
            return;
        }
        let closed = match opened.what {
            What::Device => self.luo.close_device(),
            What::Session(session) => self.luo.close_session(session),
            _ => Ok(()),
        };
        // The kernel ignores what a release says, too.
        let _ = closed;
    }
}

fn start(tree: Result<Vec<u8>, Errno>, carried: &Carried, script: &Script) -> Luo<OpenFile> {
    let mut luo = Luo::start(Parameters::default(), || tree);
    luo.register_handler(MemfdHandler::new(carried.clone())).expect("the machine is enabled");
    let format = Compatible::new("scripted-v1").expect("it is short");
    let scripted = ScriptedFiles(script.handler(format, &[1], true));
    luo.register_handler(scripted).expect("it is another format");
    luo
}

impl System for Simulated {
    fn deviates(&self, deviation: Deviation) -> bool {
        matches!(deviation, Deviation::SessionIsReturned)
    }

    fn spawn(&mut self) -> Process {
        self.last_process += 1;
        let process = Process(self.last_process);
        self.processes.insert(process, Table::default());
        process
    }

    fn fork(&mut self, process: Process) -> Process {
        let table = self.processes.get(&process).cloned().unwrap_or_default();
        let child = self.spawn();
        self.processes.insert(child, table);
        child
    }

    fn kill(&mut self, process: Process) {
        let table = self.processes.remove(&process).unwrap_or_default();
        table.into_entries().for_each(|entry| self.put(entry.opened));
    }

    fn limit_fds(&mut self, process: Process, limited: bool) {
        if let Ok(table) = self.table(process) {
            table.limit(limited);
        }
    }

    fn open_device(&mut self, process: Process, _read_only: bool) -> Result<Fd, Errno> {
        self.luo.open_device()?;
        self.install(process, OpenFile::new(What::Device))
    }

    fn memfd(&mut self, process: Process, contents: &[u8]) -> Result<Fd, Errno> {
        self.install(process, OpenFile::memfd(contents))
    }

    fn reopen(&mut self, fd: Fd) -> Result<Fd, Errno> {
        let what = self.opened(fd)?.what.clone();
        self.install(fd.process, OpenFile::new(what))
    }

    fn reopen_as_path(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.opened(fd)?;
        self.install(fd.process, OpenFile::new(What::Path))
    }

    fn unsupported(&mut self, process: Process) -> Result<Fd, Errno> {
        self.install(process, OpenFile::new(What::Null))
    }

    fn scripted(&mut self, process: Process, object: u32) -> Option<Fd> {
        let file = self.script.open(1, object);
        self.install(process, OpenFile::new(What::Scripted(file))).ok()
    }

    fn script(&self) -> Option<Script> {
        Some(self.script.clone())
    }

    fn dup(&mut self, fd: Fd) -> Result<Fd, Errno> {
        let opened = self.opened(fd)?.clone();
        self.install(fd.process, opened)
    }

    fn close(&mut self, fd: Fd) -> Result<(), Errno> {
        let entry = self.table(fd.process)?.take(fd.number).ok_or(Errno::BADF)?;
        self.put(entry.opened);
        Ok(())
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        let opened = self.opened(fd)?.clone();
        let number = self.letters.keys().next_back().map_or(0, |last| last + 1);
        self.letters.insert(number, opened);
        Ok(Letter(number))
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        let opened = self.letters.remove(&letter.0)?;
        match by {
            Some(process) => self.install(process, opened).ok(),
            None => {
                self.put(opened);
                None
            }
        }
    }

    fn ioctl(&mut self, fd: Fd, command: u32, argument: &mut Argument) -> Result<(), Errno> {
        let what = self.opened(fd)?.what.clone();
        let table = self.processes.get_mut(&fd.process).ok_or(Errno::SRCH)?;
        let mut request = Request::new(table, argument);
        let address = request.address();
        match what {
            What::Device => self.luo.device_ioctl(&mut request, command, address),
            What::Session(id) => self.luo.session_ioctl(&mut request, id, command, address),
            _ => Err(Errno::NOTTY),
        }
    }

    fn closes_on_exec(&self, fd: Fd) -> Result<bool, Errno> {
        let table = self.processes.get(&fd.process).ok_or(Errno::SRCH)?;
        table.get(fd.number).map(|entry| entry.closes_on_exec).ok_or(Errno::BADF)
    }

    fn is_same_open_file(&self, one: Fd, other: Fd) -> Result<bool, Errno> {
        Ok(self.opened(one)? == self.opened(other)?)
    }

    fn read(&mut self, fd: Fd, length: usize) -> Result<Vec<u8>, Errno> {
        self.opened(fd)?.read(length)
    }

    fn write_at(&mut self, fd: Fd, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.opened(fd)?.write_at(offset, bytes)
    }

    fn switch(&mut self) -> Result<(), Errno> {
        let mut tree = Vec::new();
        self.luo.reboot(|bytes| {
            tree = bytes.to_vec();
            Ok(())
        })?;
        self.processes.clear();
        self.letters.clear();
        self.luo = start(Ok(tree), &self.carried, &self.script);
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.luo.liveupdate_number()
    }
}
