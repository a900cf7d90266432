//! The machine from outside, and a turn on it: a [`System`] for one case.
//!
//! Cases that cross a switch share the switch: each [`Turn`] waits there for the others. A failure of
//! the machine itself panics in the case that uses it then, with the last lines of the console.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use luo::Errno;

use super::protocol::{Ask, Hello, PORT, Say};
use super::{Owner, Ram, prepare};
use crate::conformance::profile::Profile;
use crate::conformance::system::{
    Answer, Call, Called, Direction, Fd, Letter, NEXT_KERNEL_DIED, Next, Process, System, by_place,
};
use crate::diagnosis;
use crate::host::Failure;
use crate::mutex::lock;
use tempfile::NamedTempFile;

use crate::qemu::{self, Qemu};

/// Longest time for an answer, and for a kernel to start.
const WITHIN: Duration = Duration::from_secs(240);

/// The start of the kernel's message before it stops.
const PANIC: &str = "Kernel panic";

/// A machine.
pub(crate) struct Guest {
    owner: Owner,
    qemu: Qemu,
    /// The file of its RAM, if cases access the RAM.
    ram: Option<NamedTempFile>,
    line: UnixStream,
    said: Receiver<String>,
    hello: Hello,
    /// Whether it failed in an earlier case, so that waiting for it is useless.
    failed: bool,
}

impl Guest {
    /// Boots the machine and waits until it serves.
    pub(crate) fn boot(owner: Owner) -> Result<Self, Failure> {
        let directory = qemu::scratch_directory()?;
        let mut machine = prepare(owner, directory.path())?;
        let ram = match owner {
            Owner::Kernel => {
                Some(NamedTempFile::new_in("/dev/shm").or_else(|_| NamedTempFile::new())?)
            }
            Owner::Pool => None,
        };
        machine.ram_file = ram.as_ref().map(|file| file.path().to_owned());
        let mut qemu = Qemu::start(&machine, qemu::accelerator(), directory)?;
        let line = qemu.take_port(PORT).ok_or("the machine has no control port")?;
        let (sender, said) = channel();
        let reader = BufReader::new(line.try_clone()?);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let hello = Hello { release: String::new(), generation: 0, number: 0 };
        let mut guest = Self { owner, qemu, ram, line, said, hello, failed: false };
        match guest.listen() {
            Say::Hello(hello) => guest.hello = hello,
            said => guest.fail(&format!("its first message is {said:?}, not a hello")),
        }
        Ok(guest)
    }

    /// Panics, and makes all later cases on this machine fail too.
    fn fail(&mut self, what: &str) -> ! {
        self.failed = true;
        let (console, state) = (self.qemu.last_lines(40), diagnosis::machine(&mut self.qemu));
        panic!("the machine: {what}; its console:\n{console}\n{state}")
    }

    /// Waits for the machine's next message.
    fn listen(&mut self) -> Say {
        assert!(!self.failed, "the machine failed in another case");
        let deadline = Instant::now() + WITHIN;
        loop {
            // Waits in slices, to notice between them that the machine has ended.
            match self.said.recv_timeout(Duration::from_secs(2)) {
                Ok(line) => match serde_json::from_str(&line) {
                    Ok(said) => return said,
                    Err(error) => self.fail(&format!("{error}: {line:?}")),
                },
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(error) => self.fail(&error.to_string()),
            }
            if self.qemu.has_ended() {
                self.fail("it ended");
            }
        }
    }

    fn tell(&mut self, ask: &Ask) {
        let line = serde_json::to_string(ask).expect("a request can be serialized");
        if let Err(error) = self.line.write_all(format!("{line}\n").as_bytes()) {
            self.fail(&error.to_string());
        }
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer, Errno> {
        self.tell(ask);
        match self.listen() {
            Say::Answer(answer) => answer.map_err(Errno::from_raw_os_error),
            said => self.fail(&format!("it replied {said:?} to {ask:?}")),
        }
    }

    /// Makes the machine switch to its next kernel. Calls `meanwhile` after the request is sent, before
    /// the next kernel is awaited.
    pub(crate) fn switch(&mut self, next: Next, meanwhile: impl FnOnce()) -> Result<(), Errno> {
        let (panics, expected) = (self.panics(), self.hello.generation + 1);
        self.tell(&Ask::Switch(next));
        meanwhile();
        let hello = match self.listen() {
            Say::Hello(hello) => hello,
            Say::Answer(answer) => return answer.map(drop).map_err(Errno::from_raw_os_error),
            Say::Problem(problem) => self.fail(&problem),
        };
        let release = std::mem::replace(&mut self.hello, hello).release;
        match (next, self.hello.generation) {
            (Next::Reset, 0) => Ok(()),
            (Next::Kernel | Next::WithoutLuo, found)
                if found == expected && self.hello.release != release =>
            {
                Ok(())
            }
            (Next::Kernel, 0) if self.panics() > panics => Err(NEXT_KERNEL_DIED),
            _ => self.fail(&format!("kernel {release} was followed by {:?}", self.hello)),
        }
    }

    /// Number of panics of its kernels.
    fn panics(&self) -> usize {
        self.qemu.console().matches(PANIC).count()
    }

    /// The last panic on its console.
    fn last_words(&self) -> Option<String> {
        let console = self.qemu.console();
        console.lines().rfind(|line| line.contains(PANIC)).map(str::to_owned)
    }

    /// What its system lacks, and where it deviates.
    pub(crate) fn profile(&self) -> &'static Profile {
        self.owner.profile()
    }

