//! Taps of a machine, made and deleted by its PID 1, which has no program for that.

#![expect(unsafe_code, reason = "ioctls of a tap and of an interface")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const TUN: &str = "/dev/net/tun";
/// A request to delete an interface (rtnetlink(7)), and its flags: request, acknowledge.
const RTM_DELLINK: u16 = 17;
const FLAGS: u16 = 1 | 4;

/// Creates a tap, or opens it. A new one is deleted when the last program closes it.
pub(crate) fn open(name: &str) -> io::Result<File> {
    open_with(name, 0)
}

/// The same of a queue of a tap that can have several.
pub(crate) fn open_queue(name: &str) -> io::Result<File> {
    open_with(name, libc::IFF_MULTI_QUEUE)
}

fn open_with(name: &str, more: libc::c_int) -> io::Result<File> {
    let tun = OpenOptions::new().read(true).write(true).open(TUN)?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more) as libc::c_short;
    send(&tun, libc::TUNSETIFF, &mut request)?;
    Ok(tun)
}

/// Lets the tap stay when no program has it open.
pub(crate) fn keep(tap: &File) -> io::Result<()> {
    // SAFETY: a tap's fd; the ioctl takes a number and touches no memory.
    done(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1) })
}

/// As [`keep`], and lets a user open it who has no privilege.
pub(crate) fn keep_for(tap: &File, user: u32) -> io::Result<()> {
    keep(tap)?;
    // SAFETY: a tap's fd; the ioctl takes a number and touches no memory.
    done(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(user)) })
}

/// Gives an interface this address, and switches it on.
pub(crate) fn set_address(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let mut request = request(name);
    // Any socket does for an interface's settings.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        request.ifr_ifru.ifru_addr = socket_address(value);
        send(&socket, call, &mut request)?;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    send(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Deletes an interface, also a tap that a program has open.
pub(crate) fn delete(name: &str) -> io::Result<()> {
    let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    let index: i32 = index.trim().parse().map_err(io::Error::other)?;
    // `struct nlmsghdr`: length, type, flags, number, sender; `struct ifinfomsg`: family, type, index, flags, mask.
    let mut message = Vec::new();
    message.extend(32_u32.to_ne_bytes());
    message.extend([RTM_DELLINK.to_ne_bytes(), FLAGS.to_ne_bytes()].concat());
    message.extend([0; 12]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    // Behind the header of the answer, a negative error number or 0.
    let mut answer = [0; 256];
    rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

/// A request about the interface `name`, all zeroes.
fn request(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte less, so that the name ends with a zero.
    for (to, from) in ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    let ifr_ifru =
        libc::__c_anonymous_ifr_ifru { ifru_addr: socket_address(Ipv4Addr::UNSPECIFIED) };
    libc::ifreq { ifr_name, ifr_ifru }
}

/// A `sockaddr_in` (ip(7)): behind the family, two bytes of port and four of address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut sa_data = [0; 14];
    for (to, from) in sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data }
}

fn send(fd: &impl AsFd, call: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the ioctls that are passed to this function read and write one `ifreq`, which outlives the call.
    done(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), call, &raw mut *request) })
}

fn done(returned: libc::c_int) -> io::Result<()> {
    match returned {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
