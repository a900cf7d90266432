//! The socket on the uplink, with two taps as ports of a bridge: one plays the uplink, the other a guest's. Needs
//! `/dev/net/tun` and root. CI has both.

#![expect(unsafe_code, reason = "a network of the test alone, and the ioctl that makes a tap")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use rustix::time::Timespec;
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};

use super::Host;
use super::frame::{CLIENT, FILTER, FRAME_MAX, Frame, SERVER};
use super::lease::{Lease, Message};
use super::process::Speaker;
use super::tests::{ADDRESS, answer_about, bytes};
use crate::devices::interface::{Interface, Mac, packet_socket};

const SERVERS: Mac = Mac([2, 0, 0, 0, 0, 0x55]);
/// Longest wait for a frame that must come.
const SOON: Duration = Duration::from_secs(20);

/// A network of this thread alone: a bridge with an uplink and a guest's tap.
struct Network {
    bridge: Interface,
    mac: Mac,
    /// What is at the other end of the uplink's wire, and of the guest's.
    outside: File,
    guest: File,
}

fn tap(name: &str) -> File {
    let mut options = std::fs::OpenOptions::new();
    let tun = options.read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&((libc::IFF_TAP | libc::IFF_NO_PI) as u16).to_ne_bytes());
    // SAFETY: TUNSETIFF takes a `struct ifreq`, whose size `request` has, and keeps no address of it.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    tun
}

impl Network {
    fn new() -> Self {
        // SAFETY: the thread gets namespaces of its own and shares everything else as before.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        // sysfs shows the network of the process that mounts it.
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
        let (outside, guest) = (tap("up0"), tap("vm0"));
        let bridge = Interface::new("br0").unwrap();
        bridge.make_bridge().unwrap();
        for port in ["up0", "vm0"] {
            let port = Interface::new(port).unwrap();
            port.add_to("br0").unwrap();
            port.set_up().unwrap();
        }
        let mac = Interface::new("up0").unwrap().mac().unwrap();
        bridge.set_mac(mac).unwrap();
        bridge.set_up().unwrap();
        Self { bridge, mac, outside, guest }
    }

    /// The next DHCP message on a wire, within a time.
    fn next<T>(wire: &File, within: Duration, look: fn(&DhcpRepr<'_>) -> T) -> Option<T> {
        let deadline = Instant::now() + within;
        let mut buffer = [0; FRAME_MAX];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap();
            let mut ready = [PollFd::new(wire, PollFlags::IN)];
            if poll(&mut ready, Some(&left)).unwrap() == 0 {
                return None;
            }
            let len = (&*wire).read(&mut buffer).unwrap();
            // Behind the headers of Ethernet, IPv4 and UDP. The ports: from the client to the server.
            let frame = &buffer[..len];
            if len < 42 || frame[34..38] != [0, CLIENT as u8, 0, SERVER as u8] {
                continue;
            }
            let packet = DhcpPacket::new_checked(&frame[42..]).unwrap();
            return Some(look(&DhcpRepr::parse(&packet).unwrap()));
        }
    }
}

/// The frame of an answer of a server with the address of `answer`.
fn from_server(mac: Mac, answer: &DhcpRepr<'_>) -> Vec<u8> {
    let server = answer.server_identifier.unwrap();
    let message = bytes(answer);
    let frame =
        Frame { from: (SERVERS, server), to: (mac, Ipv4Addr::BROADCAST), message: &message };
    let mut frame = frame.to_bytes();
    // The other way than a client's frame: the ports are exchanged, which leaves the checksum as it is.
    frame[34..38].copy_from_slice(&[0, SERVER as u8, 0, CLIENT as u8]);
    frame
}

/// Runs a test on a thread of its own, whose network is of its own. Skips, and says so, without root.
fn with_network(test: fn(Network)) {
    let is_possible =
        rustix::process::geteuid().is_root() && std::fs::exists("/dev/net/tun").unwrap();
    if !is_possible {
        assert!(std::env::var_os("CI").is_none(), "CI must not skip this");
        eprintln!("SKIPPED: it needs root and /dev/net/tun");
        return;
    }
    std::thread::spawn(move || test(Network::new())).join().unwrap();
}

