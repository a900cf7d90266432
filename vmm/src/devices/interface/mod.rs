//! Network interfaces of the host, through Linux's ioctls for them (netdevice(7), and
//! include/uapi/linux/sockios.h for bridges).
//!
//! The ioctls are few and have not changed for decades, so no netlink library is needed. Each method makes
//! one change; the caller decides which changes an interface needs.

#![expect(unsafe_code, reason = "neither rustix nor std has ioctls on network interfaces")]

mod mac;
mod packet;

pub use mac::Mac;
pub use packet::packet_socket;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::sockopt::set_socket_broadcast;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// Most bytes of an interface's name (`IFNAMSIZ` without the NUL byte).
pub const NAME_MAX: usize = 15;

const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// Type of Ethernet addresses (include/uapi/linux/if_arp.h).
const ARPHRD_ETHER: u16 = 1;
/// The route goes through a gateway; the route is usable (include/uapi/linux/route.h).
const RTF_GATEWAY: u16 = 2;
const RTF_UP: u16 = 1;

/// `struct ifreq`: the name of an interface, and a value whose form depends on the request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in crate::devices) struct Request {
    name: [u8; NAME_MAX + 1],
    /// The value of the request or of its answer.
    pub(in crate::devices) value: [u8; 24],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    /// Creates a request about `name` with these first bytes of the value.
    pub(in crate::devices) fn new(name: &str, value: &[u8]) -> Self {
        let mut request = Self { name: [0; NAME_MAX + 1], value: [0; 24] };
        let len = name.len().min(NAME_MAX);
        request.name[..len].copy_from_slice(&name.as_bytes()[..len]);
        request.value[..value.len()].copy_from_slice(value);
        request
    }

    /// Returns the name.
    pub(in crate::devices) fn name(&self) -> String {
        let name: Vec<u8> = self.name.iter().copied().take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&name).into_owned()
    }

    /// Returns the value as a 16-bit number.
    pub(in crate::devices) fn u16(&self) -> u16 {
        u16::from_ne_bytes([self.value[0], self.value[1]])
    }

    /// Sends this as request `number` to the kernel.
    pub(in crate::devices) fn send(
        &mut self,
        fd: impl AsFd,
        number: libc::c_ulong,
    ) -> io::Result<()> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: the requests of this module and those of taps take a `struct ifreq`, whose size and layout
        // `Request` has, and keep no address of it.
        match unsafe { libc::ioctl(fd, number, std::ptr::from_mut(self)) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Checks the name of an interface. The error says what is wrong with the name.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_graphic() && !"/:%".contains(c);
    match name {
        "" => {
            Err(format!("`` cannot be the name of an interface, which has 1 to {NAME_MAX} bytes"))
        }
        "." | ".." => Err(format!("`{name}` cannot be the name of an interface")),
        _ if name.len() > NAME_MAX => {
            Err(format!("`{name}` is too long: an interface's name has at most {NAME_MAX} bytes"))
        }
        _ if !name.chars().all(allowed) => Err(format!(
            "`{}` has characters that no name of an interface has",
            name.escape_default()
        )),
        _ => Ok(()),
    }
}

/// An interface, by its name. The interface may not exist.
#[derive(Debug)]
pub struct Interface {
    name: String,
    socket: OwnedFd,
}

impl Interface {
    /// The interface called `name`, in this process's network namespace.
    pub fn new(name: &str) -> io::Result<Self> {
        let socket =
            socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { name: name.to_owned(), socket })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the interface exists.
    pub fn exists(&self) -> bool {
        self.directory().exists()
    }

    /// The path of the interface in sysfs.
    pub fn directory(&self) -> PathBuf {
        PathBuf::from("/sys/class/net").join(&self.name)
    }

    fn request(&self, number: libc::c_ulong, value: &[u8]) -> io::Result<Request> {
        let mut request = Request::new(&self.name, value);
        request.send(&self.socket, number)?;
        Ok(request)
    }

