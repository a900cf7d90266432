//! A backend of the built-in LUO with real files and simulated processes.
//!
//! Each fd of a simulated process is a real fd: a memfd, or the backend's fd of a session. Copies in
//! other processes and in letters are real duplicates, so that the kernel counts them and reports when
//! a session's last fd is closed. Only fd numbers, their limit, and the memory of requests are
//! simulated. Requests enter the backend where a server of its protocol would make them.

mod backend;
mod process;
mod scripted;
mod together;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use luo::Errno;
use luo::builtin::{Luo, OpenFile};
use rustix::fs::{Mode, OFlags};

use super::fds::Processes;
use super::file::{self, FileCall};
use super::profile::Profile;
use super::system::{Answer, Call, Called, Direction, Fd, Letter, Next, Process, Reopen, System};
pub(crate) use backend::{Backend, KeeperBackend, KexecPoolBackend, PoolBackend};
use process::Opened;
use scripted::ScriptedFiles;

pub(crate) struct Backed<B> {
    backend: B,
    processes: Processes<Opened>,
    files: ScriptedFiles,
}

impl<B: Backend> Backed<B> {
    pub(crate) fn new(backend: B) -> Self {
        let mut system =
            Self { backend, processes: Processes::default(), files: ScriptedFiles::default() };
        system.register();
        system
    }

    fn register(&mut self) {
        let handler = self.files.clone();
        let registered = self.backend.with_luo(&mut |luo| luo.register_handler(handler.clone()));
        registered.expect("a new machine has no such handler");
    }

    fn file(&self, fd: Fd) -> Result<&OwnedFd, Errno> {
        match &self.processes.entry(fd)?.opened {
            Opened::File(file) | Opened::Session(_, file) => Ok(file),
            Opened::Device(_) => Err(Errno::INVAL),
        }
    }

    fn install_file(&mut self, process: Process, file: OwnedFd) -> Result<Answer, Errno> {
        self.processes.install(process, Opened::File(file))
    }

    /// Drops a reference. If it was the last one to the device, closes the device in the machine. The
    /// kernel reports the last close of a session.
    fn put(&mut self, opened: Opened) {
        if let Opened::Device(device) = opened
            && Arc::into_inner(device).is_some()
        {
            self.backend
                .with_luo(&mut |luo| {
                    let _ = luo.close_device();
                    Ok(())
                })
                .unwrap_or_default();
        }
    }

    fn open_again(&mut self, fd: Fd, flags: OFlags) -> Result<Answer, Errno> {
        let path = format!("/proc/self/fd/{}", self.file(fd)?.as_raw_fd());
        let file = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?;
        self.install_file(fd.process, file)
    }

    /// Whether two fds refer to the same open file: whether they share a file position.
    fn is_same_open_file(&self, one: Fd, other: Fd) -> Result<bool, Errno> {
        use rustix::fs::{SeekFrom, seek, tell};
        let (one, other) = (self.file(one)?, self.file(other)?);
        let (before, here) = (tell(other)?, tell(one)?);
        seek(one, SeekFrom::Start(before + 1))?;
        let same = tell(other)? == before + 1;
        seek(one, SeekFrom::Start(here))?;
        Ok(same)
    }
}

impl<B: Backend> System for Backed<B> {
    fn profile(&self) -> &'static Profile {
        B::PROFILE
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
                self.backend.with_luo(&mut Luo::open_device)?;
                self.processes.install(process, Opened::Device(Arc::new(())))
            }
            Call::Open(what) => self.install_file(process, file::open(what)?),
            Call::OpenScripted(object) => {
                let file = self.files.open(object)?.duplicate()?;
                self.install_file(process, file)
            }
            Call::Reopen(number, how) => {
                let flags = match how {
                    Reopen::ReadWrite => OFlags::RDWR,
                    Reopen::ReadOnly => OFlags::RDONLY,
                    Reopen::Path => OFlags::PATH,
                };
                self.open_again(fd(number), flags)
            }
            Call::Dup(number) => {
                let opened = self.processes.entry(fd(number))?.opened.clone();
                self.processes.install(process, opened)
            }
            Call::Close(number) => {
                let opened = self.processes.table(process)?.take(number).ok_or(Errno::BADF)?;
                self.put(opened);
                Ok(Answer::default())
            }
            Call::Ioctl(number, command, argument) => {
                let table = self.processes.table(process)?;
                together::ioctl(&self.backend, table, number, command, argument)
            }
            Call::ClosesOnExec(number) => {
                Ok(Answer::number(self.processes.entry(fd(number))?.closes_on_exec))
            }
            Call::IsSameOpenFile(one, other) => {
                Ok(Answer::number(self.is_same_open_file(fd(one), fd(other))?))
            }
            Call::File(number, FileCall::Watch) => {
                let watch = file::operate(self.file(fd(number))?, FileCall::Watch)?;
                self.install_file(process, file::take(watch.number as i32))
            }
            Call::File(number, call) => file::operate(self.file(fd(number))?, call),
            Call::Together(calls) => {
                let table = self.processes.table(process)?;
                Ok(Answer::each(together::together(&self.backend, table, calls)))
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn direct(&mut self, direction: Direction) -> Result<Vec<Called>, Errno> {
        Ok(direction.give(&self.files.script()))
    }

    fn switch(&mut self, _: Next) -> Result<(), Errno> {
        let processes = &mut self.processes;
        self.backend.switch(&mut || processes.clear())?;
        self.register();
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.backend.liveupdate_number()
    }
}

/// Duplicates the fd of an open file of the machine.
fn fd_of(file: &OpenFile) -> OwnedFd {
    file.as_fd().try_clone_to_owned().expect("the limit of fds suffices")
}