#[test]
fn an_answer_of_a_guest_on_the_bridge_is_not_believed() {
    with_network(|network| {
        let Network { mac, outside, guest, .. } = &network;
        let wire = packet_socket(&Interface::new("up0").unwrap(), &FILTER).unwrap();
        let (here, there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let mac_of_client = *mac;
        let client = std::thread::spawn(move || {
            Speaker::new(wire.as_fd(), mac_of_client).speak(there.as_fd()).unwrap();
        });
        type Question = (DhcpMessageType, u32, Option<Ipv4Addr>);
        let question =
            |q: &DhcpRepr<'_>| -> Question { (q.message_type, q.transaction_id, q.requested_ip) };
        let made_up = |kind, transaction_id, your_ip| {
            let mut made = answer_to(transaction_id, *mac, kind);
            made.your_ip = your_ip;
            made
        };
        let (kind, transaction, _) = Network::next(outside, SOON, question).unwrap();
        assert_eq!(kind, DhcpMessageType::Discover);
        // The guest answers first, to everybody and to the host, and so well that nobody could tell.
        let theirs = made_up(DhcpMessageType::Offer, transaction, Ipv4Addr::new(10, 0, 2, 99));
        for to in [Mac::BROADCAST, *mac] {
            (&*guest).write_all(&from_server(to, &theirs)).unwrap();
        }
        // Then the server. The client asks for its address, not for the guest's.
        let offer = made_up(DhcpMessageType::Offer, transaction, ADDRESS);
        (&*outside).write_all(&from_server(Mac::BROADCAST, &offer)).unwrap();
        let (kind, _, wanted) = Network::next(outside, SOON, question).unwrap();
        assert_eq!((kind, wanted), (DhcpMessageType::Request, Some(ADDRESS)));
        // The guest refuses; the server agrees.
        let refusal = made_up(DhcpMessageType::Nak, transaction, Ipv4Addr::UNSPECIFIED);
        (&*guest).write_all(&from_server(Mac::BROADCAST, &refusal)).unwrap();
        let ack = made_up(DhcpMessageType::Ack, transaction, ADDRESS);
        (&*outside).write_all(&from_server(*mac, &ack)).unwrap();
        let mut packet = [0; 64];
        let (len, _) =
            rustix::net::recv(&here, &mut packet, rustix::net::RecvFlags::empty()).unwrap();
        let Some(Message::Lease(lease)) = Message::decode(&packet[..len]) else {
            panic!("{:?}", &packet[..len])
        };
        assert_eq!(lease.address, ADDRESS);
        // Nothing that the host asked went to the guest.
        let seen = Network::next(guest, Duration::ZERO, |q| q.message_type);
        assert_eq!(seen, None);
        // The process ends with its host.
        drop(here);
        client.join().unwrap();
    });
}

/// An answer to the question with this transaction, of a client with this address.
fn answer_to(transaction: u32, mac: Mac, kind: DhcpMessageType) -> DhcpRepr<'static> {
    answer_about(transaction, EthernetAddress(mac.0), kind)
}

