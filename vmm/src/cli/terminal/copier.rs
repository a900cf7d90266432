//! The thread that copies between the terminal and a line.
//!
//! It never waits for one of them alone: a guest that reads nothing does not keep the user from leaving,
//! and a reader of the output that is slow does not keep the guest from anything, because the guest's
//! process drops what the line does not take.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::stdio::stdin;
use signal_hook::consts::{SIGCONT, SIGTSTP};
use signal_hook::low_level::{emulate_default_handler, pipe};

use super::keys::{HELP, HINT, Keys, Order};
use super::settings::Switch;
use crate::devices::terminal::open_stdout;

/// Most bytes that wait for either side.
const MOST: usize = 64 << 10;
/// Most bytes of one read or write. A pipe that polls as writable takes as many without blocking.
const CHUNK: usize = 4096;

pub(super) struct Copier {
    switch: Switch,
    keys: Keys,
    new_lines: Receiver<File>,
    line_ended: Sender<()>,
    /// Readable when there is a new line; closed when no more will come.
    woken: UnixStream,
    /// Readable after SIGTSTP and after SIGCONT. `None` if standard input is no terminal.
    signals: Option<[UnixStream; 2]>,
    /// The line in use, and those that wait for its end.
    lines: VecDeque<File>,
    /// Whether there was a line.
    begun: bool,
    /// Whether no more lines will come.
    last: bool,
    stdin_ended: bool,
    /// `None` if nobody reads the output any more.
    stdout: Option<File>,
    to_guest: VecDeque<u8>,
    to_user: VecDeque<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Woken,
    Stop,
    Continue,
    Stdin,
    Stdout,
    Line,
}

