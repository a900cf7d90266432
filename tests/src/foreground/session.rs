//! A program in a terminal, and the person at its keys.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};

use super::init::Problem;

/// First argument of this program when it starts a program in a terminal.
pub(super) const IN_TERMINAL: &str = "in-terminal";

/// Longest time for a text to appear.
const WITHIN: Duration = Duration::from_secs(120);

/// A pseudoterminal.
pub(super) struct Terminal {
    master: File,
    slave: OwnedFd,
    name: String,
    /// Its settings before any program has used it.
    pub(super) before: Termios,
}

impl Terminal {
    pub(super) fn open() -> Result<Self, Problem> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        // Kept open, so that the terminal outlives the program in it.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(&name, flags, Mode::empty())?;
        let before = tcgetattr(&slave)?;
        Ok(Self { master: master.into(), slave, name, before })
    }

    pub(super) fn settings(&self) -> Result<Termios, Problem> {
        Ok(tcgetattr(&self.slave)?)
    }

    /// Errors unless the settings are `wanted`.
    pub(super) fn expect_settings(&self, when: &str, wanted: &Termios) -> Result<(), Problem> {
        // `Termios` has no equality; its text has all of its fields.
        let (found, wanted) = (format!("{:?}", self.settings()?), format!("{wanted:?}"));
        match found == wanted {
            true => Ok(()),
            false => Err(format!("{when}: the settings are {found}, not {wanted}").into()),
        }
    }
}

/// A program in its terminal.
pub(super) struct Session {
    pub(super) terminal: Terminal,
    program: Child,
    output: Receiver<Vec<u8>>,
    /// Output that no wait has used up.
    said: String,
}

impl Session {
    /// Starts a program with its arguments.
    pub(super) fn start(terminal: Terminal, arguments: &[&str]) -> Result<Self, Problem> {
        let mut command = Command::new("/proc/self/exe");
        let program = command.args([IN_TERMINAL, &terminal.name]).args(arguments).spawn()?;
        let mut master = terminal.master.try_clone()?;
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = master.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { terminal, program, output, said: String::new() })
    }

    pub(super) fn pid(&self) -> Result<Pid, Problem> {
        Ok(Pid::from_child(&self.program))
    }

    pub(super) fn type_keys(&mut self, keys: &[u8]) -> Result<(), Problem> {
        Ok(self.terminal.master.write_all(keys)?)
    }

    /// Waits for a text in the output, behind the last one that was waited for.
    pub(super) fn wait_for(&mut self, text: &str) -> Result<(), Problem> {
        self.wait_within(text, WITHIN)
    }

    /// As [`wait_for`](Self::wait_for), for at most this time.
    pub(super) fn wait_within(&mut self, text: &str, most: Duration) -> Result<(), Problem> {
        self.read_up_to(text, most).map(drop)
    }

    /// Waits for a text, and returns what stands between two others in front of it: `start` and the next `end`.
    pub(super) fn find_before(
        &mut self,
        text: &str,
        (start, end): (&str, char),
    ) -> Result<String, Problem> {
        let said = self.read_up_to(text, WITHIN)?;
        let found = said.rsplit_once(start).and_then(|(_, rest)| rest.split_once(end));
        Ok(found.ok_or(format!("no {start:?} in {said:?}"))?.0.to_owned())
    }

    /// Waits for a text for at most this time, and returns all in front of it.
    fn read_up_to(&mut self, text: &str, most: Duration) -> Result<String, Problem> {
        let deadline = Instant::now() + most;
        loop {
            if let Some(at) = self.said.find(text) {
                let before = self.said[..at].to_owned();
                self.said.drain(..at + text.len());
                return Ok(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.said += &String::from_utf8_lossy(&bytes),
                Err(_) => return Err(format!("no {text:?} in {:?}", self.said).into()),
            }
        }
    }

    /// Errors if the program has ended.
    pub(super) fn expect_running(&mut self) -> Result<(), Problem> {
        match self.program.try_wait()? {
            None => Ok(()),
            Some(ended) => Err(format!("the program ended: {ended}: {:?}", self.said).into()),
        }
    }

    /// Waits for the end of the program, and errors unless it has this exit status.
    pub(super) fn expect_end(&mut self, when: &str, status: i32) -> Result<(), Problem> {
        let ended = self.program.wait()?;
        while let Ok(bytes) = self.output.try_recv() {
            self.said += &String::from_utf8_lossy(&bytes);
        }
        match ended.code() == Some(status) {
            true => Ok(()),
            false => {
                Err(format!("{when}: {ended}, not exit status {status}: {:?}", self.said).into())
            }
        }
    }
}
