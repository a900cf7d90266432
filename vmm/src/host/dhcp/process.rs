//! The process that speaks DHCP for the host: `perennial dhcp`.
//!
//! Everybody on the network can send it frames, so it has no power: before it reads the first frame it confines
//! itself as a VM's process does. It has the socket on the uplink as standard input and the host's as standard
//! output, and ends when the host closes that. A stranger who has taken the process over cannot keep it running: the
//! kernel kills the process when the host ends.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, write};
use rustix::time::Timespec;

use super::client::{Action, Client};
use super::frame::{FRAME_MAX, Frame};
use super::lease::{FORBIDDEN, GO, Message};
use crate::confine;
use crate::devices::interface::Mac;
use crate::random::random;

/// Number of questions without any answer after which the log says so.
const SILENT: u32 = 3;
/// Most frames that are read before the client looks at the time.
const BATCH: usize = 64;

/// The process cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DhcpProcessError {
    /// Files that the host left open cannot be closed: a kernel before Linux 5.9.
    #[error("cannot close the files that the host may have left open")]
    Files(#[source] io::Error),
    /// The address on the command line is not one of an interface.
    #[error("--mac: {0}")]
    Mac(String),
    /// Standard input or output is not what the host passes.
    #[error("cannot {attempt}; `perennial dhcp` is started by the host")]
    Socket {
        /// The step.
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Serves the host that started this process, until the host closes standard output. `user`: the user and group
/// ID to change to; `mac`: the address of the interface.
pub fn run(user: u32, mac: &str) -> Result<(), DhcpProcessError> {
    confine::close_all_files_from(3).map_err(DhcpProcessError::Files)?;
    let mac = Mac::parse(mac).map_err(DhcpProcessError::Mac)?;
    let (wire, host) = (io::stdin(), io::stdout());
    let (wire, host) = (wire.as_fd(), host.as_fd());
    let report = confine::Report { socket: host.as_raw_fd(), before: FORBIDDEN, after: "" };
    let mut missing = confine::isolate(user);
    // By then the process is a child of the host's main thread.
    wait_for_go(host)?;
    missing.extend(confine::end_with_host());
    // Every thread may read, write and wait, and this one does nothing else.
    missing.extend(confine::filter(&[], report));
    let missing = missing.iter().map(ToString::to_string).collect();
    tell(host, &Message::Confined(missing))?;
    Speaker::new(wire, mac).speak(host)
}

/// Waits for the host's only message: the thread of the host that has started this process has ended.
fn wait_for_go(host: BorrowedFd<'_>) -> Result<(), DhcpProcessError> {
    let mut go = [0; GO.len()];
    match read(host, &mut go) {
        Ok(_) => Ok(()),
        Err(errno) => Err(failed("read the host's message on standard output", errno)),
    }
}

/// The client with its wire.
pub(super) struct Speaker<'f> {
    wire: BorrowedFd<'f>,
    mac: Mac,
    client: Client,
    /// Whose frame assigned the current address: the server, or a relay on the way to it. Messages to the
    /// server go there.
    server: Mac,
    /// Questions since the last answer.
    unanswered: u32,
}

impl<'f> Speaker<'f> {
    pub(super) fn new(wire: BorrowedFd<'f>, mac: Mac) -> Self {
        let client = Client::new(mac, Instant::now(), || random() as u32);
        Self { wire, mac, client, server: Mac::BROADCAST, unanswered: 0 }
    }

    /// Gets an address and keeps it, until the other end of `host` is closed.
    pub(super) fn speak(&mut self, host: BorrowedFd<'_>) -> Result<(), DhcpProcessError> {
        loop {
            let actions = self.client.due(Instant::now());
            self.unanswered += u32::from(!actions.is_empty());
            if self.unanswered == SILENT {
                tracing::warn!("no DHCP server answers; asking on");
                self.unanswered += 1;
            }
            self.perform(&actions, host)?;
            let wait = self.client.deadline().saturating_duration_since(Instant::now());
            // The end of a wait and the end of the host both show only when asked for.
            let mut ready = [
                PollFd::new(&self.wire, PollFlags::IN),
                PollFd::from_borrowed_fd(host, PollFlags::empty()),
            ];
            match poll(&mut ready, Some(&timeout(wait))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(failed("wait for frames", errno)),
            }
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            for _ in 0..BATCH {
                if !self.receive(host)? {
                    break;
                }
            }
        }
    }

    /// Reads one frame. Returns whether there may be another.
    fn receive(&mut self, host: BorrowedFd<'_>) -> Result<bool, DhcpProcessError> {
        let mut bytes = [0; FRAME_MAX];
        let len = match read(self.wire, &mut bytes) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            // The uplink is switched off. It may come back.
            Err(Errno::NETDOWN) => return Ok(false),
            Err(errno) => return Err(failed("read a frame from standard input", errno)),
        };
        if let Some(frame) = Frame::parse(&bytes[..len]) {
            let actions = self.client.receive(frame.message, Instant::now());
            if !actions.is_empty() {
                self.unanswered = 0;
            }
            if actions.iter().any(|action| matches!(action, Action::Configure(_))) {
                self.server = frame.from.0;
            }
            self.perform(&actions, host)?;
        }
        Ok(true)
    }

    fn perform(
        &mut self,
        actions: &[Action],
        host: BorrowedFd<'_>,
    ) -> Result<(), DhcpProcessError> {
        for action in actions {
            match action {
                Action::Send(message, to) => self.send(message, *to)?,
                Action::Configure(lease) => tell(host, &Message::Lease(*lease))?,
                Action::Deconfigure => tell(host, &Message::NoLease)?,
            }
        }
        Ok(())
    }

    fn send(&self, message: &[u8], to: Ipv4Addr) -> Result<(), DhcpProcessError> {
        let mac = if to.is_broadcast() { Mac::BROADCAST } else { self.server };
        let from = (self.mac, self.client.source());
        match write(self.wire, &Frame { from, to: (mac, to), message }.to_bytes()) {
            Ok(_) => Ok(()),
            // The interface is gone: the host opens another socket when there is one again.
            Err(errno @ (Errno::NXIO | Errno::NODEV)) => {
                Err(failed("send a frame through standard input", errno))
            }
            Err(errno) => {
                tracing::warn!("cannot send a DHCP message: {errno}");
                Ok(())
            }
        }
    }
}

/// Returns `wait` for poll(2), rounded up to a millisecond: a shorter wait would end before the deadline.
fn timeout(wait: Duration) -> Timespec {
    let wait = (wait + Duration::from_millis(1)).min(Duration::from_secs(3600));
    Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() }
}

fn tell(host: BorrowedFd<'_>, message: &Message) -> Result<(), DhcpProcessError> {
    match write(host, &message.encode()) {
        Ok(_) => Ok(()),
        Err(errno) => Err(failed("write to the host on standard output", errno)),
    }
}

fn failed(attempt: &'static str, errno: Errno) -> DhcpProcessError {
    DhcpProcessError::Socket { attempt, source: errno.into() }
}
