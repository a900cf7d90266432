//! Gets the host's own address by DHCP (PID 1 only), on a thread that neither the VMs nor a live update wait for.
//!
//! ```text
//!   network --frames--> uplink's socket --> perennial dhcp: parses, decides      unprivileged
//!                                              | packets of a fixed shape
//!                                           this thread: checks, sets the address    PID 1
//! ```
//!
//! Frames of strangers never reach PID 1: a confined process of its own reads them (`process`). Frames of guests
//! do not even reach that process, because its socket receives only what comes in from the uplink's wire
//! (`frame::FILTER`).
//!
//! The lease is not carried over a live update: the next host asks again, and a server gives a client the address
//! that it had (RFC 2131, 4.3.1).

mod client;
mod frame;
mod lease;
mod process;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire_tests;

pub use process::{DhcpProcessError, run as run_process};

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{Errno, write};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair, sockopt};

use self::lease::{GO, Lease, Message, TEXT_MAX};
use crate::config::{Confine, HostSection};
use crate::confine;
use crate::devices::interface::{Interface, packet_socket, remove_gateway, set_gateway};
use crate::guests::confinement::last_user;
use crate::signals;

/// The subcommand of the process.
const COMMAND: &str = "dhcp";
/// Wait before the process is started again after its end; it doubles up to the longest with each time.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(64);

/// Whether this process speaks DHCP for a host, which started it. It is then not the host even with the ID 1.
pub fn is_dhcp_process() -> bool {
    confine::was_started_as(COMMAND)
}

/// The process that speaks DHCP cannot be used, or has ended.
#[derive(Debug, thiserror::Error)]
enum DhcpError {
    #[error("cannot {attempt}: {source}")]
    Start { attempt: &'static str, source: io::Error },
    #[error("`[host] confine` is \"required\", and the kernel does not allow {missing}")]
    Unconfined { missing: String },
    #[error("{0}")]
    Forbidden(String),
    #[error(
        "it sent a packet that is none of its messages: this is a bug, or an attack over the network"
    )]
    Malformed,
    #[error("it has ended")]
    Ended,
}

/// Starts the process that speaks DHCP. `user`: the user and group ID that it changes to; `mac`: the address of the
/// interface of `wire`, a packet socket. Returns the process and the socket that it talks to the host by.
pub fn start_process(
    user: u32,
    mac: &str,
    wire: OwnedFd,
) -> io::Result<(confine::Process, OwnedFd)> {
    let (here, there) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let arguments = ["--user", &user.to_string(), "--mac", mac].map(str::to_owned);
    let holds = "a socket on the uplink";
    let process = confine::Process::spawn(COMMAND, &arguments, wire, Some(there), holds)?;
    write(&here, GO)?;
    Ok((process, here))
}

/// Starts to get an address for `own` from a DHCP server on the wire of `uplink`, which is `own` itself or a port
/// of this bridge.
pub(super) fn start(own: &Interface, uplink: &str, section: &HostSection) -> io::Result<()> {
    let host = Host {
        // The server's answers to the host's address arrive at this port, too. Nobody reads the socket; without
        // it the kernel would answer that nobody listens.
        _port: own.udp_socket(frame::CLIENT)?,
        own: Interface::new(own.name())?,
        uplink: Interface::new(uplink)?,
        user: last_user(section.users.0),
        confinement_required: section.confine == Confine::Required,
        end: None,
        gateway: None,
    };
    let name = "dhcp".to_owned();
    let serve = move || {
        signals::leave_to_main_thread();
        host.serve_for_ever();
    };
    thread::Builder::new().name(name).spawn(serve).map(drop)
}

/// The host's side.
struct Host {
    _port: UdpSocket,
    /// The interface that has the address.
    own: Interface,
    uplink: Interface,
    user: u32,
    confinement_required: bool,
    /// When the current lease ends.
    end: Option<Instant>,
    /// The gateway of the current lease, through which the default route goes.
    gateway: Option<Ipv4Addr>,
}

impl Host {
    /// Starts the process again whenever it has ended.
    fn serve_for_ever(mut self) {
        let mut wait = FIRST_WAIT;
        loop {
            let begin = Instant::now();
            let Err(why) = self.serve();
            if begin.elapsed() > LONGEST_WAIT {
                wait = FIRST_WAIT;
            }
            tracing::warn!(
                "{}: the process that speaks DHCP: {why}; next attempt in {} s",
                self.uplink.name(),
                wait.as_secs()
            );
            thread::sleep(wait);
            wait = (2 * wait).min(LONGEST_WAIT);
        }
    }

