//! The size of a network device's queues (Linux include/uapi/linux/ethtool.h).

#![expect(unsafe_code, reason = "the ioctl of ethtool")]

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GRINGPARAM: u32 = 0x10;
const ETHTOOL_SRINGPARAM: u32 = 0x11;

/// `struct ethtool_ringparam`.
#[repr(C)]
#[derive(Default)]
struct Ring {
    command: u32,
    /// The most entries of the queues: receive, mini, jumbo, transmit.
    most: [u32; 4],
    /// The entries, in the same order.
    entries: [u32; 4],
}

/// `struct ifreq` with a pointer as its value.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: *mut Ring,
    rest: [u64; 2],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

/// Gives the receive and the transmit queues of an interface this many entries. Errors if they have another number
/// then.
pub(crate) fn set(interface: &str, entries: u32) -> io::Result<()> {
    // Any socket does for an interface's settings.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut ring = Ring { command: ETHTOOL_GRINGPARAM, ..Ring::default() };
    let mut name = [0; libc::IFNAMSIZ];
    name[..interface.len()].copy_from_slice(interface.as_bytes());
    let send = |ring: &mut Ring| {
        let mut request = Request { name, data: ring, rest: [0; 2] };
        // SAFETY: the ioctl reads one `ifreq` with a pointer to an `ethtool_ringparam`, which it reads and writes.
        // Both outlive the call.
        match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    send(&mut ring)?;
    ring.command = ETHTOOL_SRINGPARAM;
    [ring.entries[0], ring.entries[3]] = [entries; 2];
    send(&mut ring)?;
    ring.command = ETHTOOL_GRINGPARAM;
    send(&mut ring)?;
    match [ring.entries[0], ring.entries[3]] == [entries; 2] {
        true => Ok(()),
        false => Err(io::Error::other(format!("the queues have {:?} entries", ring.entries))),
    }
}
