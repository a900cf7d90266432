//! Programs that attach to a port's console, leave and come back.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use rustix::pty::ptsname;
use tempfile::TempDir;

use super::uart::{DATA, FCR, LSR};
use super::*;

/// Data ready, in the line status register.
const READY: u8 = 1;

/// A port with its console, and its thread.
pub(super) struct Machine {
    pub(super) port: Serial,
    pub(super) thread: EventManager<SerialWorker>,
}

impl Machine {
    pub(super) fn new(
        make: impl FnOnce(SerialResources) -> Serial,
        options: &SerialOptions,
    ) -> Self {
        let mut files = files::DeviceFiles::from(options.open().unwrap());
        let [sink, listener, opened, next] =
            options.roles().map(|role| role.map(|role| files.take(role).unwrap()));
        files.finish().unwrap();
        let interrupt = event("a test").unwrap();
        let mut port = make(SerialResources { interrupt, sink, listener, opened, next });
        port.write(FCR, &[1]);
        let mut thread = EventManager::new().unwrap();
        thread.add_subscriber(port.worker());
        Self { port, thread }
    }

    pub(super) fn fresh(options: &SerialOptions) -> Self {
        Self::new(|resources| Serial::new(resources).unwrap(), options)
    }

    /// Lets the port's thread do all that it has to do.
    pub(super) fn run(&mut self) {
        let quiet = (0..1000).any(|_| self.thread.run_with_timeout(0).unwrap() == 0);
        assert!(quiet, "the port's thread has no rest");
    }

    /// The guest sends a text.
    pub(super) fn send(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| self.port.write(DATA, &[*byte]));
        self.run();
    }

    /// All that the guest reads.
    fn typed(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        loop {
            self.run();
            let mut data = [0];
            self.port.read(LSR, &mut data);
            if data[0] & READY == 0 {
                return text;
            }
            self.port.read(DATA, &mut data);
            text.push(data[0]);
        }
    }
}

fn socket() -> (TempDir, SerialOptions) {
    let directory = tempfile::tempdir().unwrap();
    let options = SerialOptions::Socket(directory.path().join("console"));
    (directory, options)
}

fn attach(machine: &mut Machine, options: &SerialOptions) -> UnixStream {
    let SerialOptions::Socket(path) = options else { panic!("{options:?}") };
    let client = UnixStream::connect(path).unwrap();
    client.set_nonblocking(true).unwrap();
    machine.run();
    client
}

/// All that has arrived, and whether the other end is closed.
fn shown(mut client: impl Read) -> (Vec<u8>, bool) {
    let mut text = Vec::new();
    let ended = match client.read_to_end(&mut text) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
            false
        }
    };
    (text, ended)
}

#[test]
fn a_client_attaches_types_leaves_and_finds_what_it_missed() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    machine.send(b"booting\n");
    let mut client = attach(&mut machine, &options);
    assert_eq!(shown(&client), (b"booting\n".to_vec(), false));
    client.write_all(b"a command longer than the FIFO\r").unwrap();
    assert_eq!(machine.typed(), b"a command longer than the FIFO\r");
    machine.send(b"ok\n");
    assert_eq!(shown(&client), (b"ok\n".to_vec(), false));
    drop(client);
    machine.send(b"missed\n");
    machine.send(b"and more\n");
    let client = attach(&mut machine, &options);
    assert_eq!(shown(&client).0, b"missed\nand more\n");
}

#[test]
fn input_of_a_client_that_has_left_arrives_even_while_output_is_sent() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    let mut client = attach(&mut machine, &options);
    client.write_all(b"a command longer than the FIFO\r").unwrap();
    drop(client);
    machine.send(b"prompt");
    assert_eq!(machine.typed(), b"a command longer than the FIFO\r");
    let client = attach(&mut machine, &options);
    assert_eq!(shown(&client).0, b"prompt");
}

#[test]
fn a_new_client_replaces_one_that_hangs_and_the_old_one_is_told() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    let mut old = attach(&mut machine, &options);
    machine.send(b"old\n");
    let new = attach(&mut machine, &options);
    machine.send(b"new\n");
    let (text, ended) = shown(&old);
    assert!(text.starts_with(b"old\n\r\n[perennial: another client") && ended, "{text:?}");
    assert!(old.write_all(b"x").is_err());
    assert_eq!(shown(&new), (b"new\n".to_vec(), false));
    assert_eq!(machine.typed(), b"");
}

