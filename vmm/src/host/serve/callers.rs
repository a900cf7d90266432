//! Those who send commands to the host: the clients of the API's socket, and the control port.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::PollFd;

use crate::api::{Line, StreamError};
use crate::causes::chain;
use crate::config::HostSection;
use crate::host::HostError;
use crate::host::clients::{Client, Clients};
use crate::host::port::Port;

/// Time between two attempts to open a socket that cannot be opened.
const SOCKET_PAUSE: Duration = Duration::from_secs(1);

/// A sender of commands, to which the replies go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// The control port.
    Port,
    /// The client of the socket with this number.
    Client(u64),
}

/// The socket with its clients, and the control port.
#[derive(Default)]
pub(super) struct Callers {
    clients: Option<Clients>,
    /// The socket that could not be opened, if the host goes on without clients, and when it is tried again.
    unopened: Option<(PathBuf, Instant)>,
    port: Option<Port>,
}

impl Callers {
    /// Opens the socket and the control port of the configuration.
    pub(super) fn listen(&mut self, section: &HostSection) -> Result<(), HostError> {
        if let Some(name) = &section.control_port {
            self.port = Some(Port::open(name));
        }
        if let Some(path) = &section.socket {
            match Clients::listen(path) {
                Ok(clients) => self.clients = Some(clients),
                Err(error) => {
                    self.unopened.get_or_insert((path.clone(), Instant::now() + SOCKET_PAUSE));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Makes a socket again that was removed. Tries again to open the socket of a host that goes on without clients: what it
    /// failed for, such as too few file descriptors, may have come back, and nobody can do anything with a host that cannot
    /// be asked.
    pub(super) fn listen_again(&mut self) {
        if let Some(clients) = &mut self.clients {
            clients.listen_again();
        }
        let Some((path, due)) = &mut self.unopened else { return };
        if self.clients.is_none() {
            if Instant::now() < *due {
                return;
            }
            let Ok(clients) = Clients::listen(path) else {
                *due = Instant::now() + SOCKET_PAUSE;
                return;
            };
            tracing::info!("the socket {} is open after all", path.display());
            self.clients = Some(clients);
        }
        self.unopened = None;
    }

    fn clients(&self) -> impl Iterator<Item = &Client> {
        self.clients.iter().flat_map(|clients| &clients.all)
    }

    fn client(&mut self, number: u64) -> Option<&mut Client> {
        let mut all = self.clients.iter_mut().flat_map(|clients| &mut clients.all);
        all.find(|client| client.number == number)
    }

    /// Returns the socket, if a client can be accepted now.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.clients.as_ref()?.listener()
    }

    /// Returns what to wait for, of each caller.
    pub(super) fn fds(&self) -> impl Iterator<Item = (Caller, PollFd<'_>)> {
        let port = self.port.iter().filter_map(Port::interest);
        let port =
            port.map(|(fd, interest)| (Caller::Port, PollFd::from_borrowed_fd(fd, interest)));
        let clients = self.clients().map(|client| {
            (Caller::Client(client.number), PollFd::new(&client.lines, client.interest()))
        });
        port.chain(clients)
    }

    /// Returns the callers that are to be read without waiting: clients whose lines are here already, and a port whose
    /// time has come.
    pub(super) fn unpolled(&self) -> impl Iterator<Item = Caller> {
        let clients = self.clients().filter(|client| client.has_lines());
        let port = self.port.iter().filter(|port| port.is_due()).map(|_| Caller::Port);
        clients.map(|client| Caller::Client(client.number)).chain(port)
    }

    /// Returns how long the main loop may wait at most for the callers' sake. `None`: until one of them is ready.
    pub(super) fn timeout(&self) -> Option<Duration> {
        let heard = self.clients().any(Client::has_lines).then_some(Duration::ZERO);
        let paused = self.clients.as_ref().and_then(Clients::paused_for);
        let socket = self.unopened.as_ref().map(|(_, due)| *due);
        let look = self.clients.as_ref().map(Clients::next_look);
        let due =
            self.port.as_ref().and_then(Port::due).into_iter().chain(socket).chain(look).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        [heard, paused, due].into_iter().flatten().min()
    }

    /// Accepts a client. `is_waiting` tells who waits for a reply: such a client does not make room for another.
    pub(super) fn accept(&mut self, is_waiting: impl Fn(Caller) -> bool) {
        if let Some(clients) = &mut self.clients {
            clients.accept(|number| is_waiting(Caller::Client(number)));
        }
    }

    /// Tries again to open a control port that could not be opened, if its time has come. Returns whether it is open
    /// since now.
    pub(super) fn open_port_again(&mut self) -> bool {
        self.port.as_mut().is_some_and(Port::open_again)
    }

    /// Writes what a caller has not been told yet, and returns the lines that it has sent.
    pub(super) fn read(&mut self, caller: Caller) -> Vec<String> {
        match caller {
            Caller::Port => self.port.as_mut().map(Port::read).unwrap_or_default(),
            Caller::Client(number) => self.client(number).map(read_client).unwrap_or_default(),
        }
    }

    /// Sends a line to a caller, if it is still there.
    pub(super) fn tell(&mut self, caller: Caller, line: &Line) {
        match caller {
            Caller::Port => {
                if let Some(port) = &mut self.port {
                    port.send(line);
                }
            }
            Caller::Client(number) => {
                if let Some(client) = self.client(number) {
                    client.lines.send(&line.text());
                }
            }
        }
    }

    /// Whether a client has closed its connection. What it asked for before that is not carried out any more. The control
    /// port never counts as left, because its client may come back.
    pub(super) fn has_left(&self, caller: Caller) -> bool {
        match caller {
            Caller::Port => false,
            Caller::Client(number) => {
                (self.clients().find(|client| client.number == number)).is_none_or(Client::has_left)
            }
        }
    }

    /// Whether a caller is still known, and the control port has a client.
    pub(super) fn is_there(&self, caller: Caller) -> bool {
        match caller {
            Caller::Port => self.port.as_ref().is_some_and(|port| !port.has_left()),
            Caller::Client(number) => self.clients().any(|client| client.number == number),
        }
    }

    /// Forgets the clients that are gone. `is_waiting` tells who waits for a reply.
    pub(super) fn sweep(&mut self, is_waiting: impl Fn(Caller) -> bool) {
        if let Some(clients) = &mut self.clients {
            clients.sweep(|number| is_waiting(Caller::Client(number)));
        }
    }
}

fn read_client(client: &mut Client) -> Vec<String> {
    client.hear();
    match client.lines.flush().and_then(|()| client.lines.read()) {
        Ok(lines) => return lines,
        Err(StreamError::Closed) => client.end(),
        Err(error) => {
            let told = Line::Error { id: 0, error: chain(&error), outcome: None };
            client.lines.send(&told.text());
            client.lines.close();
        }
    }
    Vec::new()
}
