//! What the process that speaks DHCP tells the host: packets of a fixed shape, which the host checks by itself.
//!
//! ```text
//!   byte 0 kind   1 prefix   2-3 zero   4 address   8 gateway   12 server   16 seconds, little-endian
//! ```
//!
//! Only two kinds of packet carry text, which goes into the log: what is missing of the process's confinement,
//! and the system call that ended the process.

use std::net::Ipv4Addr;
use std::time::Duration;

/// Length of a packet about a lease, in bytes.
const LEN: usize = 20;
/// Most bytes of a packet with text.
pub(super) const TEXT_MAX: usize = 2048;

/// Kinds of packets.
const LEASE: u8 = 1;
const NO_LEASE: u8 = 2;
const CONFINED: u8 = b'c';
/// The host's only message to the process. The process waits for it before it confines itself in full.
pub(super) const GO: &[u8] = b"g";
/// In front of the text about a forbidden system call.
pub(super) const FORBIDDEN: &str = "!";

/// An address that a server has assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) address: Ipv4Addr,
    /// Length of the network's prefix, in bits: 1 to 32.
    pub(super) prefix: u8,
    pub(super) gateway: Option<Ipv4Addr>,
    pub(super) server: Ipv4Addr,
    /// Time for which the address is assigned. [`FOREVER`] for a lease without an end.
    pub(super) duration: Duration,
}

/// Length of a lease without an end (RFC 2131, 3.3).
pub(super) const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

impl Lease {
    /// Whether a host can have this address in this network.
    pub(super) fn is_usable(&self) -> bool {
        let Self { address, prefix, gateway, server, duration: _ } = self;
        let in_network = |other: &Ipv4Addr| {
            let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
            (other.to_bits() ^ address.to_bits()) & mask == 0
        };
        (1..=32).contains(prefix)
            && is_of_host(address)
            && is_of_host(server)
            && gateway.is_none_or(|gateway| is_of_host(&gateway) && in_network(&gateway))
    }
}

/// Whether `address` can be the address of one host.
pub(super) fn is_of_host(address: &Ipv4Addr) -> bool {
    let first = address.octets()[0];
    !(first == 0 || address.is_loopback() || address.is_multicast() || first >= 240)
}

/// What the process tells the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    /// The process is confined, but for these parts. Its first message.
    Confined(Vec<String>),
    /// The host has this address.
    Lease(Lease),
    /// The host has no address any more.
    NoLease,
    /// The process made a system call that its confinement does not allow, and has ended.
    Forbidden(String),
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Lease(Lease { address, prefix, gateway, server, duration }) => {
                let gateway = gateway.unwrap_or(Ipv4Addr::UNSPECIFIED);
                let seconds = u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
                let mut bytes = vec![LEASE, *prefix, 0, 0];
                [address, &gateway, server].iter().for_each(|ip| bytes.extend(ip.octets()));
                bytes.extend(seconds.to_le_bytes());
                bytes
            }
            Self::NoLease => {
                let mut bytes = vec![0; LEN];
                bytes[0] = NO_LEASE;
                bytes
            }
            Self::Confined(missing) => text([CONFINED], &missing.join("\n")),
            Self::Forbidden(why) => text(FORBIDDEN.as_bytes(), why),
        }
    }

    /// Returns the message of a packet, or `None` if no such message can have been sent.
    pub(super) fn decode(packet: &[u8]) -> Option<Self> {
        match packet {
            [CONFINED, text @ ..] => {
                let text = plain(text);
                Some(Self::Confined(text.lines().map(str::to_owned).collect()))
            }
            [kind, text @ ..] if FORBIDDEN.as_bytes() == [*kind] => {
                Some(Self::Forbidden(plain(text)))
            }
            [NO_LEASE, rest @ ..] if packet.len() == LEN && rest.iter().all(|b| *b == 0) => {
                Some(Self::NoLease)
            }
            [LEASE, prefix, 0, 0, rest @ ..] => {
                let rest: &[u8; LEN - 4] = rest.try_into().ok()?;
                let [[a, b, c, d], gateway, server, seconds] = rest.as_chunks().0 else {
                    return None;
                };
                let gateway = Ipv4Addr::from(*gateway);
                let lease = Lease {
                    address: Ipv4Addr::new(*a, *b, *c, *d),
                    prefix: *prefix,
                    gateway: Some(gateway).filter(|gateway| !gateway.is_unspecified()),
                    server: Ipv4Addr::from(*server),
                    duration: Duration::from_secs(u32::from_le_bytes(*seconds).into()),
                };
                lease.is_usable().then_some(Self::Lease(lease))
            }
            _ => None,
        }
    }
}

fn text(kind: impl AsRef<[u8]>, text: &str) -> Vec<u8> {
    let mut bytes = kind.as_ref().to_vec();
    bytes.extend(text.as_bytes());
    bytes.truncate(TEXT_MAX);
    bytes
}

/// Returns text that is safe to log.
fn plain(text: &[u8]) -> String {
    let plain = |byte: &u8| match byte {
        b'\n' | b' '..=b'~' => char::from(*byte),
        _ => '?',
    };
    text.iter().take(TEXT_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Lease {
        Lease {
            address: Ipv4Addr::new(192, 0, 2, 5),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(192, 0, 2, 1)),
            server: Ipv4Addr::new(192, 0, 2, 2),
            duration: Duration::from_secs(3600),
        }
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let missing = vec!["landlock: the kernel has none".to_owned(), "seccomp: no".to_owned()];
        for message in [
            Message::Lease(sample()),
            Message::Lease(Lease { gateway: None, duration: FOREVER, prefix: 32, ..sample() }),
            Message::NoLease,
            Message::Confined(missing),
            Message::Confined(Vec::new()),
            Message::Forbidden("openat 257".to_owned()),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn a_packet_that_no_honest_process_sends_is_refused() {
        let lease = Message::Lease(sample()).encode();
        let changes: [fn(&mut Vec<u8>); 12] = [
            |p| p.clear(),
            |p| p.truncate(LEN - 1),
            |p| p.push(0),
            |p| p[0] = 0,
            |p| p[0] = NO_LEASE,
            |p| p[1] = 0,
            |p| p[1] = 33,
            |p| p[2] = 1,
            |p| p[4] = 127,
            |p| p[4] = 224,
            // A gateway in another network, a server that is everybody.
            |p| p[8] = 193,
            |p| p[12..16].fill(0xff),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut packet = lease.clone();
            change(&mut packet);
            assert_eq!(Message::decode(&packet), None, "change {number}");
        }
        let noise = Message::decode(b"!a\x1b[2J\xff").unwrap();
        assert_eq!(noise, Message::Forbidden("a?[2J?".to_owned()));
        assert!(Message::Confined(vec!["x".repeat(2 * TEXT_MAX)]).encode().len() <= TEXT_MAX);
    }
}
