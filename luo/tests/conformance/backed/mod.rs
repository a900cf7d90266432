//! A backend of the built-in LUO with real files, and processes around it that are not there.
//!
//! What a process has are real fds: memfds, and the fds that stand for sessions. Their copies, in other
//! processes and in letters, are copies that the kernel counts, so that it is the kernel which says
//! when a session ends. Only the numbers of fds, their limit, and the memory of requests are made
//! up. The backend itself is asked as by who serves its protocol to others.

mod backend;
mod process;
mod scripted;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::{Luo, OpenFile, SessionId};
use rustix::fs::{MemfdFlags, Mode, OFlags};

use crate::system::{Argument, Deviation, Fd, Letter, Process, Script, System};
pub(crate) use backend::{Backend, KeeperBackend, PoolBackend};
use process::{Entry, Opened, Request, Table};
use scripted::ScriptedFiles;

pub(crate) struct Backed<B> {
    backend: B,
    processes: BTreeMap<Process, Table>,
    last_process: u32,
    letters: BTreeMap<usize, Entry>,
    files: ScriptedFiles,
}

impl<B: Backend> Backed<B> {
    pub(crate) fn new(backend: B) -> Self {
        let mut system = Self {
            backend,
            processes: BTreeMap::new(),
            last_process: 0,
            letters: BTreeMap::new(),
            files: ScriptedFiles::default(),
        };
        system.register();
        system
    }

    fn register(&mut self) {
        let handler = self.files.clone();
        let registered =
            self.backend.with_machine(&mut |luo| luo.register_handler(handler.clone()));
        registered.expect("the machine is new");
    }

    fn table(&mut self, process: Process) -> Result<&mut Table, Errno> {
        self.processes.get_mut(&process).ok_or(Errno::SRCH)
    }

    fn entry(&self, fd: Fd) -> Result<&Entry, Errno> {
        let table = self.processes.get(&fd.process).ok_or(Errno::SRCH)?;
        table.get(fd.number).ok_or(Errno::BADF)
    }

    fn file(&self, fd: Fd) -> Result<&OwnedFd, Errno> {
        match &self.entry(fd)?.opened {
            Opened::File(file) | Opened::Session(_, file) => Ok(file),
            Opened::Device(_) => Err(Errno::INVAL),
        }
    }

    fn install(&mut self, process: Process, opened: Opened) -> Result<Fd, Errno> {
        let table = self.table(process)?;
        let number = table.reserve()?;
        table.put(number, Entry { opened, closes_on_exec: false });
        Ok(Fd { process, number })
    }

    fn install_file(&mut self, process: Process, file: OwnedFd) -> Result<Fd, Errno> {
        self.install(process, Opened::File(file))
    }

    /// Drops a reference. The last one to the device is told to the machine; of a session's the
    /// kernel tells.
    fn put(&mut self, entry: Entry) {
        if let Opened::Device(device) = entry.opened
            && Arc::into_inner(device).is_some()
        {
            self.backend
                .with_machine(&mut |luo| {
                    let _ = luo.close_device();
                    Ok(())
                })
                .unwrap_or_default();
        }
    }

    fn open_again(&mut self, fd: Fd, flags: OFlags) -> Result<Fd, Errno> {
        let path = format!("/proc/self/fd/{}", self.file(fd)?.as_raw_fd());
        let file = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?;
        self.install_file(fd.process, file)
    }
}

