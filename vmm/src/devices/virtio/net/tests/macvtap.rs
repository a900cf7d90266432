//! The device on a real macvtap, whose lower device is a tap of the test. Needs root, `/dev/net/tun` and a kernel with
//! macvtap.

#![expect(unsafe_code, reason = "a network of the test alone")]

use std::fs::File;
use std::os::fd::{IntoRawFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;
use crate::causes::chain;
use crate::devices::interface::Interface;

/// The lower device. The macvtaps of the tests have different names, because the process has one list of lent taps.
const LOWER: &str = "low0";

/// Returns the bytes of an attribute (rtnetlink(7)).
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Makes a macvtap on the interface [`LOWER`]. Errors if the kernel has none.
fn make_macvtap(name: &str) -> io::Result<()> {
    let index = std::fs::read_to_string(format!("/sys/class/net/{LOWER}/ifindex"))?;
    let index: u32 = index.trim().parse().map_err(io::Error::other)?;
    // The mode `bridge`, in IFLA_MACVLAN_MODE.
    let data = attribute(1, &4_u32.to_ne_bytes());
    let kind = [attribute(1, b"macvtap\0"), attribute(2, &data)].concat();
    // IFLA_IFNAME, IFLA_LINK, IFLA_LINKINFO, behind a `struct ifinfomsg` without any wish.
    let attributes = [
        vec![0; 16],
        attribute(3, format!("{name}\0").as_bytes()),
        attribute(5, &index.to_ne_bytes()),
        attribute(18, &kind),
    ]
    .concat();
    // RTM_NEWLINK; request, acknowledge, create, and only if there is none.
    let mut message = (16 + attributes.len() as u32).to_ne_bytes().to_vec();
    message.extend([16_u16.to_ne_bytes(), 0x605_u16.to_ne_bytes()].concat());
    message.extend([0; 8]);
    message.extend(attributes);
    let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0; 1024];
    rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    match i32::from_ne_bytes(answer[16..20].try_into().unwrap()) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

/// Runs a test on a thread with a network of its own, which has a macvtap. The test gets the other end of the lower
/// device's wire. Skips, and says so, where there can be none.
fn with_macvtap(name: &'static str, test: fn(&str, OwnedFd)) {
    let run = move || -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("it needs root".to_owned());
        }
        // SAFETY: the thread gets namespaces of its own and shares everything else as before.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        // sysfs shows the network of the process that mounts it.
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
        let options = NetOptions::parse(&format!("tap={LOWER}")).unwrap();
        let opened = options.open().map_err(|error| chain(&error).join(": "))?;
        make_macvtap(name).map_err(|error| format!("there is no macvtap: {error}"))?;
        Interface::new(name).unwrap().set_up().unwrap();
        test(name, opened.into_iter().next().unwrap().fd);
        Ok(())
    };
    if let Err(reason) = std::thread::spawn(run).join().unwrap() {
        eprintln!("SKIPPED: {reason}");
    }
}

/// Opens the macvtap's device for each pair of queues, and leaves it open as a shell does that then executes this
/// program. Returns the numbers.
fn leave_open(name: &str, pairs: usize) -> Vec<i32> {
    let directory = format!("/sys/class/net/{name}/macvtap");
    let device = std::fs::read_dir(directory).unwrap().next().unwrap().unwrap();
    let number = std::fs::read_to_string(device.path().join("dev")).unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    let number = rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap());
    // Whoever manages /dev may make the node there later.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tap");
    mknodat(CWD, &path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number).unwrap();
    let open = |_| {
        let fd = File::options().read(true).write(true).open(&path).unwrap();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        fd.into_raw_fd()
    };
    (0..pairs).map(open).collect()
}

#[test]
fn the_name_of_a_macvtap_is_refused_with_the_words_that_bring_it() {
    with_macvtap("mv0", |name, _lower| {
        let mac = Interface::new(name).unwrap().mac().unwrap();
        let named = NetOptions::parse(&format!("tap={name}")).unwrap();
        let error = chain(&named.open().unwrap_err()).join(": ");
        assert!(error.starts_with("cannot open tap mv0: only `perennial run` takes"), "{error}");
        let words = format!("it is a macvtap: `--net fd=3,mac={mac} 3<>/dev/tap");
        assert!(error.contains(&words), "{error}");
    });
}

