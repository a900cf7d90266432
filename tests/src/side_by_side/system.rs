//! System calls that neither the standard library nor rustix has: the tap, and a process's CPU time.

#![expect(unsafe_code, reason = "ioctls of a tap and of an interface, and a process's clock")]

use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

const TUN: &str = "/dev/net/tun";

/// Creates a tap that stays when no program has it open, gives it this address, and switches it on.
pub(super) fn make_tap(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open(TUN)?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    send(&tun, libc::TUNSETIFF, &mut request)?;
    // SAFETY: a tap's fd; the ioctl takes a number and touches no memory.
    done(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) })?;
    // Any socket does for an interface's settings.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        request.ifr_ifru.ifru_addr = socket_address(value);
        send(&socket, call, &mut request)?;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    send(&socket, libc::SIOCSIFFLAGS, &mut request)
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

/// The CPU time that all threads of a process have used, the guest's included.
pub(super) fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: the call writes the id of a clock.
    match unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) } {
        0 => {}
        errno => return Err(io::Error::from_raw_os_error(errno)),
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec.
    done(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn done(returned: libc::c_int) -> io::Result<()> {
    match returned {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_time_of_a_process_grows_by_its_work() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let mut sum = 0_u64;
        while cpu_time(pid).unwrap() == before {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
