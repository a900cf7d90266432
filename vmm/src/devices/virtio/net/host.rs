//! The part of the device that runs in the host: opens the tap and sets it up. Errors name the cause.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::options::{NetOptions, TAPS};
use super::{lent, tap};
use crate::devices::files::{OpenError, Opened};
use crate::devices::interface::Interface;

/// The name of a tap that nobody has named: the kernel puts the first free number in the place of `%d`.
const FREE_NAME: &str = "vmtap%d";
/// The device that creates taps.
const TUN: &str = "/dev/net/tun";

/// Opens one file descriptor for each pair of queues, and sets the interface up: MTU, bridge, switched on.
pub(super) fn open(options: &NetOptions) -> Result<Vec<Opened>, OpenError> {
    let NetOptions { tap: name, mac: _, mtu, queues, bridge } = options;
    let error = |remedy, source| OpenError { what: "tap", path: name.into(), remedy, source };
    if let Some(fds) = lent::open(name) {
        let fds = fds.map_err(|why| error("", io::Error::other(why)))?;
        return lend(fds).map_err(|source| error("", source));
    }
    let interface = Interface::new(name).map_err(|source| error("", source))?;
    let existed = interface.exists();
    // The kernel lets any number of programs open a tap with several queues.
    if *queues > 1
        && existed
        && let Some(user) = user_of(name)
    {
        return Err(in_use(name, Some(user), libc::EBUSY));
    }
    let opened = TAPS.iter().take((*queues).into()).map(|role| {
        let (_, fd) = open_queue(name, *queues > 1)?;
        Ok(Opened { role, fd, identity: None })
    });
    let opened = opened.collect::<Result<Vec<_>, OpenError>>()?;
    if !existed {
        // After an update it may be that of a user, who had given it addresses or a bridge.
        let bridge =
            bridge.as_ref().map_or("no bridge".to_owned(), |name| format!("bridge {name}"));
        tracing::info!("tap {name}: there was none, so it is made, as a port of {bridge}");
    }
    set_up(&interface, *mtu, bridge.as_deref())?;
    Ok(opened)
}

/// Makes a tap of this many pairs of queues under a free name, and sets the interface up. Returns the name and a file
/// descriptor for each pair.
pub(super) fn make(
    pairs: u16,
    mtu: Option<u16>,
    bridge: Option<&str>,
) -> Result<(String, Vec<OwnedFd>), OpenError> {
    let (mut name, mut files) = (FREE_NAME.to_owned(), Vec::new());
    for _ in 0..pairs {
        let (attached, fd) = open_queue(&name, pairs > 1)?;
        name = attached;
        files.push(fd);
    }
    let error = |source| OpenError { what: "tap", path: name.clone().into(), remedy: "", source };
    set_up(&Interface::new(&name).map_err(error)?, mtu, bridge)?;
    Ok((name, files))
}

/// Opens a queue of the tap `name`. `several`: whether the tap can have more than one. Returns the tap's name.
fn open_queue(name: &str, several: bool) -> Result<(String, OwnedFd), OpenError> {
    let error = |remedy, source| OpenError { what: "tap", path: name.into(), remedy, source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let tun = options.open(TUN).map_err(|source| error(NO_TUN, about(TUN, &source)))?;
    let attached = tap::attach(&tun, name, several).map_err(|source| not_attached(name, source))?;
    Ok((attached, tun.into()))
}

/// Sets an interface up: MTU, bridge, switched on.
fn set_up(interface: &Interface, mtu: Option<u16>, bridge: Option<&str>) -> Result<(), OpenError> {
    let step = |what: &str, command: &str, result: io::Result<()>| {
        result.map_err(|source| not_set_up(interface.name(), what, command, &source))
    };
    if let Some(mtu) = mtu {
        let what = format!("it does not take packets of {mtu} bytes");
        step(&what, &format!("mtu {mtu}"), interface.set_mtu(mtu))?;
    }
    if let Some(bridge) = bridge {
        let what = format!("it cannot become a port of bridge {bridge}");
        step(&what, &format!("master {bridge}"), interface.add_to(bridge))?;
    }
    step("it cannot be switched on", "up", interface.set_up())
}

/// Returns the error for a tap that is not as the device needs it. `command` is what `ip link set` would do.
fn not_set_up(name: &str, what: &str, command: &str, source: &io::Error) -> OpenError {
    let (remedy, source) = match source.raw_os_error() {
        Some(libc::EPERM) => {
            let what = format!("{what}, which root does by `ip link set {name} {command}`");
            (": without CAP_NET_ADMIN it must be set up already", about(&what, source))
        }
        _ => (": check its name, its mtu and its bridge", about(what, source)),
    };
    OpenError { what: "tap", path: name.into(), remedy, source }
}

/// Prepares the descriptors that the user has brought for a new process: what belongs to a descriptor stays as the
/// last process left it.
fn lend(fds: Vec<OwnedFd>) -> io::Result<Vec<Opened>> {
    let prepare = |(role, fd): (&&'static str, OwnedFd)| {
        rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK | OFlags::RDWR)?;
        tap::reattach(&fd);
        Ok(Opened { role, fd, identity: None })
    };
    TAPS.iter().zip(fds).map(prepare).collect()
}