    /// Sets the MTU in bytes, without the Ethernet header. Changes nothing, and needs no privilege, if it is so
    /// already.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let [a, b, c, d, ..] = self.request(libc::SIOCGIFMTU, &[])?.value;
        if i32::from_ne_bytes([a, b, c, d]) == i32::from(mtu) {
            return Ok(());
        }
        self.request(libc::SIOCSIFMTU, &i32::from(mtu).to_ne_bytes()).map(drop)
    }

    /// Switches the interface on. Changes nothing, and needs no privilege, if it is on already.
    pub fn set_up(&self) -> io::Result<()> {
        let flags = self.request(libc::SIOCGIFFLAGS, &[])?.u16();
        let on = flags | libc::IFF_UP as u16;
        if flags == on {
            return Ok(());
        }
        self.request(libc::SIOCSIFFLAGS, &on.to_ne_bytes()).map(drop)
    }

    /// Returns the interface's Ethernet address.
    pub fn mac(&self) -> io::Result<Mac> {
        let [_, _, a, b, c, d, e, f, ..] = self.request(libc::SIOCGIFHWADDR, &[])?.value;
        Ok(Mac([a, b, c, d, e, f]))
    }

    /// Sets the interface's Ethernet address.
    pub fn set_mac(&self, mac: Mac) -> io::Result<()> {
        let mut value = ARPHRD_ETHER.to_ne_bytes().to_vec();
        value.extend(mac.0);
        self.request(libc::SIOCSIFHWADDR, &value).map(drop)
    }

    /// Sets the interface's IPv4 address and the length of its network's prefix, in bits.
    pub fn set_address(&self, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        self.request(libc::SIOCSIFADDR, &socket_address(address))?;
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        self.request(libc::SIOCSIFNETMASK, &socket_address(Ipv4Addr::from(mask))).map(drop)
    }

    /// Returns the interface's IPv4 address and the length of its network's prefix, or `None` if it has none.
    pub fn address(&self) -> io::Result<Option<(Ipv4Addr, u8)>> {
        let ask = |number| -> io::Result<u32> {
            let [_, _, _, _, a, b, c, d, ..] = self.request(number, &[])?.value;
            Ok(u32::from_be_bytes([a, b, c, d]))
        };
        match ask(libc::SIOCGIFADDR) {
            Ok(address) => {
                let prefix = ask(libc::SIOCGIFNETMASK)?.leading_ones() as u8;
                Ok(Some((address.into(), prefix)))
            }
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the interface's IPv4 address. Linux then removes the routes that need it.
    pub fn remove_address(&self) -> io::Result<()> {
        let nothing = socket_address(Ipv4Addr::UNSPECIFIED);
        self.request(libc::SIOCSIFADDR, &nothing).map(drop)
    }

    /// Returns a UDP socket on `port` that sends and receives through this interface only, broadcasts too, and
    /// also while the interface has no address.
    pub fn udp_socket(&self, port: u16) -> io::Result<UdpSocket> {
        let socket =
            socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let name = self.name.as_bytes();
        // SAFETY: a socket's fd, and the address and the length of the name, which the kernel copies.
        let bound = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_BINDTODEVICE,
                name.as_ptr().cast(),
                name.len() as libc::socklen_t,
            )
        };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        set_socket_broadcast(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
        Ok(socket.into())
    }

    /// Creates a bridge of this name. Returns `false` if it existed already.
    pub fn make_bridge(&self) -> io::Result<bool> {
        let mut name = Request::new(&self.name, &[]);
        match name.send(&self.socket, SIOCBRADDBR) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && self.is_bridge() => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the interface is a bridge.
    pub fn is_bridge(&self) -> bool {
        self.directory().join("bridge").exists()
    }

    /// Makes the interface a port of `bridge`, if it is not one already.
    pub fn add_to(&self, bridge: &str) -> io::Result<()> {
        if !Self::new(bridge)?.is_bridge() {
            return Err(io::Error::other("there is no such bridge"));
        }
        let master = std::fs::read_link(self.directory().join("master"));
        let master = master.ok().and_then(|m| Some(m.file_name()?.to_string_lossy().into_owned()));
        match master {
            Some(master) if master == bridge => return Ok(()),
            Some(master) => return Err(io::Error::other(format!("it belongs to `{master}`"))),
            None => {}
        }
        let index = std::fs::read_to_string(self.directory().join("ifindex"))?;
        let index: i32 = index.trim().parse().map_err(io::Error::other)?;
        Request::new(bridge, &index.to_ne_bytes()).send(&self.socket, SIOCBRADDIF)
    }
}

/// Adds a default route through `gateway`, which comes before those that there are.
pub fn set_gateway(gateway: Ipv4Addr) -> io::Result<()> {
    change_route(libc::SIOCADDRT, gateway, libc::EEXIST)
}

/// Removes the default route through `gateway`, if there is one.
pub fn remove_gateway(gateway: Ipv4Addr) -> io::Result<()> {
    change_route(libc::SIOCDELRT, gateway, libc::ESRCH)
}

/// Adds or removes the default route through `gateway`. `done` is the error if that is so already.
fn change_route(request: libc::Ioctl, gateway: Ipv4Addr, done: i32) -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let everywhere = socket_address(Ipv4Addr::UNSPECIFIED);
    let mut route = Route {
        pad1: 0,
        destination: everywhere,
        gateway: socket_address(gateway),
        mask: everywhere,
        flags: RTF_UP | RTF_GATEWAY,
        rest: [0; 7],
    };
    // SAFETY: a socket's fd; both requests take a `struct rtentry`, whose size and layout `Route` has, and
    // keep no address of it.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(&mut route)) };
    match result {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(done) => Ok(()),
            error => Err(error),
        },
    }
}

/// `struct rtentry` (include/uapi/linux/route.h) on a 64-bit machine. The bytes in `rest` may be 0.
#[repr(C)]
struct Route {
    pad1: u64,
    destination: [u8; 16],
    gateway: [u8; 16],
    mask: [u8; 16],
    flags: u16,
    rest: [u64; 7],
}

const _: () = assert!(size_of::<Route>() == 120);

/// `struct sockaddr_in` of an address without a port.
fn socket_address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[4..8].copy_from_slice(&address.octets());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_that_the_kernel_takes_as_it_is() {
        for name in ["vm0", "a", "br-guests.7", "0123456789abcde"] {
            assert_eq!(check_name(name), Ok(()));
        }
        for wrong in ["", ".", "..", "0123456789abcdef", "a/b", "a b", "a:1", "vm%d", "ä", "a\n"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_interface_that_is_not_there_is_an_error_of_the_kernel() {
        let absent = Interface::new("perennial-none").unwrap();
        assert!(!absent.exists());
        for result in [absent.set_mtu(1500), absent.set_up(), absent.mac().map(drop)] {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENODEV));
        }
        let error = absent.add_to("perennial-no-br").unwrap_err();
        assert_eq!(error.to_string(), "there is no such bridge");
    }
}
