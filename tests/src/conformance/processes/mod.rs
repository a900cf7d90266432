//! A [`System`] of real processes that use a `/dev/liveupdate`: the kernel's, or the one that
//! `perennial luo emulate` serves.
//!
//! One agent is started; each further process is a fork of an agent. Every agent has its own connection
//! to this process, over which it gets one order at a time.

pub(crate) mod agent;
mod arena;
mod cgroup;
mod wire;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use luo::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use super::machine::kernel;
use super::profile::{self, Profile};
use super::system::{Answer, Call, Called, Direction, Fd, Letter, Next, Process, System, Who};
pub(crate) use cgroup::ROOT as CGROUPS;
use wire::{Hello, Order};

/// The implementation of the device.
#[derive(Debug, Clone)]
pub(crate) enum Device {
    /// The running kernel.
    Kernel,
    /// An emulator: the paths of `perennial` and of the program that it runs.
    Emulated { perennial: PathBuf, agent: PathBuf },
}

/// An agent.
struct Agent {
    control: OwnedFd,
    process: OwnedFd,
}

/// The agents, and the child process that started the first one.
pub(crate) struct Processes {
    device: Device,
    started: Child,
    listener: Option<OwnedFd>,
    _directory: TempDir,
    agents: BTreeMap<Process, Agent>,
    first: Process,
    last: u32,
    letters: Vec<Option<OwnedFd>>,
    number: u64,
}

/// Waits until one of the fds is readable and returns its index. `None` after 120 s.
fn wait_for(fds: &[&OwnedFd]) -> Option<usize> {
    // Far longer than needed, so that a hanging test ends.
    let limit = Timespec { tv_sec: 120, tv_nsec: 0 };
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::IN)).collect();
    poll(&mut polled, Some(&limit)).ok()?;
    polled.iter().position(|fd| !fd.revents().is_empty())
}

fn command(device: &Device, socket: &Path) -> Command {
    let mut command = match device {
        Device::Kernel => Command::new("/proc/self/exe"),
        Device::Emulated { perennial, agent } => {
            let mut command = Command::new(perennial);
            command.args(["luo", "emulate", "--"]).arg(agent);
            command
        }
    };
    command.arg(agent::ROLE).arg(socket);
    command
}

impl Processes {
    pub(crate) fn start(device: Device) -> Result<Self, Errno> {
        let directory = TempDir::new().map_err(|_| Errno::IO)?;
        let path = directory.path().join("agents");
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&listener, &SocketAddrUnix::new(&path)?)?;
        listen(&listener, 16)?;
        let number = match device {
            Device::Kernel => kernel::liveupdate_number(),
            Device::Emulated { .. } => 0,
        };
        let started = command(&device, &path).spawn().map_err(|_| Errno::NOENT)?;
        let mut this = Self {
            device,
            started,
            listener: Some(listener),
            _directory: directory,
            agents: BTreeMap::new(),
            first: Process(0),
            last: 0,
            letters: Vec::new(),
            number,
        };
        this.first = this.accept();
        Ok(this)
    }

    /// Waits for an agent's connection and its hello.
    fn accept_agent(&mut self) -> Agent {
        let listener = self.listener.as_ref().expect("the listener is open until the drop");
        wait_for(&[listener]).expect("the agent should connect");
        let control = accept_with(listener, SocketFlags::CLOEXEC).expect("a connection waits");
        let (Hello { pid, number }, _) =
            wire::receive(&control).expect("an agent sends a hello first");
        let pid = Pid::from_raw(pid as i32).expect("a pid is not 0");
        let process = pidfd_open(pid, PidfdFlags::empty()).expect("the agent lives");
        self.number = number.unwrap_or(self.number);
        Agent { control, process }
    }

    fn accept(&mut self) -> Process {
        let agent = self.accept_agent();
        self.last += 1;
        self.agents.insert(Process(self.last), agent);
        Process(self.last)
    }

    fn agent(&self, process: Process) -> Result<&Agent, Errno> {
        self.agents.get(&process).ok_or(Errno::SRCH)
    }

    fn order(
        &self,
        process: Process,
        order: &Order,
        fd: Option<&OwnedFd>,
    ) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let control = &self.agent(process)?.control;
        wire::send(control, order, fd.map(AsFd::as_fd)).expect("the agent listens");
        wait_for(&[control]).expect("the agent should answer");
        let (answer, fd) = wire::receive::<Result<Answer, i32>>(control)?;
        Ok((answer.map_err(Errno::from_raw_os_error)?, fd))
    }

    fn child(&mut self, of: Process, order: &Order) -> Process {
        let control = &self.agent(of).expect("a case forks processes that live").control;
        wire::send(control, order, None).expect("the agent listens");
        self.accept()
    }

    fn exec(&mut self, process: Process) -> Result<Answer, Errno> {
        wire::send(&self.agent(process)?.control, &Order::Call(Call::Exec), None)?;
        let agent = self.accept_agent();
        self.agents.insert(process, agent);
        Ok(Answer::default())
    }

    /// Ends the emulator's generation, and waits for the first agent of the next one.
    fn switch_emulated(&mut self) -> Result<(), Errno> {
        match self.order(self.first, &Order::Call(Call::Reboot(Who::Root)), None) {
            // The connection broke: the agent has ended, and all others with it.
            Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(errno) => return Err(errno),
            Ok(_) => return Err(Errno::ALREADY),
        }
        self.agents.clear();
        self.letters.clear();
        self.first = self.accept();
        Ok(())
    }
}

impl System for Processes {
    fn profile(&self) -> &'static Profile {
        match self.device {
            Device::Kernel => &profile::KERNEL,
            Device::Emulated { .. } => &profile::EMULATOR,
        }
    }

    fn spawn(&mut self) -> Process {
        self.child(self.first, &Order::Spawn)
    }

    fn fork(&mut self, process: Process) -> Process {
        self.child(process, &Order::Fork)
    }

    fn kill(&mut self, process: Process) {
        let Some(agent) = self.agents.remove(&process) else { return };
        pidfd_send_signal(&agent.process, Signal::KILL).expect("the agent lives");
        // When the pidfd becomes readable, the process's fds are closed.
        wait_for(&[&agent.process]).expect("the agent should end");
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        let (_, sent) = self.order(fd.process, &Order::Send(fd.number), None)?;
        self.letters.push(sent);
        Ok(Letter(self.letters.len() - 1))
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        let fd = self.letters.get_mut(letter.0)?.take()?;
        let process = by?;
        let (answer, _) = self.order(process, &Order::Receive, Some(&fd)).ok()?;
        Some(Fd { process, number: answer.number as i32 })
    }

    fn call(&mut self, process: Process, call: Call) -> Result<Answer, Errno> {
        match call {
            Call::Exec => self.exec(process),
            call => Ok(self.order(process, &Order::Call(call), None)?.0),
        }
    }

    fn direct(&mut self, _: Direction) -> Result<Vec<Called>, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn switch(&mut self, next: Next) -> Result<(), Errno> {
        match self.device {
            Device::Kernel => Err(kernel::enter(next)),
            Device::Emulated { .. } => self.switch_emulated(),
        }
    }

    fn liveupdate_number(&self) -> u64 {
        self.number
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // The first agent ends when its connection or the listener is closed, and the emulator ends with
        // the agent.
        self.agents.clear();
        self.listener = None;
        let _ = self.started.wait();
    }
}
