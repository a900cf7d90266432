//! The DHCP client (RFC 2131, 4.4) without sockets and clocks: messages and times go in, messages and changes of
//! the address come out.
//!
//! ```text
//!   Selecting --offer--> Requesting --ack--> Bound --T1--> renews --T2--> asks any server --end--> Selecting
//!       ^                    | nak, no answer           ack: Bound   nak: Selecting
//!       +--------------------+
//! ```
//!
//! Messages come from the network: one that does not belong to the current question, or whose address cannot be
//! that of a host, is ignored. The client does not probe by ARP whether the address is in use.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};

use crate::devices::interface::Mac;

/// Wait for an answer to the first message; it doubles with each repetition.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for an answer.
const LONGEST_WAIT: Duration = Duration::from_secs(64);
/// Number of requests for an offered address before the client looks for another offer.
const REQUESTS: u32 = 4;
/// Shortest time between two requests that extend a lease (4.4.5).
const BETWEEN_RENEWALS: Duration = Duration::from_secs(60);
/// Shortest lease that is taken as such. A shorter one would keep the client busy.
const SHORTEST_LEASE: Duration = Duration::from_secs(120);
/// Length of a lease without a limit.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// The options that the client asks for: subnet mask and router (RFC 2132).
const WANTED: [u8; 2] = [1, 3];

/// An address that a server has assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) address: Ipv4Addr,
    /// Length of the network's prefix, in bits: 1 to 32.
    pub(super) prefix: u8,
    pub(super) gateway: Option<Ipv4Addr>,
    pub(super) server: Ipv4Addr,
    /// Times after which the lease is to be extended: by its server, by any server, and when it ends.
    times: [Duration; 3],
}

impl Lease {
    /// Time for which the address is assigned.
    pub(super) fn duration(&self) -> Duration {
        self.times[2]
    }
}

/// What the host has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Send a message to this address.
    Send(Vec<u8>, Ipv4Addr),
    /// The host has this address.
    Configure(Lease),
    /// The host has no address any more.
    Deconfigure,
}

/// The client of one interface.
#[derive(Debug)]
pub(super) struct Client {
    mac: Mac,
    state: State,
    /// When [`due`](Self::due) has something to do.
    deadline: Instant,
    /// Identifies the current question (`xid`).
    transaction: u32,
    /// When the current question was asked first.
    asked: Instant,
    random: fn() -> u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Looks for an offer. Number of messages so far.
    Selecting(u32),
    /// Has asked for the offered address. Number of messages so far.
    Requesting { address: Ipv4Addr, server: Ipv4Addr, sent: u32 },
    /// Has an address since this moment.
    Bound(Lease, Instant),
}

impl Client {
    /// A client that has not sent anything. `random` gives random numbers.
    pub(super) fn new(mac: Mac, now: Instant, random: fn() -> u32) -> Self {
        let state = State::Selecting(0);
        Self { mac, state, deadline: now, transaction: random(), asked: now, random }
    }