#[test]
fn of_many_clients_at_once_the_last_has_the_console() {
    let (_directory, options) = socket();
    let SerialOptions::Socket(path) = &options else { panic!() };
    let mut machine = Machine::fresh(&options);
    let clients: Vec<_> = (0..50).map(|_| UnixStream::connect(path).unwrap()).collect();
    machine.run();
    machine.send(b"hello\n");
    for (number, client) in clients.iter().enumerate() {
        client.set_nonblocking(true).unwrap();
        assert_eq!(shown(client).1, number != 49, "{number}");
    }
}

#[test]
fn a_client_that_reads_nothing_keeps_the_guest_from_nothing() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    let client = attach(&mut machine, &options);
    let line = [b'x'; 1023];
    for _ in 0..1024 {
        machine.send(&line);
        machine.send(b"\n");
    }
    machine.send(b"the end\n");
    assert!(machine.port.outbox.pending().len() <= OUTBOX);
    // What is lost is between what the client's socket took and the latest.
    let mut all = Vec::new();
    loop {
        let (text, ended) = shown(&client);
        if text.is_empty() {
            break;
        }
        assert!(!ended);
        all.extend(text);
        machine.run();
    }
    assert!(all.ends_with(b"x\nthe end\n") && all.len() < 1 << 20, "{}", all.len());
}

#[test]
fn a_client_that_comes_during_a_pause_is_served_after_it() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    machine.send(b"before\n");
    machine.port.pause();
    let mut client = attach(&mut machine, &options);
    client.write_all(b"typed").unwrap();
    machine.run();
    assert_eq!(shown(&client), (Vec::new(), false));
    machine.port.resume();
    assert_eq!(machine.typed(), b"typed");
    assert_eq!(shown(&client), (b"before\n".to_vec(), false));
}

#[test]
fn what_nobody_has_read_is_shown_after_a_live_update() {
    let (_directory, options) = socket();
    let mut machine = Machine::fresh(&options);
    machine.send(b"before\n");
    machine.port.pause();
    let state = machine.port.save().unwrap();
    drop(machine);
    let restore = |resources| Serial::restore(state, resources).unwrap();
    // At the same path: the listener of the last process is gone.
    let mut machine = Machine::new(restore, &options);
    let mut client = attach(&mut machine, &options);
    client.write_all(b"early").unwrap();
    machine.port.resume();
    machine.send(b"after\n");
    assert_eq!(shown(&client), (b"before\nafter\n".to_vec(), false));
    assert_eq!(machine.typed(), b"early");
}

#[test]
fn a_pseudoterminal_is_opened_and_closed_again_and_again() {
    let opened = SerialOptions::Pty.open().unwrap();
    let name = ptsname(&opened[0].fd, Vec::new()).unwrap().into_string().unwrap();
    let mut files = files::DeviceFiles::from(opened);
    let interrupt = event("a test").unwrap();
    let [sink, opened] = [options::SINK, options::OPENED].map(|role| files.take(role).ok());
    let mut port =
        Serial::new(SerialResources { interrupt, sink, listener: None, opened, next: None })
            .unwrap();
    port.write(FCR, &[1]);
    let mut thread = EventManager::new().unwrap();
    thread.add_subscriber(port.worker());
    let mut machine = Machine { port, thread };
    let program = || -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        options.open(&name).unwrap()
    };
    // Much more than the kernel's buffer of a terminal.
    (0..2000).for_each(|_| machine.send(b"nobody reads this\n"));
    machine.send(b"latest 1\n");
    for number in 1..=3 {
        let mut terminal = program();
        // The kernel hands on what a terminal gets by a worker of its own.
        let deadline = Instant::now() + Duration::from_secs(60);
        let (latest, mut all) = (format!("latest {number}\n"), Vec::new());
        while !all.ends_with(latest.as_bytes()) {
            assert!(Instant::now() < deadline, "{number}: {all:?}");
            machine.thread.run_with_timeout(10).unwrap();
            all.extend(shown(&terminal).0);
        }
        terminal.write_all(b"say\n").unwrap();
        let mut typed = Vec::new();
        while typed != b"say\n" {
            assert!(Instant::now() < deadline, "{typed:?}");
            machine.thread.run_with_timeout(100).unwrap();
            typed.extend(machine.typed());
        }
        drop(terminal);
        machine.send(format!("latest {}\n", number + 1).as_bytes());
    }
}
