//! Where the output of a serial port goes and its input comes from.
//!
//! ```text
//!   a fixed sink:     a file, a terminal, a port of the host
//!   a pseudoterminal: a program opens it and closes it, again and again
//!   a listener:       one client at a time; a new one takes the place of the one before
//! ```
//!
//! A client that hangs cannot keep others out, because the next client replaces it. While nobody is there,
//! the output waits in the port's outbox, which keeps the latest.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use event_manager::{EventOps, Events};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recvmsg,
};
use vmm_sys_util::epoll::EventSet;

use super::sink::{Peer, Sink};

/// Most clients that are accepted in one go. All but the last are replaced at once.
const MOST_CLIENTS: usize = 16;
/// The last words to a client whose place another takes.
const REPLACED: &[u8] = b"\r\n[perennial: another client has taken this console]\r\n";

/// The console of a serial port.
#[derive(Default)]
pub(super) struct Console {
    pub(super) sink: Option<Sink>,
    pub(super) listener: Option<OwnedFd>,
    pub(super) opened: Option<OwnedFd>,
    /// Where the host sends the sinks that follow the present one.
    pub(super) next: Option<OwnedFd>,
}

/// Whether further clients may wait.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    All,
    Some,
}

impl Console {
    pub(super) const SINK: u32 = 1;
    pub(super) const LISTENER: u32 = 2;
    pub(super) const OPENED: u32 = 3;
    pub(super) const NEXT: u32 = 4;

    pub(super) fn new(
        sink: Option<OwnedFd>,
        listener: Option<OwnedFd>,
        opened: Option<OwnedFd>,
        next: Option<OwnedFd>,
    ) -> Self {
        let peer = if opened.is_some() { Peer::Pty } else { Peer::Fixed };
        Self { sink: sink.map(|fd| Sink::new(fd, peer)), listener, opened, next }
    }

    /// Whether output waits for somebody who takes it. Otherwise output without a sink is dropped.
    pub(super) fn keeps_output(&self) -> bool {
        self.listener.is_some()
    }

    /// The sink, if it takes output.
    pub(super) fn output(&mut self) -> Option<&mut Sink> {
        self.sink.as_mut().filter(|sink| sink.peer != Peer::LeavingClient)
    }

    /// Has all files watched.
    pub(super) fn watch(&self, ops: &mut EventOps<'_>) {
        if let Some(sink) = &self.sink {
            watch_sink(sink, ops);
        }
        let sources = [
            (&self.listener, Self::LISTENER),
            (&self.opened, Self::OPENED),
            (&self.next, Self::NEXT),
        ];
        for (fd, data) in sources {
            let Some(fd) = fd else { continue };
            let when = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::with_data(fd, data, when)) {
                tracing::error!(%error, "the serial port cannot watch a file");
            }
        }
    }

    /// Accepts the clients that wait. The last of them has the console.
    pub(super) fn accept(&mut self, ops: &mut EventOps<'_>) -> Accepted {
        for _ in 0..MOST_CLIENTS {
            let Some(listener) = &self.listener else { return Accepted::All };
            match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(client) => {
                    if let Some(before) = &mut self.sink {
                        let _ = before.file.write(REPLACED);
                    }
                    self.detach(ops);
                    let client = Sink::new(client, Peer::Client);
                    watch_sink(&client, ops);
                    self.sink = Some(client);
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Accepted::All,
                Err(errno) => {
                    tracing::warn!("a client of the serial port cannot be accepted: {errno}");
                    return Accepted::All;
                }
            }
        }
        Accepted::Some
    }

    /// Drops the client.
    pub(super) fn detach(&mut self, ops: &mut EventOps<'_>) {
        if let Some(sink) = self.sink.take() {
            let _ = ops.remove(Events::empty(&sink.file));
        }
    }

    /// Takes the sinks that the host has sent: the last of them is the sink from now on.
    pub(super) fn take_next(&mut self) {
        while let Some(next) = self.next.as_ref().and_then(receive) {
            self.sink = Some(Sink::new(next, Peer::Fixed));
        }
    }

    /// Forgets that a program has opened the pseudoterminal.
    pub(super) fn read_opened(&self) {
        let mut events = [0; 1024];
        if let Some(opened) = &self.opened {
            while rustix::io::read(opened, &mut events).is_ok_and(|count| count > 0) {}
        }
    }
}

fn watch_sink(sink: &Sink, ops: &mut EventOps<'_>) {
    let when = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    // epoll refuses a regular file, whose writes never wait.
    let _ = ops.add(Events::with_data(&sink.file, Console::SINK, when));
}

/// Receives one file, if one has been sent.
fn receive(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}
