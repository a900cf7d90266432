//! DHCP messages on the wire: in UDP, IPv4 and Ethernet (RFC 2131, 4.1).

use std::net::Ipv4Addr;

use libc::{BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, BPF_LD};
use libc::{BPF_LDX, BPF_MSH, BPF_RET, BPF_W, sock_filter};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

use crate::devices::interface::Mac;

/// The ports of client and server.
pub(super) const CLIENT: u16 = 68;
pub(super) const SERVER: u16 = 67;

/// Most bytes of a frame that is received, and of a message in it.
pub(super) const FRAME_MAX: usize = 1514;
pub(super) const MESSAGE_MAX: usize = 1472;
/// Bytes of the headers of Ethernet and UDP.
const ETHERNET: usize = 14;
const UDP: usize = 8;

/// A frame to send or one that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame<'m> {
    pub(super) from: (Mac, Ipv4Addr),
    pub(super) to: (Mac, Ipv4Addr),
    pub(super) message: &'m [u8],
}

impl<'m> Frame<'m> {
    /// Returns the bytes of a frame from a client to a server.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let Self { from: (from_mac, from), to: (to_mac, to), message } = self;
        let checksums = ChecksumCapabilities::default();
        let ethernet = EthernetRepr {
            src_addr: EthernetAddress(from_mac.0),
            dst_addr: EthernetAddress(to_mac.0),
            ethertype: EthernetProtocol::Ipv4,
        };
        let udp = UdpRepr { src_port: CLIENT, dst_port: SERVER };
        let ip = Ipv4Repr {
            src_addr: from,
            dst_addr: to,
            next_header: IpProtocol::Udp,
            payload_len: UDP + message.len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; ETHERNET + ip.buffer_len() + UDP + message.len()];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
        ethernet.emit(&mut frame);
        let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
        ip.emit(&mut packet, &checksums);
        udp.emit(
            &mut UdpPacket::new_unchecked(packet.payload_mut()),
            &from.into(),
            &to.into(),
            message.len(),
            |payload| payload.copy_from_slice(message),
            &checksums,
        );
        bytes
    }

    /// Returns the frame if it is one from a server to a client.
    ///
    /// The checksum of UDP is not verified: a server on the same machine leaves it to the hardware of a wire
    /// that its frames never reach.
    pub(super) fn parse(bytes: &'m [u8]) -> Option<Self> {
        let frame = EthernetFrame::new_checked(bytes).ok()?;
        (frame.ethertype() == EthernetProtocol::Ipv4).then_some(())?;
        let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
        let whole = !packet.more_frags() && packet.frag_offset() == 0;
        let is_udp = packet.version() == 4 && packet.next_header() == IpProtocol::Udp;
        (whole && is_udp && packet.verify_checksum()).then_some(())?;
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let udp = UdpPacket::new_checked(packet.payload()).ok()?;
        let (from_ip, to_ip) = (IpAddress::from(from), IpAddress::from(to));
        let ports =
            UdpRepr::parse(&udp, &from_ip, &to_ip, &ChecksumCapabilities::ignored()).ok()?;
        (ports == UdpRepr { src_port: SERVER, dst_port: CLIENT }).then_some(Self {
            from: (Mac(frame.src_addr().0), from),
            to: (Mac(frame.dst_addr().0), to),
            message: udp.payload(),
        })
    }
}

/// Where the kernel's filters find what is not in the frame (include/uapi/linux/filter.h).
const BESIDE_THE_FRAME: i32 = libc::SKF_AD_OFF;

/// The filter of the socket on the uplink: accepts frames that came in from the wire, to this host or to all,
/// that are not in a VLAN, and that are unfragmented UDP in IPv4 to the client's port. So the kernel drops
/// frames that the bridge sends to the wire, such as those of a guest, before anybody reads them.
pub(super) const FILTER: [sock_filter; 15] = [
    load(BPF_W | BPF_ABS, BESIDE_THE_FRAME + libc::SKF_AD_PKTTYPE),
    // PACKET_HOST is 0, PACKET_BROADCAST is 1; others are to a group, to another host, or outgoing.
    jump(BPF_JGT, libc::PACKET_BROADCAST as u32, 11, 0),
    load(BPF_B | BPF_ABS, BESIDE_THE_FRAME + libc::SKF_AD_VLAN_TAG_PRESENT),
    jump(BPF_JEQ, 0, 0, 9),
    load(BPF_H | BPF_ABS, 12),
    jump(BPF_JEQ, libc::ETH_P_IP as u32, 0, 7),
    load(BPF_B | BPF_ABS, ETHERNET as i32 + 9),
    jump(BPF_JEQ, libc::IPPROTO_UDP as u32, 0, 5),
    // More fragments, or an offset.
    load(BPF_H | BPF_ABS, ETHERNET as i32 + 6),
    jump(BPF_JSET, 0x3fff, 3, 0),
    // The index register gets the length of the IPv4 header.
    instruction(BPF_LDX | BPF_B | BPF_MSH, 0, 0, ETHERNET as u32),
    load(BPF_H | BPF_IND, ETHERNET as i32 + 2),
    jump(BPF_JEQ, CLIENT as u32, 1, 0),
    instruction(BPF_RET | BPF_K, 0, 0, 0),
    instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
];

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

const fn load(how: u32, from: i32) -> sock_filter {
    instruction(BPF_LD | how, 0, 0, from as u32)
}

/// Goes on after `yes` instructions if the comparison of the accumulator with `with` is true, else after `no`.
const fn jump(how: u32, with: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | how | BPF_K, yes, no, with)
}
