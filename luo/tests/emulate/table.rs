//! The conformance table with real processes: a [`System`] of agents under the emulator.
//!
//! The emulator starts an agent; each further process is a fork of one. Every agent has its own
//! connection to the test, by which it gets its orders one at a time.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use luo::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::agent;
use crate::rows::{self, Row};
use crate::supervise;
use crate::system::{Argument, Deviation, Fd, Letter, Place, Process, Script, System};
use crate::wire::{self, Order, Packet};
use crate::world::World;

/// Rows that are not told here, and why.
const ELSEWHERE: &[(&[u16], &str)] = &[
    (&[114, 115, 145, 165, 170], "it needs files that fail when they are told to"),
    (
        &[180, 181, 182, 183, 184, 185, 186, 187, 188, 189, 190],
        "it is about bytes, not about processes",
    ),
];

pub(crate) fn trials(lacks: Option<&str>) -> Vec<Trial> {
    let told = |row: &&Row| !ELSEWHERE.iter().any(|(numbers, _)| numbers.contains(&row.number));
    let trial = |row: &'static Row| {
        let Row { number, class, what, run } = row;
        crate::trial(format!("table: case {number:03} {what}"), lacks, move || {
            let system = Real::start().map_err(|error| Failed::from(error.to_string()))?;
            let mut world = World::new(Box::new(system));
            run(&mut world).map_err(|failure| Failed::from(failure.0))
        })
        .with_kind(format!("{class:?}"))
    };
    rows::all().filter(told).map(trial).collect()
}

/// An agent.
struct Agent {
    control: OwnedFd,
    process: OwnedFd,
}

/// The emulator and the agents under it.
struct Real {
    emulator: Child,
    listener: Option<OwnedFd>,
    _directory: TempDir,
    agents: BTreeMap<Process, Agent>,
    first: Process,
    last: u32,
    letters: Vec<Option<OwnedFd>>,
    number: Cell<u64>,
}

/// Waits until one of the fds has something to say; `None` if none of them ever does.
fn wait_for(fds: &[&OwnedFd]) -> Option<usize> {
    // Far longer than anything takes: a test that hangs is to end.
    let limit = Timespec::try_from(Duration::from_secs(60)).ok()?;
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::IN)).collect();
    poll(&mut polled, Some(&limit)).ok()?;
    polled.iter().position(|fd| !fd.revents().is_empty())
}

impl Real {
    fn start() -> Result<Self, Errno> {
        let directory = TempDir::new().map_err(|_| Errno::IO)?;
        let path = directory.path().join("agents");
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&listener, &SocketAddrUnix::new(&path)?)?;
        listen(&listener, 16)?;
        let mut command = supervise::command(None, false, supervise::this());
        let emulator = command.arg(crate::AGENT).arg(path).spawn().map_err(|_| Errno::IO)?;
        let mut this = Self {
            emulator,
            listener: Some(listener),
            _directory: directory,
            agents: BTreeMap::new(),
            first: Process(0),
            last: 0,
            letters: Vec::new(),
            number: Cell::new(0),
        };
        this.first = this.accept();
        Ok(this)
    }

    /// Waits for an agent that says hello.
    fn accept(&mut self) -> Process {
        let listener = self.listener.as_ref().expect("it is there until the end");
        wait_for(&[listener]).expect("the agent should say hello");
        let control = accept_with(listener, SocketFlags::CLOEXEC).expect("it said so");
        let Packet { numbers: [pid, number, ..], .. } =
            wire::receive(&control).expect("an agent says who it is");
        let pid = Pid::from_raw(pid as i32).expect("a process has a number");
        let process = pidfd_open(pid, PidfdFlags::empty()).expect("the agent lives");
        self.number.set(number as u64);
        self.last += 1;
        self.agents.insert(Process(self.last), Agent { control, process });
        Process(self.last)
    }

    fn agent(&self, process: Process) -> &Agent {
        self.agents.get(&process).expect("a case uses processes that live")
    }

    fn order_with(
        &self,
        process: Process,
        order: Order,
        numbers: [i64; 3],
        bytes: &[u8],
        fd: Option<&OwnedFd>,
    ) -> Result<Packet, Errno> {
        let control = &self.agent(process).control;
        let [first, second, third] = numbers;
        let numbers = [order as i64, first, second, third];
        wire::send(control, numbers, bytes, fd.map(AsFd::as_fd)).expect("the agent listens");
        wait_for(&[control]).expect("the agent should answer");
        let packet = wire::receive(control).expect("the agent answers");
        match packet.numbers[0] {
            0 => Ok(packet),
            errno => Err(Errno::from_raw_os_error(errno as i32)),
        }
    }

    fn order(&self, process: Process, order: Order, numbers: [i64; 3]) -> Result<i64, Errno> {
        self.order_with(process, order, numbers, &[], None).map(|packet| packet.numbers[1])
    }

    fn order_fd(&self, process: Process, order: Order, number: i64) -> Result<Fd, Errno> {
        let number = self.order(process, order, [number, 0, 0])? as i32;
        Ok(Fd { process, number })
    }

    fn child(&mut self, of: Process, order: Order) -> Process {
        let control = &self.agent(of).control;
        wire::send(control, [order as i64, 0, 0, 0], &[], None).expect("the agent listens");
        self.accept()
    }
}

