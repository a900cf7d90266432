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

use super::frame::MESSAGE_MAX;
use super::lease::{FOREVER, Lease, is_of_host};
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
/// The options that the client asks for: subnet mask and router (RFC 2132).
const WANTED: [u8; 2] = [1, 3];

/// A lease, and when it is to be extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    lease: Lease,
    /// Times after which the lease is to be extended: by its server, by any server.
    renew: Duration,
    rebind: Duration,
}

/// What the client wants to be done.
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
    Bound(Held, Instant),
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

    /// The address from which the client sends: its own, once it has one.
    pub(super) fn source(&self) -> Ipv4Addr {
        match self.state {
            State::Bound(held, _) => held.lease.address,
            State::Selecting(_) | State::Requesting { .. } => Ipv4Addr::UNSPECIFIED,
        }
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
            State::Bound(held, since) => self.extend(held, since, now),
        }
    }

    /// Asks for a longer lease, or gives it up at its end.
    fn extend(&mut self, held: Held, since: Instant, now: Instant) -> Vec<Action> {
        let Held { lease, renew, rebind } = held;
        let (rebind, end) = (since + rebind, since + lease.duration);
        if now >= end {
            return self.give_up(now);
        }
        if self.asked < since + renew {
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
                let held = held(&answer).filter(|held| held.lease.address == address);
                self.bind(held.filter(|held| held.lease.server == server), now)
            }
            (DhcpMessageType::Ack, State::Bound(old, since)) if self.extends(&old, since) => {
                let new = held(&answer).filter(|new| new.lease.address == old.lease.address);
                self.bind(new, now)
            }
            (DhcpMessageType::Nak, State::Requesting { .. }) => self.start_again(now),
            (DhcpMessageType::Nak, State::Bound(old, since)) if self.extends(&old, since) => {
                self.give_up(now)
            }
            _ => Vec::new(),
        }
    }

    /// Whether the client has asked for a longer lease.
    fn extends(&self, held: &Held, since: Instant) -> bool {
        self.asked >= since + held.renew
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

    fn bind(&mut self, held: Option<Held>, now: Instant) -> Vec<Action> {
        let Some(held) = held else { return Vec::new() };
        self.state = State::Bound(held, now);
        self.asked = now;
        self.deadline = now + held.renew;
        vec![Action::Configure(held.lease)]
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
            State::Bound(held, _) => (held.lease.address, None, None),
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
            max_size: Some(MESSAGE_MAX as u16),
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

/// Returns the lease of an answer, if it is one that a host can use.
fn held(answer: &DhcpRepr<'_>) -> Option<Held> {
    let mask = answer.subnet_mask?.to_bits();
    let prefix = mask.leading_ones();
    // The bits of a netmask are ones and then zeroes.
    (mask.checked_shl(prefix).unwrap_or(0) == 0).then_some(())?;
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let duration = answer.lease_duration.map_or(FOREVER, seconds).max(SHORTEST_LEASE);
    let without_gateway = Lease {
        address: answer.your_ip,
        prefix: u8::try_from(prefix).ok()?,
        gateway: None,
        server: answer.server_identifier?,
        duration,
    };
    without_gateway.is_usable().then_some(())?;
    let lease = Lease { gateway: answer.router, ..without_gateway };
    let lease = if lease.is_usable() { lease } else { without_gateway };
    let rebind = answer.rebind_duration.map(seconds).filter(|time| *time < duration);
    let rebind = rebind.unwrap_or(duration / 8 * 7);
    let renew = answer.renew_duration.map(seconds).filter(|time| *time < rebind);
    let renew = renew.unwrap_or((duration / 2).min(rebind));
    Some(Held { lease, renew, rebind })
}