#[test]
fn frames_pass_through_a_macvtap_that_the_user_brings() {
    with_macvtap("mv1", |name, lower| {
        crate::devices::inherited::lend();
        let mac = Interface::new(name).unwrap().mac().unwrap();
        let fds = leave_open(name, 2);
        let options = NetOptions::parse(&format!("fd=[{},{}],mac={mac}", fds[0], fds[1])).unwrap();
        assert_eq!((options.tap.as_str(), options.queues), (name, 2));
        for _ in 0..2 {
            let taps = options.open().unwrap().into_iter();
            let taps = taps.map(|opened| Tap::new(opened.fd).unwrap()).collect();
            let name = options.tap.clone();
            let wire = Wire { name, taps, on_link: Arc::new(|_| ()) };
            let mut guest = Guest::with(Net::new(wire, mac, None).unwrap(), Vec::new());
            guest.start(LINUX & !F_MQ, &[0, 1, 2]);
            exchange(&mut guest, &lower, mac);
            // A link that is down carries nothing, although a macvtap has no carrier to switch.
            let port = guest.function.network_port().unwrap();
            port.set_link(false);
            guest.run();
            assert_eq!(guest.link_status(), 0);
            port.set_link(true);
            guest.run();
            exchange(&mut guest, &lower, mac);
        }
    });
}

#[test]
fn a_macvtap_that_is_deleted_is_noticed_although_the_kernel_does_not_report_it() {
    with_macvtap("mv2", |name, lower| {
        crate::devices::inherited::lend();
        let mac = Interface::new(name).unwrap().mac().unwrap();
        let fd = leave_open(name, 1)[0];
        let options = NetOptions::parse(&format!("fd={fd},mac={mac}")).unwrap();
        let opened = options.open().unwrap().into_iter().next().unwrap();
        let (sender, events) = std::sync::mpsc::channel();
        let wire = Wire {
            name: options.tap.clone(),
            taps: vec![Tap::new(opened.fd).unwrap()],
            on_link: Arc::new(move |link| sender.send(link).unwrap()),
        };
        let mut guest = Guest::with(Net::new(wire, mac, None).unwrap(), Vec::new());
        guest.start(LINUX & !F_MQ, &[0, 1, 2]);
        exchange(&mut guest, &lower, mac);
        assert_eq!(events.try_iter().next(), None);
        // Its lower device ends with its last file, and the macvtap with its lower device.
        drop(lower);
        let is_noticed = (0..3).any(|_| {
            guest.thread.run_with_timeout(60_000).unwrap();
            guest.link_status() == 0
        });
        assert!(is_noticed);
        guest.run();
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Link::Gone], "once");
    });
}

/// A frame in each direction.
fn exchange(guest: &mut Guest, lower: &OwnedFd, mac: Mac) {
    let mut bytes = [0; 2048];
    while rustix::io::read(lower, &mut bytes).is_ok() {}
    let before = guest.ring(0).used_index();
    guest.offer(0, &[(DATA, 1600, WRITE)]);
    let inward = frame(mac, 100);
    rustix::io::write(lower, &[&[0; 10][..], &inward].concat()).unwrap();
    guest.run();
    assert_eq!(guest.ring(0).used_index(), before + 1);
    assert_eq!(guest.get(DATA + 12, 100), inward);
    let mut outward = frame(OTHER, 90);
    outward[6..12].copy_from_slice(&mac.0);
    guest.put(DATA + 0x1000, &[&[0; 12][..], &outward].concat());
    guest.offer(1, &[(DATA + 0x1000, 102, 0)]);
    let sent = std::iter::from_fn(|| {
        let len = rustix::io::read(lower, &mut bytes).ok()?;
        Some(bytes[10..len].to_vec())
    });
    let mut sent: Vec<_> = sent.collect();
    sent.retain(|frame| frame[12..14] == outward[12..14]);
    assert_eq!(sent, [outward]);
}
