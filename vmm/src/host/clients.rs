//! The clients of the API's socket: how many, for how long, and who makes room for the next one.
//!
//! Clients are many, and none is trusted to behave: they may stay without a word, send without end, never read, or
//! leave while the host is busy. None of that may keep an operator's `ctl` from being served.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::HostError;
use crate::api::Lines;
use crate::look;
use crate::socket::listen;

/// Most clients at a time.
const MOST: usize = 64;
/// Most clients that wait for replies and are not sent away for it. The other places are for those that have just come.
const MOST_WAITING: usize = 48;
/// How long no client is accepted after the host could not accept one, for want of file descriptors or memory.
const PAUSE: Duration = Duration::from_millis(500);
/// Time between two looks at the socket's path, and how long one may take.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
const LOOK_WITHIN: Duration = Duration::from_millis(100);

/// A client.
pub(super) struct Client {
    /// Differs from that of every other client, also of those that are gone.
    pub(super) number: u64,
    pub(super) lines: Lines,
    /// When it was accepted, or was last heard of.
    heard: Instant,
    /// Whether it will send nothing more, and stays for its replies.
    has_said_all: bool,
}

impl Client {
    /// Whether it closed its connection. What it asked for before that is not carried out any more: nobody
    /// would learn what came of it.
    pub(super) fn has_left(&self) -> bool {
        let mut fd = [PollFd::new(&self.lines, PollFlags::empty())];
        poll(&mut fd, Some(&Timespec::default())).is_ok()
            && fd[0].revents().contains(PollFlags::HUP)
    }

    /// What to wait for. A client that does not read its replies is not read from either.
    pub(super) fn interest(&self) -> PollFlags {
        match (self.lines.is_behind(), self.has_said_all) {
            (true, _) => PollFlags::OUT,
            (false, false) => PollFlags::IN,
            // That it leaves is reported in any case.
            (false, true) => PollFlags::empty(),
        }
    }

    /// Whether it has sent lines that are to be read without waiting.
    pub(super) fn has_lines(&self) -> bool {
        self.lines.has_lines() && !self.lines.is_behind()
    }

    /// Notes that it will send nothing more.
    pub(super) fn end(&mut self) {
        match self.has_left() {
            true => self.lines.close(),
            false => self.has_said_all = true,
        }
    }

    /// Notes that it is at work.
    pub(super) fn hear(&mut self) {
        self.heard = Instant::now();
    }
}

/// What tells the socket at a path from another one that is made there later: device, inode number, and when it was made,
/// where the file system knows that.
#[derive(Debug, PartialEq, Eq)]
struct Identity(u64, u64, Option<SystemTime>);

impl Identity {
    /// The identity of what is at `path`. `None` if nothing can be found there.
    fn at(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        Some(Self(found.dev(), found.ino(), found.created().ok()))
    }
}

/// The listening socket and its clients.
pub(super) struct Clients {
    listener: UnixListener,
    path: PathBuf,
    /// What is at the path while clients reach this host there.
    own: Option<Identity>,
    /// When the path is looked at next.
    next_look: Instant,
    /// Whether the log says already that clients do not reach this host.
    is_lost: bool,
    pub(super) all: Vec<Client>,
    next: u64,
    /// Until when no client is accepted.
    paused: Option<Instant>,
}