const NO_TUN: &str =
    ": the kernel needs TUN/TAP (the module `tun`, which `[host] modules` can list)";

/// Returns the error with `what` in front of its text.
fn about(what: &str, source: &io::Error) -> io::Error {
    io::Error::new(source.kind(), format!("{what}: {source}"))
}

const MACVTAP: &str = ": only `perennial run` takes a macvtap, as an open file; a VM of a host needs a tap, which \
                       the next host can make again";

/// Returns the error for a tap that the kernel does not open, with its cause and a remedy.
fn not_attached(name: &str, source: io::Error) -> OpenError {
    let (remedy, source) = match source.raw_os_error() {
        Some(libc::EBUSY) => return in_use(name, user_of(name), libc::EBUSY),
        Some(libc::EINVAL) => match macvtap_of(name) {
            Some(use_it) => (MACVTAP, io::Error::other(format!("it is a macvtap: {use_it}"))),
            None => (
                ": give the device another tap, or delete the interface and let the host make it",
                about(
                    "an interface of that name is no tap, or has another number of queues",
                    &source,
                ),
            ),
        },
        Some(libc::EPERM) => return not_permitted(name, &source),
        _ => ("", source),
    };
    OpenError { what: "tap", path: name.into(), remedy, source }
}

/// Returns the error for a tap that may not be made, or not be used.
fn not_permitted(name: &str, source: &io::Error) -> OpenError {
    let exists = Interface::new(name).is_ok_and(|interface| interface.exists());
    let (remedy, what) = match (name == FREE_NAME, exists) {
        (true, _) => (
            ": name one of the user's own with tap=NAME (`ip tuntap add NAME mode tap user USER`)",
            "making one needs root or CAP_NET_ADMIN",
        ),
        (false, false) => (
            ": make it for the user (`ip tuntap add NAME mode tap user USER`)",
            "there is no such tap, and making one needs root or CAP_NET_ADMIN",
        ),
        (false, true) => (
            ": give it to the user (`ip tuntap del NAME mode tap`, `ip tuntap add NAME mode tap user USER`)",
            "it is another user's, and using it needs root or CAP_NET_ADMIN",
        ),
    };
    OpenError { what: "tap", path: name.into(), remedy, source: about(what, source) }
}

/// Returns how a shell gives a macvtap to `perennial run`. `None` for any other interface.
fn macvtap_of(name: &str) -> Option<String> {
    let interface = Interface::new(name).ok()?;
    // Linux drivers/net/macvtap.c, `macvtap_device_event`.
    let mut devices = std::fs::read_dir(interface.directory().join("macvtap")).ok()?;
    let device = devices.next()?.ok()?.file_name();
    let mac = interface.mac().map_or("MAC".to_owned(), |mac| mac.to_string());
    Some(format!("`--net fd=3,mac={mac} 3<>/dev/{}`", device.to_string_lossy()))
}

/// Returns the error for a tap that `user` has open.
fn in_use(name: &str, user: Option<String>, errno: i32) -> OpenError {
    let user = user.unwrap_or_else(|| "another program".to_owned());
    let source = about(&format!("{user} has it open"), &io::Error::from_raw_os_error(errno));
    let remedy = ": end the other program, or give the device another tap";
    OpenError { what: "tap", path: name.into(), remedy, source }
}

/// Returns the process that has the tap `name` open, if `/proc` shows it (line `iff:` of fdinfo; Linux
/// drivers/net/tun.c).
fn user_of(name: &str) -> Option<String> {
    let wanted = format!("iff:\t{name}");
    let is_the_tap = |info: &Path| {
        let info = std::fs::read_to_string(info).unwrap_or_default();
        info.lines().any(|line| line == wanted)
    };
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let process = entries(Path::new("/proc")).find(|process| {
        let is_process = process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        is_process && entries(&process.path().join("fdinfo")).any(|fd| is_the_tap(&fd.path()))
    })?;
    let command = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
    Some(format!("process {} ({})", process.file_name().to_string_lossy(), command.trim_end()))
}
