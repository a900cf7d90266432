//! Tests of the client against a server that the test plays.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};

use super::client::{Action, Client};
use crate::devices::interface::Mac;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// An answer that fits `question`.
fn answer(question: &DhcpRepr<'_>, message_type: DhcpMessageType) -> DhcpRepr<'static> {
    answer_about(question.transaction_id, question.client_hardware_address, message_type)
}

/// An answer to the question of `client` with the number `transaction_id`.
pub(super) fn answer_about(
    transaction_id: u32,
    client: EthernetAddress,
    message_type: DhcpMessageType,
) -> DhcpRepr<'static> {
    DhcpRepr {
        message_type,
        transaction_id,
        secs: 0,
        client_hardware_address: client,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: ADDRESS,
        server_ip: SERVER,
        router: Some(SERVER),
        subnet_mask: Some(NETMASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: true,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(SERVER),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: Some(3600),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    }
}

pub(super) fn bytes(message: &DhcpRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
    bytes
}

struct Network {
    client: Client,
    now: Instant,
}

impl Network {
    fn new() -> Self {
        let now = Instant::now();
        Self { client: Client::new(MAC, now, || 1000), now }
    }

    /// Lets time pass until the client has something to do. Returns that, and how many seconds it took.
    fn next(&mut self) -> (Vec<Action>, u64) {
        let passed = self.client.deadline() - self.now;
        self.now += passed;
        (self.client.due(self.now), passed.as_secs())
    }

    fn passed_since(&self, start: Instant) -> Duration {
        self.now - start
    }

    fn receive(&mut self, message: &DhcpRepr<'_>) -> Vec<Action> {
        self.client.receive(&bytes(message), self.now)
    }

    /// Brings the client to an address, by `change`d answers. Returns what it does with the last one.
    fn bind(&mut self, change: fn(&mut DhcpRepr<'static>)) -> Vec<Action> {
        let (discover, _) = self.next();
        let mut offer = with_question(&discover, |q| answer(q, DhcpMessageType::Offer));
        change(&mut offer);
        let request = self.receive(&offer);
        let mut ack = match &request[..] {
            [Action::Send(..)] => with_question(&request, |q| answer(q, DhcpMessageType::Ack)),
            _ => return request,
        };
        change(&mut ack);
        self.receive(&ack)
    }
}

/// Parses the one message of `actions`.
fn with_question<T>(actions: &[Action], look: impl FnOnce(&DhcpRepr<'_>) -> T) -> T {
    let [Action::Send(bytes, _)] = actions else { panic!("not one message: {actions:?}") };
    let packet = DhcpPacket::new_checked(&bytes[..]).unwrap();
    look(&DhcpRepr::parse(&packet).unwrap())
}

#[test]
fn an_address_is_offered_requested_and_taken() {
    let mut network = Network::new();
    let (discover, waited) = network.next();
    assert_eq!(waited, 0);
    let offer = with_question(&discover, |question| {
        assert_eq!(question.message_type, DhcpMessageType::Discover);
        assert_eq!(question.client_hardware_address, EthernetAddress(MAC.0));
        assert!(question.broadcast && question.client_ip.is_unspecified());
        answer(question, DhcpMessageType::Offer)
    });
    let request = network.receive(&offer);
    let ack = with_question(&request, |question| {
        assert_eq!(question.message_type, DhcpMessageType::Request);
        assert_eq!(question.requested_ip, Some(ADDRESS));
        assert_eq!(question.server_identifier, Some(SERVER));
        assert_eq!(question.transaction_id, offer.transaction_id);
        answer(question, DhcpMessageType::Ack)
    });
    let taken = network.receive(&ack);
    let [Action::Configure(lease)] = &taken[..] else { panic!("{taken:?}") };
    assert_eq!((lease.address, lease.prefix), (ADDRESS, 24));
    assert_eq!((lease.gateway, lease.server), (Some(SERVER), SERVER));
    assert_eq!(lease.duration, Duration::from_secs(3600));
    assert_eq!(network.receive(&ack), [], "the same answer once more");
}

#[test]
fn a_lease_is_extended_by_its_server_then_by_any_and_given_up_at_its_end() {
    let mut network = Network::new();
    assert!(matches!(network.bind(|_| ())[..], [Action::Configure(_)]));
    let (renew, waited) = network.next();
    assert_eq!(waited, 1800);
    let [Action::Send(_, SERVER)] = renew[..] else { panic!("{renew:?}") };
    let ack = with_question(&renew, |question| {
        assert_eq!((question.client_ip, question.broadcast), (ADDRESS, false));
        assert_eq!((question.requested_ip, question.server_identifier), (None, None));
        answer(question, DhcpMessageType::Ack)
    });
    assert!(matches!(network.receive(&ack)[..], [Action::Configure(_)]));

    // The server is gone: ever more often until the end, from 7/8 of the time on to everybody.
    let (start, mut messages) = (network.now, Vec::new());
    let given_up = loop {
        let (actions, _) = network.next();
        match &actions[..] {
            [Action::Send(_, to)] => messages.push((network.passed_since(start).as_secs(), *to)),
            _ => break actions,
        }
    };
    assert_eq!(network.passed_since(start), Duration::from_secs(3600));
    assert!(matches!(given_up[..], [Action::Deconfigure, Action::Send(_, Ipv4Addr::BROADCAST)]));
    assert!(messages.iter().all(|(at, to)| (*to == SERVER) == (*at < 3150)), "{messages:?}");
    let rarely = |pair: &[(u64, _)]| pair[1].0 - pair[0].0 >= 59 || pair[1].0 == 3150;
    assert!(messages.windows(2).all(rarely), "{messages:?}");
    assert!((6..20).contains(&messages.len()), "{messages:?}");
}

#[test]
fn without_answers_the_client_asks_on_less_and_less_often() {
    let mut network = Network::new();
    let waits: Vec<u64> = (0..8).map(|_| network.next().1).collect();
    assert_eq!(waits, [0, 2, 4, 8, 16, 32, 64, 64]);
    // A server that offers, and then is silent.
    let (discover, _) = network.next();
    let offer = with_question(&discover, |question| answer(question, DhcpMessageType::Offer));
    network.receive(&offer);
    let kinds: Vec<_> = (0..4)
        .map(|_| with_question(&network.next().0, |question| question.message_type))
        .collect();
    let [request, discover] = [DhcpMessageType::Request, DhcpMessageType::Discover];
    assert_eq!(kinds, [request, request, request, discover]);
}

#[test]
fn a_refused_address_is_given_up_at_once() {
    let mut network = Network::new();
    network.bind(|_| ());
    let (renew, _) = network.next();
    let nak = with_question(&renew, |question| answer(question, DhcpMessageType::Nak));
    let actions = network.receive(&nak);
    assert!(matches!(actions[..], [Action::Deconfigure, Action::Send(..)]), "{actions:?}");
}

#[test]
fn what_cannot_be_the_address_of_a_host_is_not_taken() {
    let changes: [fn(&mut DhcpRepr<'static>); 13] = [
        |m| m.your_ip = Ipv4Addr::UNSPECIFIED,
        |m| m.your_ip = Ipv4Addr::BROADCAST,
        |m| m.your_ip = Ipv4Addr::LOCALHOST,
        |m| m.your_ip = Ipv4Addr::new(0, 0, 2, 15),
        |m| m.your_ip = Ipv4Addr::new(224, 0, 0, 1),
        |m| m.server_identifier = None,
        |m| m.server_identifier = Some(Ipv4Addr::BROADCAST),
        |m| m.subnet_mask = None,
        |m| m.subnet_mask = Some(Ipv4Addr::new(255, 0, 255, 0)),
        |m| m.subnet_mask = Some(Ipv4Addr::UNSPECIFIED),
        |m| m.transaction_id += 1,
        |m| m.client_hardware_address = EthernetAddress([2, 0, 0, 0, 0, 8]),
        |m| m.message_type = DhcpMessageType::Nak,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let actions = Network::new().bind(change);
        let taken = actions.iter().any(|action| matches!(action, Action::Configure(_)));
        assert!(!taken, "change {number}: {actions:?}");
    }
    // Another address or server than the one that was asked for.
    for change in
        [(|m| m.your_ip = Ipv4Addr::new(10, 0, 2, 16)) as fn(&mut DhcpRepr<'static>), |m| {
            m.server_identifier = Some(Ipv4Addr::new(10, 0, 2, 3))
        }]
    {
        let mut network = Network::new();
        let (discover, _) = network.next();
        let offer = with_question(&discover, |q| answer(q, DhcpMessageType::Offer));
        let request = network.receive(&offer);
        let mut ack = with_question(&request, |q| answer(q, DhcpMessageType::Ack));
        change(&mut ack);
        assert_eq!(network.receive(&ack), []);
    }
}

#[test]
fn times_that_make_no_sense_are_replaced_and_a_foreign_gateway_is_left_out() {
    let mut network = Network::new();
    let taken = network.bind(|m| {
        m.lease_duration = Some(0);
        m.renew_duration = Some(u32::MAX);
        m.rebind_duration = Some(u32::MAX);
        m.router = Some(Ipv4Addr::new(192, 0, 2, 1));
    });
    let [Action::Configure(lease)] = &taken[..] else { panic!("{taken:?}") };
    assert_eq!((lease.duration, lease.gateway), (Duration::from_secs(120), None));
    assert_eq!(network.next().1, 60);
}

#[test]
fn cut_messages_and_noise_are_ignored() {
    let mut network = Network::new();
    let (discover, _) = network.next();
    let offer = bytes(&with_question(&discover, |q| answer(q, DhcpMessageType::Offer)));
    for end in 0..offer.len() - 8 {
        let actions = network.client.receive(&offer[..end], network.now);
        assert!(actions.iter().all(|action| matches!(action, Action::Send(..))), "{end}");
    }
    let mut network = Network::new();
    network.next();
    for byte in 0..=255 {
        assert_eq!(network.client.receive(&[byte; 400], network.now), []);
    }
}