    /// Starts the process, and does what it says until it ends.
    fn serve(&mut self) -> Result<std::convert::Infallible, DhcpError> {
        let (_process, socket) =
            self.spawn().map_err(|(attempt, source)| DhcpError::Start { attempt, source })?;
        let mut is_confined = false;
        loop {
            match self.receive(&socket)? {
                None => {}
                Some(Message::Confined(missing)) if !is_confined => {
                    self.accept(&missing)?;
                    is_confined = true;
                }
                Some(Message::Forbidden(why)) => return Err(DhcpError::Forbidden(why)),
                Some(Message::Lease(lease)) if is_confined => self.take(lease),
                Some(Message::NoLease) if is_confined => self.give_up(),
                Some(_) => return Err(DhcpError::Malformed),
            }
        }
    }

    fn spawn(&self) -> Result<(confine::Process, OwnedFd), (&'static str, io::Error)> {
        let wire = packet_socket(&self.uplink, &frame::FILTER)
            .map_err(|error| ("open a socket on the uplink", error))?;
        let mac = self.uplink.mac().map_err(|error| ("read the uplink's address", error))?;
        start_process(self.user, &mac.to_string(), wire).map_err(|error| ("start it", error))
    }

    /// Waits for the next message, or until the end of the lease. Returns `None` in the latter case.
    fn receive(&mut self, socket: &OwnedFd) -> Result<Option<Message>, DhcpError> {
        let left = self.end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            self.give_up();
            return Ok(None);
        }
        let start =
            |attempt| move |errno: Errno| DhcpError::Start { attempt, source: errno.into() };
        sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, left)
            .map_err(start("wait for its messages"))?;
        // One byte more than the longest message, so that a longer one shows.
        let mut packet = [0; TEXT_MAX + 1];
        match recv(socket, &mut packet[..], RecvFlags::empty()) {
            Ok((0, _)) | Err(Errno::CONNRESET) => Err(DhcpError::Ended),
            Ok((len, _)) => Message::decode(&packet[..len]).ok_or(DhcpError::Malformed).map(Some),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(start("read its messages")(errno)),
        }
    }

    /// Decides whether a process may go on whose confinement lacks these parts.
    fn accept(&self, missing: &[String]) -> Result<(), DhcpError> {
        match missing {
            [] => {}
            _ if self.confinement_required => {
                return Err(DhcpError::Unconfined { missing: missing.join("; ") });
            }
            _ => tracing::warn!(
                "the process that speaks DHCP is not confined in full: {}",
                missing.join("; ")
            ),
        }
        Ok(())
    }

    fn take(&mut self, lease: Lease) {
        self.end = (lease.duration < lease::FOREVER).then(|| Instant::now() + lease.duration);
        if let Err(error) = self.set(&lease) {
            let attempt = "take the address that a DHCP server has assigned";
            tracing::warn!("{}: cannot {attempt}: {error}", self.own.name());
        }
    }

    fn set(&mut self, lease: &Lease) -> io::Result<()> {
        let Lease { address, prefix, gateway, server, duration } = lease;
        if self.own.address()? != Some((*address, *prefix)) {
            tracing::info!(
                "{}: address {address}/{prefix} for {} s, from the DHCP server {server}",
                self.own.name(),
                duration.as_secs(),
            );
            // The route goes with the address.
            self.gateway = None;
            self.own.remove_address()?;
            self.own.set_address(*address, *prefix)?;
        }
        if self.gateway == *gateway {
            return Ok(());
        }
        let shown = gateway.map_or("none".to_owned(), |gateway| gateway.to_string());
        tracing::info!("{}: gateway {shown}, from the DHCP server {server}", self.own.name());
        // The new route first, so that there is always one.
        gateway.map_or(Ok(()), set_gateway)?;
        match std::mem::replace(&mut self.gateway, *gateway) {
            Some(last) => remove_gateway(last),
            None => Ok(()),
        }
    }

    fn give_up(&mut self) {
        (self.end, self.gateway) = (None, None);
        tracing::warn!("{}: the DHCP server has not extended the lease", self.own.name());
        if let Err(error) = self.own.remove_address() {
            tracing::warn!("{}: cannot give up its address: {error}", self.own.name());
        }
    }
}