impl<B: Backend> System for Backed<B> {
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
        let table = self.processes.get(&process).map(Table::copy).unwrap_or_default();
        let child = self.spawn();
        self.processes.insert(child, table);
        child
    }

    fn kill(&mut self, process: Process) {
        let table = self.processes.remove(&process).unwrap_or_default();
        table.into_entries().for_each(|entry| self.put(entry));
    }

    fn limit_fds(&mut self, process: Process, limited: bool) {
        if let Ok(table) = self.table(process) {
            table.limit(limited);
        }
    }

    fn open_device(&mut self, process: Process, _read_only: bool) -> Result<Fd, Errno> {
        self.backend.with_machine(&mut Luo::open_device)?;
        self.install(process, Opened::Device(Arc::new(())))
    }

    fn memfd(&mut self, process: Process, contents: &[u8]) -> Result<Fd, Errno> {
        let file = rustix::fs::memfd_create("case", MemfdFlags::CLOEXEC | MemfdFlags::EXEC)?;
        assert_eq!(rustix::io::pwrite(&file, contents, 0)?, contents.len());
        self.install_file(process, file)
    }

    fn reopen(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.open_again(fd, OFlags::RDWR)
    }

    fn reopen_as_path(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.open_again(fd, OFlags::PATH)
    }

    fn unsupported(&mut self, process: Process) -> Result<Fd, Errno> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        self.install_file(process, null)
    }

    fn scripted(&mut self, process: Process, object: u32) -> Option<Fd> {
        let file = self.files.open(object).ok()?.duplicate().ok()?;
        self.install_file(process, file).ok()
    }

    fn script(&self) -> Option<Script> {
        Some(self.files.script())
    }

    fn dup(&mut self, fd: Fd) -> Result<Fd, Errno> {
        let opened = self.entry(fd)?.copy().opened;
        self.install(fd.process, opened)
    }

    fn close(&mut self, fd: Fd) -> Result<(), Errno> {
        let entry = self.table(fd.process)?.take(fd.number).ok_or(Errno::BADF)?;
        self.put(entry);
        Ok(())
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        let entry = self.entry(fd)?.copy();
        let number = self.letters.keys().next_back().map_or(0, |last| last + 1);
        self.letters.insert(number, entry);
        Ok(Letter(number))
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        let entry = self.letters.remove(&letter.0)?;
        match by {
            Some(process) => self.install(process, entry.opened).ok(),
            None => {
                self.put(entry);
                None
            }
        }
    }

    fn ioctl(&mut self, fd: Fd, command: u32, argument: &mut Argument) -> Result<(), Errno> {
        let session: Option<SessionId> = match self.entry(fd)?.opened {
            Opened::Device(_) => None,
            Opened::Session(id, _) => Some(id),
            Opened::File(_) => return Err(Errno::NOTTY),
        };
        let table = self.processes.get_mut(&fd.process).ok_or(Errno::SRCH)?;
        let open = |id| self.backend.open_session(id);
        let mut request = Request::new(table, argument, &open);
        let address = request.address();
        self.backend.with_machine(&mut |luo| match session {
            None => luo.device_ioctl(&mut request, command, address),
            Some(id) => luo.session_ioctl(&mut request, id, command, address),
        })
    }

    fn closes_on_exec(&self, fd: Fd) -> Result<bool, Errno> {
        self.entry(fd).map(|entry| entry.closes_on_exec)
    }

    /// They are if they have one position.
    fn is_same_open_file(&self, one: Fd, other: Fd) -> Result<bool, Errno> {
        use rustix::fs::{SeekFrom, seek, tell};
        let (one, other) = (self.file(one)?, self.file(other)?);
        let (before, here) = (tell(other)?, tell(one)?);
        seek(one, SeekFrom::Start(before + 1))?;
        let same = tell(other)? == before + 1;
        seek(one, SeekFrom::Start(here))?;
        Ok(same)
    }

    fn read(&mut self, fd: Fd, length: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; length];
        let read = rustix::io::read(self.file(fd)?, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    fn write_at(&mut self, fd: Fd, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let written = rustix::io::pwrite(self.file(fd)?, bytes, offset as u64)?;
        if written == bytes.len() { Ok(()) } else { Err(Errno::IO) }
    }

    fn switch(&mut self) -> Result<(), Errno> {
        let (processes, letters) = (&mut self.processes, &mut self.letters);
        self.backend.switch(&mut || {
            processes.clear();
            letters.clear();
        })?;
        self.register();
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.backend.liveupdate_number()
    }
}

/// An open file of the machine as an fd of a process.
fn fd_of(file: &OpenFile) -> OwnedFd {
    file.as_fd().try_clone_to_owned().expect("the test may have that many fds")
}
