//! Gets the host's own address by DHCP (PID 1 only), on a thread that neither the VMs nor a live update wait for.
//!
//! The lease is not carried over a live update: the next host asks again, and a server gives a client the address
//! that it had (RFC 2131, 4.3.1).

mod client;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use self::client::{Action, Client};
use crate::devices::interface::{Interface, set_gateway};

/// The ports of client and server.
const CLIENT: u16 = 68;
const SERVER: u16 = 67;
/// Most bytes of a message that the client takes: what fits a packet of Ethernet.
const MESSAGE_MAX: usize = 1472;
/// Number of questions without any answer after which the log says so.
const SILENT: u32 = 3;

/// Starts the client on `interface`.
pub(super) fn start(interface: &Interface) -> io::Result<()> {
    let socket = interface.udp_socket(CLIENT)?;
    let mac = interface.mac()?;
    let interface = Interface::new(interface.name())?;
    let client = Client::new(mac, Instant::now(), random);
    let name = "dhcp".to_owned();
    thread::Builder::new().name(name).spawn(move || run(&interface, &socket, client)).map(drop)
}

fn random() -> u32 {
    // A `RandomState` has random keys. The first ones of a process are from getrandom(2).
    RandomState::new().hash_one(Instant::now()) as u32
}

/// Runs the client for ever.
fn run(interface: &Interface, socket: &UdpSocket, mut client: Client) {
    let mut unanswered = 0;
    let mut message = [0; MESSAGE_MAX];
    loop {
        let now = Instant::now();
        let mut actions = client.due(now);
        unanswered += u32::from(!actions.is_empty());
        if unanswered == SILENT {
            tracing::warn!("{}: no DHCP server answers; asking on", interface.name());
        }
        if actions.is_empty() {
            actions = match receive(socket, &mut message, client.deadline() - now) {
                Some(bytes) => client.receive(bytes, Instant::now()),
                None => Vec::new(),
            };
            if !actions.is_empty() {
                unanswered = 0;
            }
        }
        for action in &actions {
            if let Err(error) = perform(action, interface, socket) {
                tracing::warn!("{}: cannot {}: {error}", interface.name(), attempt(action));
            }
        }
    }
}

/// Waits for a message, for at most `wait`.
fn receive<'m>(socket: &UdpSocket, message: &'m mut [u8], wait: Duration) -> Option<&'m [u8]> {
    // A timeout of 0 would be none.
    let wait = wait.clamp(Duration::from_millis(1), Duration::from_secs(3600));
    let received = socket.set_read_timeout(Some(wait)).and_then(|()| socket.recv_from(message));
    match received {
        Ok((count, from)) if from.port() == SERVER => Some(&message[..count]),
        Ok(_) => None,
        Err(error) if is_nothing_yet(&error) => None,
        Err(error) => {
            tracing::debug!("DHCP: cannot receive: {error}");
            // Such as ENETDOWN, which would be reported again at once.
            thread::sleep(wait.min(Duration::from_secs(1)));
            None
        }
    }
}

fn is_nothing_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn perform(action: &Action, interface: &Interface, socket: &UdpSocket) -> io::Result<()> {
    match action {
        Action::Send(message, to) => socket.send_to(message, (*to, SERVER)).map(drop),
        Action::Deconfigure => {
            tracing::warn!("{}: the DHCP server has not extended the lease", interface.name());
            interface.remove_address()
        }
        Action::Configure(lease) => {
            if interface.address()? == Some((lease.address, lease.prefix)) {
                return Ok(());
            }
            tracing::info!(
                "{}: address {}/{} for {} s, from the DHCP server {}",
                interface.name(),
                lease.address,
                lease.prefix,
                lease.duration().as_secs(),
                lease.server
            );
            interface.remove_address()?;
            interface.set_address(lease.address, lease.prefix)?;
            lease.gateway.map_or(Ok(()), set_gateway)
        }
    }
}

fn attempt(action: &Action) -> &'static str {
    match action {
        Action::Send(..) => "send a DHCP message",
        Action::Configure(_) => "take the address that a DHCP server has assigned",
        Action::Deconfigure => "give up its address",
    }
}