    /// Number of live updates that led to its kernel.
    pub(crate) fn liveupdate_number(&self) -> u64 {
        self.hello.number
    }

    /// Access to its RAM. ENOENT for a machine without a RAM file.
    pub(crate) fn ram(&self) -> Result<Ram, Errno> {
        let ram = self.ram.as_ref().ok_or(Errno::NOENT)?;
        Ok(Ram::new(ram.reopen().map_err(|_| Errno::IO)?))
    }
}

/// A machine that several cases share.
pub(crate) type Shared = Arc<Mutex<Guest>>;

/// One case's use of the machine. Dropping it ends the processes of the case.
pub(crate) struct Turn {
    guest: Shared,
    profile: &'static Profile,
    processes: Vec<Process>,
    /// Waits until the shared switch has been made. `None` if the case switches by itself.
    wait: Option<Box<dyn FnMut() -> Result<(), Errno>>>,
    /// Called during the case's first switch.
    look: Option<Box<dyn FnOnce()>>,
}

impl Turn {
    pub(crate) fn new(guest: &Shared) -> Self {
        let profile = lock(guest).profile();
        let (wait, look) = (None, None);
        Self { guest: Arc::clone(guest), profile, processes: Vec::new(), wait, look }
    }

    /// The same turn, whose switch is shared: `wait` waits for it.
    pub(crate) fn waiting(mut self, wait: impl FnMut() -> Result<(), Errno> + 'static) -> Self {
        self.wait = Some(Box::new(wait));
        self
    }

    /// The same turn, with `look` called during the first switch.
    pub(crate) fn looking(mut self, look: impl FnOnce() + 'static) -> Self {
        self.look = Some(Box::new(look));
        self
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        lock(&self.guest)
    }

    fn process(&mut self, ask: &Ask) -> Process {
        let answer = self.guest().ask(ask).expect("the machine can start a process");
        let process = Process(answer.number as u32);
        self.processes.push(process);
        process
    }
}

impl System for Turn {
    fn profile(&self) -> &'static Profile {
        self.profile
    }

    fn spawn(&mut self) -> Process {
        self.process(&Ask::Spawn)
    }

    fn fork(&mut self, process: Process) -> Process {
        self.process(&Ask::Fork(process))
    }

    fn kill(&mut self, process: Process) {
        self.processes.retain(|known| *known != process);
        let _ = self.guest().ask(&Ask::Kill(process));
    }

    fn send(&mut self, fd: Fd) -> Result<Letter, Errno> {
        Ok(Letter(self.guest().ask(&Ask::Send(fd))?.number as usize))
    }

    fn receive(&mut self, letter: Letter, by: Option<Process>) -> Option<Fd> {
        let answer = self.guest().ask(&Ask::Receive(letter, by)).ok()?;
        Some(Fd { process: by?, number: answer.number as i32 })
    }

    fn call(&mut self, process: Process, call: Call) -> Result<Answer, Errno> {
        self.guest().ask(&Ask::Call(process, call))
    }

    fn direct(&mut self, direction: Direction) -> Result<Vec<Called>, Errno> {
        let called = self.guest().ask(&Ask::Direct(direction))?.each.into_iter();
        let known = called.flatten().filter_map(|answer| {
            let callback = by_place::callback((*answer.bytes.first()?).into())?;
            Some((callback, answer.number as u32))
        });
        Ok(known.collect())
    }

    fn switch(&mut self, next: Next) -> Result<(), Errno> {
        match &mut self.wait {
            Some(wait) => {
                assert_eq!(next, Next::Kernel, "a shared switch goes to the next kernel with LUO");
                wait()?;
            }
            None => {
                let look = self.look.take().unwrap_or_else(|| Box::new(|| ()));
                self.guest().switch(next, look)?;
            }
        }
        self.processes.clear();
        Ok(())
    }

    fn liveupdate_number(&self) -> u64 {
        self.guest().liveupdate_number()
    }

    fn last_words(&self) -> Option<String> {
        self.guest().last_words()
    }

    fn change_memory(&mut self, offset: usize, old: &[u8], new: &[u8]) -> Result<usize, Errno> {
        self.guest().ram()?.change(offset, old, new).map_err(|_| Errno::IO)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // After a panic the machine may have ended, and no other case uses it.
        if !thread::panicking() {
            std::mem::take(&mut self.processes).into_iter().for_each(|process| self.kill(process));
        }
    }
}