#[test]
fn the_filter_lets_only_answers_from_the_wire_through() {
    with_network(|network| {
        let Network { bridge, mac, outside, guest } = &network;
        let socket = packet_socket(&Interface::new("up0").unwrap(), &FILTER).unwrap();
        let good = from_server(*mac, &answer_to(1, *mac, DhcpMessageType::Offer));
        let changed = |change: fn(&mut Vec<u8>)| {
            let mut frame = good.clone();
            change(&mut frame);
            frame
        };
        let to_another = changed(|f| f[5] ^= 1);
        let to_a_group = changed(|f| f[..6].copy_from_slice(&[1, 0, 0x5e, 0, 0, 1]));
        let in_a_vlan = changed(|f| drop(f.splice(12..12, [0x81, 0, 0, 5])));
        let of_ipv6 = changed(|f| f[12..14].copy_from_slice(&[0x86, 0xdd]));
        let of_tcp = changed(|f| f[23] = 6);
        let first_fragment = changed(|f| f[20] = 0x20);
        let later_fragment = changed(|f| f[21] = 1);
        let to_another_port = changed(|f| f[37] = 69);
        let cut = changed(|f| f.truncate(36));
        for frame in [
            to_another,
            to_a_group,
            in_a_vlan,
            of_ipv6,
            of_tcp,
            first_fragment,
            later_fragment,
            to_another_port,
            cut,
        ] {
            (&*outside).write_all(&frame).unwrap();
        }
        (&*guest).write_all(&good).unwrap();
        (&*guest).write_all(&changed(|f| f[..6].fill(0xff))).unwrap();
        // Sent by the host itself, through the bridge.
        bridge.set_address(Ipv4Addr::new(10, 0, 2, 15), 24).unwrap();
        let own = bridge.udp_socket(SERVER).unwrap();
        own.send_to(b"own", (Ipv4Addr::BROADCAST, CLIENT)).unwrap();
        // With options in the header of IPv4, to everybody.
        let last = changed(|f| {
            f[..6].fill(0xff);
            f[14] = 0x46;
            drop(f.splice(34..34, [1, 1, 1, 1]));
        });
        (&*outside).write_all(&last).unwrap();
        let mut ready = [PollFd::new(&socket, PollFlags::IN)];
        let soon = Timespec::try_from(SOON).unwrap();
        assert_eq!(poll(&mut ready, Some(&soon)).unwrap(), 1);
        let mut buffer = [0; FRAME_MAX];
        let len = rustix::io::read(&socket, &mut buffer).unwrap();
        assert_eq!(buffer[..len], last);
        assert!(rustix::io::read(&socket, &mut buffer).is_err(), "nothing else");
    });
}

/// The gateways of the default routes of this thread's network.
fn gateways() -> Vec<Ipv4Addr> {
    let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
    let fields = routes.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let default = fields.filter(|fields| fields[1] == "00000000");
    let gateway = |fields: Vec<&str>| u32::from_str_radix(fields[2], 16).unwrap().to_ne_bytes();
    default.map(|fields| gateway(fields).into()).collect()
}

#[test]
fn the_router_of_a_renewed_lease_takes_the_place_of_the_last_one() {
    with_network(|network| {
        let mut host = Host {
            _port: network.bridge.udp_socket(CLIENT).unwrap(),
            own: network.bridge,
            uplink: Interface::new("up0").unwrap(),
            user: 0,
            confinement_required: false,
            end: None,
            gateway: None,
        };
        let router = |last| Ipv4Addr::new(10, 0, 2, last);
        let [own, moved] = [15, 16].map(router);
        for (address, gateway) in [
            (own, Some(router(2))),
            (own, Some(router(3))),
            (own, Some(router(3))),
            (own, None),
            (own, Some(router(2))),
            (moved, Some(router(2))),
        ] {
            let (prefix, server, duration) = (24, router(1), Duration::from_secs(60));
            host.take(Lease { address, prefix, gateway, server, duration });
            assert_eq!(gateways(), Vec::from_iter(gateway), "{address}");
        }
        host.give_up();
        assert!(gateways().is_empty());
    });
}

#[test]
fn a_frame_is_parsed_as_it_was_built_and_noise_is_not() {
    let whole = from_server(SERVERS, &answer_to(7, SERVERS, DhcpMessageType::Ack));
    let parsed = Frame::parse(&whole).unwrap();
    assert_eq!((parsed.from.0, parsed.to), (SERVERS, (SERVERS, Ipv4Addr::BROADCAST)));
    assert!(DhcpPacket::new_checked(parsed.message).is_ok());
    for end in 0..whole.len() {
        assert_eq!(Frame::parse(&whole[..end]), None, "{end}");
    }
    let header = 14..34;
    for (at, bit) in header.flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut frame = whole.clone();
        frame[at] ^= 1 << bit;
        assert_eq!(Frame::parse(&frame), None, "byte {at}, bit {bit}");
    }
}
