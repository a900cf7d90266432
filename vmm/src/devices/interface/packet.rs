//! Sockets that receive whole Ethernet frames from one interface (packet(7)).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::Interface;

/// Returns a socket that sends Ethernet frames on the wire of `interface`, and receives those that `filter`, a
/// classic BPF program, accepts (Linux Documentation/networking/filter.rst). Needs CAP_NET_RAW.
///
/// The socket sees a frame as the hardware delivers it, before the bridge that the interface may be a port of.
/// A frame that goes from the bridge to the wire is seen too, as an outgoing one, unless the filter drops it; a
/// frame between the other ports of the bridge never is.
pub fn packet_socket(interface: &Interface, filter: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let index = interface.request(libc::SIOCGIFINDEX, &[])?.value;
    let [a, b, c, d, ..] = index;
    // Without a protocol the socket receives nothing until it has a filter and an interface.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: a socket's fd, and the address and the size of the description of a program, which is alive. The
    // kernel copies the program and does not write to it.
    done(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    })?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        // A socket for one protocol only would be given frames after the bridge has taken them.
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: i32::from_ne_bytes([a, b, c, d]),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: a socket's fd, and the address and the size of a `struct sockaddr_ll`, which the kernel copies.
    done(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