    /// When [`due`](Self::due) is to be called.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Does what is due at `now`.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Action> {
        if now < self.deadline {
            return Vec::new();
        }
        match self.state {
            State::Requesting { sent: REQUESTS.., .. } => self.start_again(now),
            State::Selecting(sent) => {
                self.state = State::Selecting(sent.saturating_add(1));
                self.deadline = now + self.wait(sent);
                vec![self.broadcast(DhcpMessageType::Discover, now)]
            }
            State::Requesting { address, server, sent } => {
                self.state = State::Requesting { address, server, sent: sent + 1 };
                self.deadline = now + self.wait(sent);
                vec![self.broadcast(DhcpMessageType::Request, now)]
            }
            State::Bound(lease, since) => self.extend(lease, since, now),
        }
    }

    /// Asks for a longer lease, or gives it up at its end.
    fn extend(&mut self, lease: Lease, since: Instant, now: Instant) -> Vec<Action> {
        let [_, rebind, end] = lease.times.map(|time| since + time);
        if now >= end {
            return self.give_up(now);
        }
        if self.asked < since + lease.times[0] {
            self.ask_anew(now);
        }
        let next = if now < rebind { rebind } else { end };
        self.deadline = next.min(now + BETWEEN_RENEWALS.max((next - now) / 2));
        let message = self.message(DhcpMessageType::Request, now);
        vec![Action::Send(message, if now < rebind { lease.server } else { Ipv4Addr::BROADCAST })]
    }

    /// Takes a message that came in.
    pub(super) fn receive(&mut self, bytes: &[u8], now: Instant) -> Vec<Action> {
        let Ok(packet) = DhcpPacket::new_checked(bytes) else { return Vec::new() };
        let Ok(answer) = DhcpRepr::parse(&packet) else { return Vec::new() };
        let mine = answer.transaction_id == self.transaction
            && answer.client_hardware_address == EthernetAddress(self.mac.0);
        if !mine {
            return Vec::new();
        }
        match (answer.message_type, self.state) {
            (DhcpMessageType::Offer, State::Selecting(1..)) => self.offered(&answer, now),
            (DhcpMessageType::Ack, State::Requesting { address, server, .. }) => {
                let lease = lease(&answer).filter(|lease| lease.address == address);
                self.bind(lease.filter(|lease| lease.server == server), now)
            }
            (DhcpMessageType::Ack, State::Bound(old, since)) if self.extends(&old, since) => {
                self.bind(lease(&answer).filter(|new| new.address == old.address), now)
            }
            (DhcpMessageType::Nak, State::Requesting { .. }) => self.start_again(now),
            (DhcpMessageType::Nak, State::Bound(old, since)) if self.extends(&old, since) => {
                self.give_up(now)
            }
            _ => Vec::new(),
        }
    }

    /// Whether the client has asked for a longer lease.
    fn extends(&self, lease: &Lease, since: Instant) -> bool {
        self.asked >= since + lease.times[0]
    }

    fn offered(&mut self, offer: &DhcpRepr<'_>, now: Instant) -> Vec<Action> {
        let Some(server) = offer.server_identifier.filter(is_of_host) else { return Vec::new() };
        if !is_of_host(&offer.your_ip) {
            return Vec::new();
        }
        // The request has the transaction of the offer (4.4.1).
        self.state = State::Requesting { address: offer.your_ip, server, sent: 0 };
        self.deadline = now;
        self.due(now)
    }

    fn bind(&mut self, lease: Option<Lease>, now: Instant) -> Vec<Action> {
        let Some(lease) = lease else { return Vec::new() };
        self.state = State::Bound(lease, now);
        self.asked = now;
        self.deadline = now + lease.times[0];
        vec![Action::Configure(lease)]
    }

    /// Gives the address up and looks for another.
    fn give_up(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = vec![Action::Deconfigure];
        actions.append(&mut self.start_again(now));
        actions
    }

    /// Looks for an offer from now on.
    fn start_again(&mut self, now: Instant) -> Vec<Action> {
        self.state = State::Selecting(0);
        self.deadline = now;
        self.ask_anew(now);
        self.due(now)
    }

    fn ask_anew(&mut self, now: Instant) {
        self.transaction = (self.random)();
        self.asked = now;
    }

    /// How long to wait for an answer after `sent` messages without one, give or take a second (4.1), so that
    /// hosts that were switched on together do not ask together for ever.
    fn wait(&self, sent: u32) -> Duration {
        let wait = FIRST_WAIT.saturating_mul(1 << sent.min(16)).min(LONGEST_WAIT);
        let more = Duration::from_millis(u64::from((self.random)() % 2000));
        (wait + more).saturating_sub(Duration::from_secs(1))
    }

    fn broadcast(&self, kind: DhcpMessageType, now: Instant) -> Action {
        Action::Send(self.message(kind, now), Ipv4Addr::BROADCAST)
    }

    /// A message in the form that its state demands (RFC 2131, table 5).
    fn message(&self, kind: DhcpMessageType, now: Instant) -> Vec<u8> {
        let (client_ip, requested_ip, server_identifier) = match self.state {
            State::Selecting(_) => (Ipv4Addr::UNSPECIFIED, None, None),
            State::Requesting { address, server, .. } => {
                (Ipv4Addr::UNSPECIFIED, Some(address), Some(server))
            }
            State::Bound(lease, _) => (lease.address, None, None),
        };
        let seconds = now.saturating_duration_since(self.asked).as_secs();
        let message = DhcpRepr {
            message_type: kind,
            transaction_id: self.transaction,
            secs: u16::try_from(seconds).unwrap_or(u16::MAX),
            client_hardware_address: EthernetAddress(self.mac.0),
            client_ip,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            // Without an address the host cannot receive what is sent to one.
            broadcast: client_ip.is_unspecified(),
            requested_ip,
            client_identifier: Some(EthernetAddress(self.mac.0)),
            server_identifier,
            parameter_request_list: Some(&WANTED),
            dns_servers: None,
            max_size: Some(super::MESSAGE_MAX as u16),
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; message.buffer_len()];
        let mut packet = DhcpPacket::new_unchecked(&mut bytes[..]);
        message.emit(&mut packet).expect("the buffer is as long as the message says");
        bytes
    }
}

/// Whether `address` can be the address of one host.
fn is_of_host(address: &Ipv4Addr) -> bool {
    let is_class_e = address.octets()[0] >= 240;
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_class_e)
}

/// Returns the lease of an answer, if it is one that a host can use.
fn lease(answer: &DhcpRepr<'_>) -> Option<Lease> {
    let address = Some(answer.your_ip).filter(is_of_host)?;
    let server = answer.server_identifier.filter(is_of_host)?;
    let mask = answer.subnet_mask?.to_bits();
    let prefix = mask.leading_ones();
    // The bits of a netmask are ones and then zeroes. A mask without ones would be a network of all addresses.
    let contiguous = mask.checked_shl(prefix).unwrap_or(0) == 0;
    let prefix = u8::try_from(prefix).ok().filter(|prefix| contiguous && *prefix > 0)?;
    let in_network = |other: &Ipv4Addr| (other.to_bits() ^ address.to_bits()) & mask == 0;
    let gateway = answer.router.filter(|router| is_of_host(router) && in_network(router));
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let end = answer.lease_duration.map_or(FOREVER, seconds).max(SHORTEST_LEASE);
    let rebind = answer.rebind_duration.map(seconds).filter(|time| *time < end);
    let rebind = rebind.unwrap_or(end / 8 * 7);
    let renew = answer.renew_duration.map(seconds).filter(|time| *time < rebind);
    let renew = renew.unwrap_or((end / 2).min(rebind));
    Some(Lease { address, prefix, gateway, server, times: [renew, rebind, end] })
}