impl Clients {
    /// Listens at `path`.
    pub(super) fn listen(path: &Path) -> Result<Self, HostError> {
        let error = |source| HostError::Socket { path: path.to_owned(), source };
        let listener = listen(path).map_err(error)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            own: Identity::at(path),
            next_look: Instant::now() + LOOK_PAUSE,
            is_lost: false,
            all: Vec::new(),
            next: 0,
            paused: None,
        })
    }

    /// Makes the socket again if it was removed, as by a program that cleans up: nobody could tell the host anything any
    /// more. What another process has made at the path is left as it is, unless it is a socket without a listener. Clients
    /// that are connected stay.
    pub(super) fn listen_again(&mut self) {
        if Instant::now() < self.next_look {
            return;
        }
        let seen =
            look::at(std::slice::from_ref(&self.path), LOOK_WITHIN, Identity::at).pop().flatten();
        self.next_look = Instant::now() + LOOK_PAUSE;
        // A file system that hangs may have the socket.
        let Some(found) = seen else { return };
        if self.own.is_some() && found == self.own {
            self.is_lost = false;
            return;
        }
        let path = self.path.display();
        match listen(&self.path) {
            Ok(listener) => {
                tracing::warn!("the socket {path} was removed: it is made again");
                (self.listener, self.own) = (listener, Identity::at(&self.path));
                self.is_lost = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_lost, true) {
                    tracing::error!(
                        "the socket {path} was removed, and clients cannot reach this host: {error}"
                    );
                }
            }
        }
    }

    /// When [`listen_again`](Self::listen_again) has something to do.
    pub(super) fn next_look(&self) -> Instant {
        self.next_look
    }

    /// Returns the listener, if a client can be accepted now.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.paused_for().is_none().then_some(self.listener.as_fd())
    }

    /// How long no client is accepted from now on, if so.
    pub(super) fn paused_for(&self) -> Option<Duration> {
        let left = self.paused?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Accepts a client. If there are too many, or the host has no file descriptor left, another one is sent away for it:
    /// the one that has been idle for the longest time, or, if [`MOST_WAITING`] wait for replies (`is_waiting`), the one
    /// that has waited for the longest time. What that one asked for is done all the same.
    pub(super) fn accept(&mut self, is_waiting: impl Fn(u64) -> bool) {
        if self.all.len() >= MOST {
            self.send_one_away(&is_waiting);
        }
        match self.listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        }) {
            Ok(stream) => {
                let (number, lines) = (self.next, Lines::new(OwnedFd::from(stream)));
                self.next += 1;
                self.all.push(Client { number, lines, heard: Instant::now(), has_said_all: false });
                self.paused = None;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                // Once, not at each attempt: the log may be on a disk that is full for the same reason.
                if self.paused.is_none() {
                    tracing::warn!("a client of the API cannot be accepted: {error}");
                }
                self.send_one_away(&is_waiting);
                self.paused = Some(Instant::now() + PAUSE);
            }
        }
    }

    /// Forgets the clients that are gone, and those that have said all and wait for nothing.
    pub(super) fn sweep(&mut self, is_waiting: impl Fn(u64) -> bool) {
        self.all.retain(|client| {
            let waits = client.lines.is_behind() || is_waiting(client.number);
            !client.lines.is_closed() && (waits || !client.has_said_all)
        });
    }

    fn send_one_away(&mut self, is_waiting: impl Fn(u64) -> bool) {
        let waiting: Vec<bool> = self.all.iter().map(|client| is_waiting(client.number)).collect();
        let too_many_wait = waiting.iter().filter(|waits| **waits).count() > MOST_WAITING;
        let candidates = (0..self.all.len()).filter(|index| waiting[*index] == too_many_wait);
        if let Some(index) = candidates.min_by_key(|index| self.all[*index].heard) {
            self.all.remove(index);
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // Another host may listen there by now.
        if self.own.is_some() && Identity::at(&self.path) == self.own {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn clients() -> (tempfile::TempDir, Clients) {
        let directory = tempfile::tempdir().unwrap();
        let clients = Clients::listen(&directory.path().join("socket")).unwrap();
        (directory, clients)
    }

    fn connect(clients: &mut Clients, is_waiting: impl Fn(u64) -> bool) -> UnixStream {
        let stream = UnixStream::connect(&clients.path).unwrap();
        assert!(clients.listener().is_some());
        clients.accept(is_waiting);
        stream
    }

    #[test]
    fn a_socket_that_was_removed_is_made_again_and_clients_stay() {
        let (_directory, mut clients) = clients();
        let path = clients.path.clone();
        let _before = connect(&mut clients, |_| false);
        fs::remove_file(&path).unwrap();
        clients.listen_again();
        assert!(!path.exists(), "it is not looked at all the time");
        clients.next_look = Instant::now();
        clients.listen_again();
        let _after = connect(&mut clients, |_| false);
        assert_eq!(numbers(&clients), [0, 1]);
        // One that is there is not made again.
        let own = Identity::at(&path);
        clients.next_look = Instant::now();
        clients.listen_again();
        assert_eq!(Identity::at(&path), own);
        drop(clients);
        assert!(!path.exists());
    }

    #[test]
    fn what_another_process_has_made_at_the_path_stays() {
        let (_directory, mut clients) = clients();
        let path = clients.path.clone();
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        clients.next_look = Instant::now();
        clients.listen_again();
        assert!(clients.is_lost);
        let _client = UnixStream::connect(&path).unwrap();
        other.accept().unwrap();
        drop(clients);
        assert!(path.exists());
    }

    fn numbers(clients: &Clients) -> Vec<u64> {
        clients.all.iter().map(|client| client.number).collect()
    }

    #[test]
    fn the_client_that_was_idle_for_the_longest_time_makes_room() {
        let (_directory, mut clients) = clients();
        let mut streams: Vec<_> = (0..MOST).map(|_| connect(&mut clients, |_| false)).collect();
        clients.all[0].hear();
        streams.push(connect(&mut clients, |number| number == 1));
        let left: Vec<u64> = (0..=MOST as u64).filter(|number| *number != 2).collect();
        assert_eq!(numbers(&clients), left);
        assert_eq!(streams[2].read(&mut [0; 1]).unwrap(), 0, "it is told");
    }

    #[test]
    fn clients_that_wait_for_replies_stay_but_cannot_keep_others_out() {
        let (_directory, mut clients) = clients();
        let waits = |most: usize| move |number: u64| number < most as u64;
        let mut streams: Vec<_> = (0..MOST).map(|_| connect(&mut clients, |_| true)).collect();
        streams.push(connect(&mut clients, waits(MOST_WAITING)));
        assert_eq!(clients.all[0].number, 0, "an idle one makes room while so many wait");
        streams.push(connect(&mut clients, waits(MOST)));
        assert_eq!(clients.all[0].number, 1, "the one that has waited for the longest time");
    }

    #[test]
    fn a_client_that_closed_its_connection_has_left_and_one_that_only_stopped_writing_has_not() {
        let (_directory, mut clients) = clients();
        let mut stream = connect(&mut clients, |_| false);
        stream.write_all(b"a line\n").unwrap();
        assert!(!clients.all[0].has_left());
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!clients.all[0].has_left());
        drop(stream);
        assert!(clients.all[0].has_left());
    }

    #[test]
    fn a_client_that_does_not_read_is_not_read_from() {
        let (_directory, mut clients) = clients();
        let mut stream = connect(&mut clients, |_| false);
        stream.write_all(b"1\n2\n3\n4\n5\n6\n7\n8\n9\n").unwrap();
        let client = &mut clients.all[0];
        assert_eq!(client.lines.read().unwrap().len(), 8);
        assert!(client.has_lines());
        client.lines.write(&"x".repeat(1 << 20)).unwrap();
        assert!(!client.has_lines());
        assert_eq!(client.interest(), PollFlags::OUT);
    }
}