fn place(place: Place) -> agent::Place {
    match place {
        Place::Writable => agent::Place::Writable,
        Place::Unaligned => agent::Place::Unaligned,
        Place::ReadOnly => agent::Place::ReadOnly,
        Place::Null => agent::Place::Null,
        Place::CutAfter(length) => agent::Place::CutAfter(length as u32),
    }
}

impl System for Real {
    fn deviates(&self, deviation: Deviation) -> bool {
        matches!(deviation, Deviation::SessionIsReturned)
    }

    fn spawn(&mut self) -> Process {
        self.child(self.first, Order::Spawn)
    }

    fn fork(&mut self, process: Process) -> Process {
        self.child(process, Order::Fork)
    }

    fn kill(&mut self, process: Process) {
        let agent = self.agents.remove(&process).expect("a case kills a process once");
        pidfd_send_signal(&agent.process, Signal::KILL).expect("the agent lives");
        // Its fds are closed by the time that this says so.
        wait_for(&[&agent.process]).expect("the agent should end");
    }

    fn limit_fds(&mut self, process: Process, limited: bool) {
        self.order(process, Order::LimitFds, [limited.into(), 0, 0]).expect("limits can be set");
    }

    fn open_device(&mut self, process: Process, read_only: bool) -> Result<Fd, Errno> {
        self.order_fd(process, Order::OpenDevice, read_only.into())
    }

    fn memfd(&mut self, process: Process, contents: &[u8]) -> Result<Fd, Errno> {
        let packet = self.order_with(process, Order::Memfd, [0; 3], contents, None)?;
        Ok(Fd { process, number: packet.numbers[1] as i32 })
    }

    fn reopen(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.order_fd(fd.process, Order::Reopen, fd.number.into())
    }

    fn reopen_as_path(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.order_fd(fd.process, Order::ReopenAsPath, fd.number.into())
    }

    fn unsupported(&mut self, process: Process) -> Result<Fd, Errno> {
        self.order_fd(process, Order::Unsupported, 0)
    }

    fn scripted(&mut self, _: Process, _: u32) -> Option<Fd> {
        None
    }

    fn script(&self) -> Option<Script> {
        None
    }

    fn dup(&mut self, fd: Fd) -> Result<Fd, Errno> {
        self.order_fd(fd.process, Order::Dup, fd.number.into())
    }

    fn close(&mut self, fd: Fd) -> Result<(), Errno> {
        self.order(fd.process, Order::Close, [fd.number.into(), 0, 0]).map(drop)
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        let numbers = [fd.number.into(), 0, 0];
        let packet = self.order_with(fd.process, Order::Send, numbers, &[], None)?;
        self.letters.push(packet.fd);
        Ok(Letter(self.letters.len() - 1))
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        let fd = self.letters.get_mut(letter.0)?.take()?;
        let process = by?;
        let sent = self.order_with(process, Order::Receive, [0; 3], &[], Some(&fd));
        Some(Fd { process, number: sent.ok()?.numbers[1] as i32 })
    }

    fn ioctl(&mut self, fd: Fd, command: u32, argument: &mut Argument) -> Result<(), Errno> {
        let numbers = [fd.number.into(), command.into(), place(argument.place).to_number()];
        let packet = self.order_with(fd.process, Order::Ioctl, numbers, &argument.bytes, None)?;
        argument.bytes = packet.bytes;
        Ok(())
    }

    fn closes_on_exec(&self, fd: Fd) -> Result<bool, Errno> {
        self.order(fd.process, Order::ClosesOnExec, [fd.number.into(), 0, 0]).map(|set| set != 0)
    }

    fn is_same_open_file(&self, one: Fd, other: Fd) -> Result<bool, Errno> {
        assert_eq!(one.process, other.process, "no case compares fds of two processes");
        let numbers = [one.number.into(), other.number.into(), 0];
        self.order(one.process, Order::IsSameFile, numbers).map(|same| same != 0)
    }

    fn read(&mut self, fd: Fd, length: usize) -> Result<Vec<u8>, Errno> {
        let numbers = [fd.number.into(), length as i64, 0];
        self.order_with(fd.process, Order::Read, numbers, &[], None).map(|packet| packet.bytes)
    }

    fn write_at(&mut self, fd: Fd, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let numbers = [fd.number.into(), offset as i64, 0];
        self.order_with(fd.process, Order::WriteAt, numbers, bytes, None).map(drop)
    }

    fn switch(&mut self) -> Result<(), Errno> {
        let control = &self.agent(self.first).control;
        wire::send(control, [Order::Reboot as i64, 0, 0, 0], &[], None).expect("it listens");
        if wait_for(&[control]) == Some(0)
            && let Ok(packet) = wire::receive(control)
        {
            return Err(Errno::from_raw_os_error(packet.numbers[0] as i32));
        }
        // The connection broke: the agent is gone, and all others with it.
        self.agents.clear();
        self.letters.clear();
        self.first = self.accept();
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.number.get()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        // The first agent ends with its connection, or that which it would have liked to have, and the
        // emulator ends with the agent.
        self.agents.clear();
        self.listener = None;
        let _ = self.emulator.wait();
    }
}