impl Copier {
    pub(super) fn new(
        switch: Switch,
        new_lines: Receiver<File>,
        woken: UnixStream,
        line_ended: Sender<()>,
    ) -> io::Result<Self> {
        let signal = |signal| -> io::Result<UnixStream> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            pipe::register(signal, write)?;
            Ok(read)
        };
        let stdout = open_stdout().map_err(|error| error.source)?;
        let signals = match switch.is_terminal() {
            true => Some([signal(SIGTSTP)?, signal(SIGCONT)?]),
            false => None,
        };
        Ok(Self {
            switch,
            keys: Keys::default(),
            new_lines,
            line_ended,
            woken,
            signals,
            lines: VecDeque::new(),
            begun: false,
            last: false,
            stdin_ended: false,
            stdout: Some(stdout),
            to_guest: VecDeque::new(),
            to_user: VecDeque::new(),
        })
    }

    /// Copies until the user leaves, or the last line has ended and its output is written.
    pub(super) fn run(mut self) {
        while !(self.last && self.lines.is_empty() && self.to_user.is_empty()) {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return tracing::error!("the terminal cannot be waited for: {errno}"),
            };
            for source in ready {
                match source {
                    Source::Woken => self.take_lines(),
                    Source::Stop => self.suspend(),
                    Source::Continue => self.after_stop(),
                    Source::Stdin => {
                        if self.read_user() == Some(Order::Leave) {
                            return;
                        }
                    }
                    Source::Stdout => self.write_user(),
                    Source::Line => self.serve_line(),
                }
            }
        }
    }

    /// Waits until at least one source is ready, and returns those that are.
    fn wait(&self) -> rustix::io::Result<Vec<Source>> {
        let (mut sources, mut fds) = (Vec::new(), Vec::new());
        if !self.last {
            sources.push(Source::Woken);
            fds.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        if let Some([stop, go_on]) = &self.signals {
            sources.extend([Source::Stop, Source::Continue]);
            fds.push(PollFd::new(stop, PollFlags::IN));
            fds.push(PollFd::new(go_on, PollFlags::IN));
        }
        let stdin = stdin();
        if self.reads_user() {
            sources.push(Source::Stdin);
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        if let Some(stdout) = self.stdout.as_ref().filter(|_| !self.to_user.is_empty()) {
            sources.push(Source::Stdout);
            fds.push(PollFd::new(stdout, PollFlags::OUT));
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.to_user.len() < MOST);
        flags.set(PollFlags::OUT, !self.to_guest.is_empty());
        // Without a flag poll still reports that the other end is closed, again and again.
        if let Some(line) = self.lines.front().filter(|_| !flags.is_empty()) {
            sources.push(Source::Line);
            fds.push(PollFd::new(line, flags));
        }
        poll(&mut fds, None)?;
        let ready = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(source, _)| source).collect())
    }

    /// Whether to read standard input. A terminal is always read, for the key that leaves. From a file or a
    /// pipe no more is read than the guest takes.
    fn reads_user(&self) -> bool {
        let wanted =
            self.switch.is_terminal() || (!self.lines.is_empty() && self.to_guest.len() < MOST);
        self.begun && !self.stdin_ended && wanted
    }

    fn take_lines(&mut self) {
        let mut bytes = [0; 64];
        self.last |= matches!(self.woken.read(&mut bytes), Ok(0));
        while let Ok(line) = self.new_lines.try_recv() {
            if !std::mem::replace(&mut self.begun, true) && self.switch.is_terminal() {
                eprintln!("perennial: {HINT}");
                self.switch.make_raw();
            }
            self.lines.push_back(line);
        }
    }

    /// Stops this process as SIGTSTP would have done, with the terminal as it was before.
    fn suspend(&mut self) {
        self.forget_signals();
        self.switch.make_cooked();
        if let Err(error) = emulate_default_handler(SIGTSTP) {
            tracing::warn!("cannot stop on SIGTSTP: {error}");
        }
        self.after_stop();
    }

    /// Takes the terminal again: the shell may have changed its settings while this process was stopped.
    fn after_stop(&mut self) {
        self.forget_signals();
        if self.begun {
            self.switch.make_raw();
        }
    }

    fn forget_signals(&mut self) {
        let mut bytes = [0; 64];
        for signal in self.signals.iter_mut().flatten() {
            while signal.read(&mut bytes).is_ok_and(|count| count > 0) {}
        }
    }

    fn read_user(&mut self) -> Option<Order> {
        let mut bytes = [0; CHUNK];
        let count = match rustix::io::read(stdin(), &mut bytes) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return None,
            // The end of the input, or the terminal is gone.
            Ok(0) | Err(_) => {
                self.stdin_ended = true;
                return None;
            }
            Ok(count) => count,
        };
        let Self { keys, to_guest, switch, .. } = self;
        if !switch.is_terminal() {
            to_guest.extend(&bytes[..count]);
            return None;
        }
        // A guest that does not read loses keys, as behind a line without flow control.
        let for_guest = |byte| {
            if to_guest.len() < MOST {
                to_guest.push_back(byte);
            }
        };
        let orders = keys.sort(&bytes[..count], for_guest);
        for order in &orders {
            if *order == Order::Help {
                eprintln!("\r\nperennial: {HELP}");
            }
        }
        orders.into_iter().find(|order| *order == Order::Leave)
    }

    fn write_user(&mut self) {
        let Some(stdout) = &mut self.stdout else { return };
        let (chunk, _) = self.to_user.as_slices();
        match stdout.write(&chunk[..chunk.len().min(CHUNK)]) {
            Ok(count) => drop(self.to_user.drain(..count)),
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                tracing::info!("the guest's output is dropped from now on: {error}");
                self.stdout = None;
                self.to_user.clear();
            }
        }
    }

    /// Reads what the line has, writes to it what it takes, and drops it when it has ended.
    fn serve_line(&mut self) {
        let Some(line) = self.lines.front_mut() else { return };
        let mut bytes = [0; CHUNK];
        let mut ended = false;
        match line.read(&mut bytes) {
            Ok(0) => ended = true,
            Ok(count) if self.stdout.is_some() => self.to_user.extend(&bytes[..count]),
            Ok(_) => {}
            Err(error) => ended = !is_passing(&error),
        }
        let (chunk, _) = self.to_guest.as_slices();
        if !ended && !chunk.is_empty() {
            match line.write(&chunk[..chunk.len().min(CHUNK)]) {
                Ok(count) => drop(self.to_guest.drain(..count)),
                // If the line has ended, the next read says so, after the last output.
                Err(error) if is_passing(&error) => {}
                Err(_) => self.to_guest.clear(),
            }
        }
        if ended {
            self.lines.pop_front();
            let _ = self.line_ended.send(());
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
