//! The device on a real tap, which needs `/dev/net/tun` and CAP_NET_ADMIN. CI has both.

#![expect(unsafe_code, reason = "what a tap can do is asked by an ioctl that std does not have")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::*;
use crate::causes::chain;
use crate::devices::interface::Interface;

/// Options of a tap with a name that nobody else uses. `None`, with the reason told, where there can be
/// no tap.
fn options(number: u32, queues: u16) -> Option<NetOptions> {
    let name = format!("pt{}-{number}", std::process::id());
    let options = NetOptions { tap: name, mac: None, mtu: Some(1400), queues, bridge: None };
    match options.open() {
        Ok(_) => Some(options),
        Err(error) => {
            let reason = chain(&error).join(": ");
            assert!(std::env::var_os("CI").is_none(), "CI must not skip this: {reason}");
            eprintln!("SKIPPED: {reason}");
            None
        }
    }
}

fn wire(options: &NetOptions) -> Wire {
    let opened = options.open().unwrap().into_iter();
    let taps = opened.map(|opened| Tap::new(opened.fd).unwrap()).collect();
    Wire { name: options.tap.clone(), taps, on_link: Arc::new(|_| ()) }
}

/// A number that the kernel has for an interface's offloads: checksums, segments
/// (`ETHTOOL_GTXCSUM`, `ETHTOOL_GTSO`; include/uapi/linux/ethtool.h).
fn offload(name: &str, command: u32) -> bool {
    let mut value = [command, 0];
    let mut request = [0_u64; 5];
    let mut bytes = [0; 16];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    request[0] = u64::from_ne_bytes(bytes[..8].try_into().unwrap());
    request[1] = u64::from_ne_bytes(bytes[8..].try_into().unwrap());
    request[2] = value.as_mut_ptr() as u64;
    let socket = UnixDatagram::unbound().unwrap();
    // SAFETY: SIOCETHTOOL takes a `struct ifreq`, whose size `request` has, with the address of a
    // `struct ethtool_value`, whose size `value` has; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    value[1] != 0
}

fn offloads(name: &str) -> [bool; 2] {
    [0x16, 0x1e].map(|command| offload(name, command))
}

#[test]
fn the_tap_is_made_as_the_options_say() {
    let Some(options) = options(1, 1) else { return };
    let _opened = options.open().unwrap();
    let directory = Path::new("/sys/class/net").join(&options.tap);
    let read = |file: &str| std::fs::read_to_string(directory.join(file)).unwrap();
    assert_eq!(read("mtu").trim(), "1400");
    let flags = u32::from_str_radix(read("flags").trim().trim_start_matches("0x"), 16).unwrap();
    assert_eq!(flags & 1, 1, "it is up");
}

#[test]
fn a_tap_that_is_not_named_is_made_under_a_free_name_and_kept() {
    if options(20, 1).is_none() {
        return;
    }
    crate::devices::inherited::lend();
    let complete = |text: &str| NetOptions::complete(text);
    let one = complete("queues=2,mtu=1300").unwrap();
    let other = complete("").unwrap();
    let named = |text: &str| NetOptions::parse(text).unwrap().tap;
    assert!(
        one.starts_with("queues=2,mtu=1300,tap=vmtap") && named(&one) != named(&other),
        "{one} {other}"
    );
    let directory = Path::new("/sys/class/net").join(named(&one));
    let read = |file: &str| std::fs::read_to_string(directory.join(file)).unwrap();
    assert_eq!(read("mtu").trim(), "1300");
    let index = read("ifindex");
    // The devices of two boots, one after the other, have the same tap.
    for _ in 0..2 {
        assert_eq!(NetOptions::parse(&one).unwrap().open().unwrap().len(), 2);
    }
    assert_eq!(read("ifindex"), index);
    // What names a tap stays as it is, and mistakes are told before a tap is made.
    assert_eq!(complete("tap=t,mac="), Ok("tap=t,mac=".to_owned()));
    assert_eq!(complete("fd=[3,4]"), Ok("fd=[3,4]".to_owned()));
    assert!(complete("mtu=1").unwrap_err().contains("from 68"));
    let refused = complete("bridge=pt-none").unwrap_err();
    assert!(
        refused.contains("none can be made") && refused.contains("no such bridge"),
        "{refused}"
    );
}

/// Sets a number of a tap: TUNSETOWNER the user who may open it, TUNSETPERSIST whether it stays when nobody has it
/// open.
fn set(opened: &Opened, request: libc::Ioctl, value: u32) {
    // SAFETY: a tap's fd; both ioctls take a number and touch no memory.
    let result = unsafe { libc::ioctl(opened.fd.as_raw_fd(), request, libc::c_ulong::from(value)) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_tap_of_the_user_that_is_set_up_already_needs_no_privilege() {
    let Some(options) = options(12, 1) else { return };
    let off = NetOptions { tap: format!("{}b", options.tap), mtu: None, ..options.clone() };
    let off_tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    super::super::tap::attach(&off_tun, &off.tap, false).unwrap();
    let off_tap = Opened { role: "tap-0", fd: off_tun.into(), identity: None };
    let on_tap = options.open().unwrap().remove(0);
    let foreign = NetOptions { tap: format!("{}c", options.tap), ..options.clone() };
    let foreign_tap = foreign.open().unwrap().remove(0);
    let user = rustix::process::geteuid().as_raw();
    for (tap, owner) in [(&on_tap, user), (&off_tap, user), (&foreign_tap, user + 1)] {
        set(tap, libc::TUNSETOWNER, owner);
        set(tap, libc::TUNSETPERSIST, 1);
    }
    drop((on_tap, off_tap, foreign_tap));

    let larger = NetOptions { mtu: Some(1500), ..options.clone() };
    let missing = NetOptions { tap: format!("{}d", options.tap), ..options.clone() };
    let all = [options.clone(), larger, off.clone(), foreign.clone(), missing];
    let unprivileged = std::thread::spawn(move || {
        let none = CapabilitySet::empty();
        let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, none).unwrap();
        all.map(|options| options.open().map(drop).map_err(|error| chain(&error).join(": ")))
    });
    let results = unprivileged.join();
    for options in [&options, &off, &foreign] {
        set(&options.open().unwrap()[0], libc::TUNSETPERSIST, 0);
    }
    let [as_it_is, larger, off_result, foreign, missing] = results.unwrap();
    assert_eq!(as_it_is, Ok(()));
    for (result, command) in [
        (larger, format!("`ip link set {} mtu 1500`", options.tap)),
        (off_result, format!("`ip link set {} up`", off.tap)),
    ] {
        let error = result.unwrap_err();
        assert!(error.contains(&command) && error.contains("CAP_NET_ADMIN"), "{error}");
    }
    for (result, what) in [(foreign, "it is another user's"), (missing, "there is no such tap")] {
        let error = result.unwrap_err();
        assert!(error.contains(what) && error.contains("mode tap user USER"), "{error}");
    }
}

#[test]
fn the_tap_does_what_the_driver_agreed_to_and_again_after_a_restore() {
    let Some(options) = options(2, 1) else { return };
    let net = Net::new(wire(&options), MAC, None).unwrap();
    let mut guest = Guest::with(net, Vec::new());
    assert_eq!(offloads(&options.tap), [false; 2]);
    guest.start(LINUX, &[0, 1, 2]);
    assert_eq!(offloads(&options.tap), [true; 2]);
    guest.function.pause();
    let state = guest.function.save().unwrap();
    let Guest { function, thread, memory, shared, .. } = guest;
    drop((function, thread, shared));
    // The tap is made again, with nothing set.
    let wires = Arc::new(FakeWires::default());
    let resources = (resources(&memory, &wires), wire(&options));
    let function = VirtioPci::<Net>::restore(state, resources).unwrap();
    assert_eq!(offloads(&options.tap), [true; 2]);
    let mut guest = Guest::around(function, memory, wires, Vec::new());
    guest.start(LINUX & !F_GUEST_TSO4 & !F_GUEST_TSO6, &[0, 1, 2]);
    assert_eq!(offloads(&options.tap), [true, false]);
    guest.start(0, &[0, 1]);
    assert_eq!(offloads(&options.tap), [false; 2]);
}

#[test]
fn a_tap_that_another_program_has_is_refused_with_its_name() {
    for (number, queues) in [(3, 1), (4, 2)] {
        let Some(options) = options(number, queues) else { return };
        let _opened = options.open().unwrap();
        let error = chain(&options.open().unwrap_err()).join(": ");
        let process = format!("process {} (", std::process::id());
        assert!(error.starts_with(&format!("cannot open tap {}", options.tap)), "{error}");
        assert!(
            error.contains(&process) && error.contains("give the device another tap"),
            "{error}"
        );
    }
}

#[test]
fn a_tap_of_another_kind_or_without_its_bridge_says_so() {
    let Some(several) = options(5, 2) else { return };
    let _opened = several.open().unwrap();
    let one = NetOptions { queues: 1, ..several };
    let error = chain(&one.open().unwrap_err()).join(": ");
    assert!(error.contains("another number of queues"), "{error}");
    let bridge = Some("perennial-none".to_owned());
    let bridged = NetOptions { tap: format!("{}b", one.tap), bridge, ..one };
    let error = chain(&bridged.open().unwrap_err()).join(": ");
    assert!(error.contains("bridge perennial-none: there is no such bridge"), "{error}");
}

#[test]
fn the_queues_of_a_tap_are_used_as_the_driver_says() {
    let Some(options) = options(6, 4) else { return };
    let net = Net::new(wire(&options), MAC, None).unwrap();
    let shared = net.shared.clone();
    for pairs in [4, 2, 3, 1] {
        shared.use_pairs(pairs).unwrap();
    }
    // The kernel knows better than the device which queues it uses.
    shared.taps[1].set_queue(false).unwrap_err();
    shared.taps[0].set_queue(true).unwrap_err();
}

#[test]
fn frames_go_through_the_tap_both_ways() {
    if options(7, 1).is_none() {
        return;
    }
    // The thread has a network of its own: its addresses are nobody else's.
    std::thread::spawn(ask_the_host_for_its_address).join().unwrap();
}

fn ask_the_host_for_its_address() {
    // SAFETY: the thread gets another network namespace and shares everything else as before.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
    let options = options(7, 1).expect("a tap in another network");
    let net = Net::new(wire(&options), MAC, None).unwrap();
    let mut guest = Guest::with(net, Vec::new());
    let host = [198, 51, 100, 1];
    Interface::new(&options.tap).unwrap().set_address(host.into(), 24).unwrap();
    guest.start(LINUX, &[0, 1, 2]);
    let own = [198, 51, 100, 2];
    // Who has the host's address (RFC 826)?
    let mut question = [Mac::BROADCAST.0, MAC.0].concat();
    question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend([&MAC.0[..], &own, &[0; 6], &host].concat());
    guest.put(DATA, &[&[0; header::LEN][..], &question].concat());
    for number in 1..9 {
        guest.ring(0).offer(&[(DATA + 0x1000 * number, 2048, WRITE)]);
    }
    guest.offer(1, &[(DATA, header::LEN as u32 + question.len() as u32, 0)]);
    guest.ring_doorbell(0);
    // Among what the host says by itself.
    let answer =
        [&MAC.0[..], &Interface::new(&options.tap).unwrap().mac().unwrap().0, &[8, 6]].concat();
    let frames: Vec<Vec<u8>> =
        (1..9).map(|number| guest.get(DATA + 0x1000 * number + 12, 14)).collect();
    assert!(frames.contains(&answer), "{frames:x?}");
}

#[test]
fn a_tap_that_is_gone_is_a_link_that_is_down_and_the_guest_is_told() {
    // An opening that is no tap's answers as that of a tap that was deleted.
    let open = std::fs::File::options().read(true).write(true).open("/dev/net/tun");
    let Ok(file) = open.inspect_err(|error| eprintln!("SKIPPED: /dev/net/tun: {error}")) else {
        return;
    };
    let taps = vec![Tap::new(file.into()).unwrap()];
    let wire = Wire { name: "vm0".to_owned(), taps, on_link: Arc::new(|_| ()) };
    let mut guest = Guest::with(Net::new(wire, MAC, None).unwrap(), Vec::new());
    guest.start(LINUX, &[0, 1, 2]);
    let [generation]: [u8; 1] = guest.read(0x15);
    assert_eq!(guest.link_status(), S_LINK_UP);
    for _ in 0..2 {
        guest.offer(0, &[(DATA, 1600, WRITE)]);
        assert_eq!(guest.link_status(), 0);
        assert_eq!(guest.read(0x15), [generation + 1], "once");
    }
    assert_eq!(guest.ring(0).used_index(), 0);
}

#[test]
fn an_error_that_epoll_reports_of_a_tap_is_its_end_also_if_a_read_does_not_say_so() {
    // A pipe without readers: epoll reports an error, a read another one than that of a tap that is gone.
    let (_, writer) = rustix::pipe::pipe().unwrap();
    let (sender, events) = std::sync::mpsc::channel();
    let on_link: OnLink = Arc::new(move |link| sender.send(link).unwrap());
    let wire = Wire { name: "vm0".to_owned(), taps: vec![Tap::pretended(writer)], on_link };
    let mut guest = Guest::with(Net::new(wire, MAC, None).unwrap(), Vec::new());
    guest.start(LINUX, &[0, 1, 2]);
    guest.run();
    assert_eq!(guest.link_status(), 0);
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [Link::Gone], "once");
}

/// Deletes an interface as `ip link del` does (RTM_DELLINK; rtnetlink(7)).
fn delete(name: &str) {
    let index = Path::new("/sys/class/net").join(name).join("ifindex");
    let index: i32 = std::fs::read_to_string(index).unwrap().trim().parse().unwrap();
    let mut message = [0; 32];
    message[0] = 32;
    message[4] = libc::RTM_DELLINK as u8;
    // NLM_F_REQUEST and NLM_F_ACK.
    message[6] = 5;
    message[20..24].copy_from_slice(&index.to_ne_bytes());
    let netlink = rustix::net::AddressFamily::NETLINK;
    let socket = rustix::net::socket(netlink, rustix::net::SocketType::RAW, None).unwrap();
    rustix::net::send(&socket, &message, rustix::net::SendFlags::empty()).unwrap();
    let mut answer = [0; 64];
    rustix::net::recv(&socket, &mut answer, rustix::net::RecvFlags::empty()).unwrap();
    assert_eq!(answer[16..20], [0; 4], "the kernel refuses");
}

#[test]
fn a_tap_that_is_deleted_is_noticed_by_a_guest_that_neither_sends_nor_receives() {
    let Some(options) = options(8, 2) else { return };
    let (sender, events) = std::sync::mpsc::channel();
    let on_link: OnLink = Arc::new(move |link| sender.send(link).unwrap());
    let net = Net::new(Wire { on_link, ..wire(&options) }, MAC, None).unwrap();
    let mut guest = Guest::with(net, Vec::new());
    guest.start(LINUX, &[0, 1, 2]);
    let opened = Path::new("/sys/class/net").join(&options.tap);
    delete(&options.tap);
    assert!(!opened.exists());
    guest.run();
    assert_eq!(guest.link_status(), 0);
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [Link::Gone], "once");
    // The device goes on without it.
    guest.offer(1, &[(DATA, 112, 0)]);
    assert_eq!(guest.ring(1).used_index(), 1);
    guest.function.pause();
    guest.function.drain(std::time::Instant::now()).unwrap();
    guest.function.save().unwrap();
}

#[test]
fn a_guest_whose_tap_is_gone_does_not_fill_the_hosts_log_and_each_setting_is_in_it_once() {
    let Some(options) = options(13, 2) else { return };
    let mut guest = Guest::with(Net::new(wire(&options), MAC, None).unwrap(), Vec::new());
    guest.start(LINUX, &[0, 1, 2, 3, 4]);
    delete(&options.tap);
    guest.run();
    let lines = logged(|| {
        for _ in 0..20 {
            // Each start sets the offloads, each command the queues.
            guest.start(LINUX, &[0, 1, 2, 3, 4]);
            assert_eq!(guest.command(4, &[4, 0, 2, 0]), 1, "the kernel refuses");
        }
    });
    let lines_with = |text| lines.iter().filter(|line| line.contains(text)).count();
    assert_eq!(lines_with("of its queues"), 1, "{lines:?}");
    assert_eq!(lines_with("set its offloads"), 1, "{lines:?}");
    assert!((2..=3).contains(&lines.len()), "{} lines: {lines:?}", lines.len());
}

#[test]
fn the_host_sees_a_link_that_is_down_as_a_tap_without_carrier() {
    let Some(options) = options(9, 1) else { return };
    let carrier = Path::new("/sys/class/net").join(&options.tap).join("carrier");
    let carrier = || std::fs::read_to_string(&carrier).unwrap().trim().to_owned();
    let guest = Guest::with(Net::new(wire(&options), MAC, None).unwrap(), Vec::new());
    assert_eq!(carrier(), "1");
    let port = guest.function.network_port().unwrap();
    port.set_link(false);
    assert_eq!(carrier(), "0");
    port.set_link(true);
    assert_eq!(carrier(), "1");
}

/// Leaves an fd open as a program does that then executes this one. Returns its number.
fn leave_open(fd: std::os::fd::OwnedFd) -> i32 {
    use std::os::fd::IntoRawFd;
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    fd.into_raw_fd()
}

#[test]
fn a_tap_that_the_user_brings_is_used_as_it_is_and_again_after_a_reset() {
    let Some(options) = options(10, 2) else { return };
    crate::devices::inherited::lend();
    let fds: Vec<i32> =
        options.open().unwrap().into_iter().map(|opened| leave_open(opened.fd)).collect();
    let list = format!("fd=[{},{}]", fds[0], fds[1]);
    let wrong = NetOptions::parse(&format!("{list},mtu=x")).unwrap_err();
    assert!(wrong.contains("mtu"), "{wrong}");
    let given = NetOptions::parse(&format!("{list},mtu=1300")).unwrap();
    assert_eq!((given.tap.as_str(), given.queues), (options.tap.as_str(), 2));
    let again = NetOptions::parse(&list).unwrap_err();
    assert!(again.contains("another device has the tap"), "{again}");
    for _ in 0..2 {
        // The device detaches the second queue; the next one must find it attached.
        let net = Net::new(wire(&given), MAC, given.mtu).unwrap();
        net.shared.use_pairs(2).unwrap();
        net.shared.use_pairs(1).unwrap();
    }
    let mtu = std::fs::read_to_string(format!("/sys/class/net/{}/mtu", options.tap)).unwrap();
    assert_eq!(mtu.trim(), "1400", "the interface is its owner's");
}

#[test]
fn a_descriptor_that_is_no_tap_of_the_right_kind_says_so() {
    let Some(one) = options(11, 1) else { return };
    crate::devices::inherited::lend();
    let file = leave_open(std::fs::File::open("/dev/null").unwrap().into());
    let open = || std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let kind = |suffix: &str, flags: i32| {
        let tun = open();
        let name = format!("{}{suffix}", one.tap);
        let flags = (flags as u16).to_ne_bytes();
        crate::devices::interface::Request::new(&name, &flags).send(&tun, libc::TUNSETIFF).unwrap();
        leave_open(tun.into())
    };
    let tun = kind("n", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let bare = kind("h", libc::IFF_TAP | libc::IFF_NO_PI);
    let with_information = kind("p", libc::IFF_TAP | libc::IFF_VNET_HDR);
    let [a, b] =
        ["a", "b"].map(|suffix| kind(suffix, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR));
    for (list, why) in [
        (file.to_string(), "is no tap or macvtap"),
        (leave_open(open().into()).to_string(), "is no tap or macvtap"),
        (tun.to_string(), "it must be a tap"),
        (bare.to_string(), "IFF_VNET_HDR"),
        (with_information.to_string(), "IFF_NO_PI"),
        (format!("[{a},{b}]"), "different interfaces"),
        (format!("{a},queues=2"), "queues must be the same number"),
        ("999999".to_owned(), "is not open"),
    ] {
        let said = NetOptions::parse(&format!("fd={list}")).unwrap_err();
        assert!(said.contains(why), "{list}: {said}");
    }
}

#[test]
fn headers_that_the_kernel_refuses_cost_only_their_frames() {
    let Some(options) = options(12, 1) else { return };
    let mut guest = Guest::with(Net::new(wire(&options), MAC, None).unwrap(), Vec::new());
    guest.start(LINUX, &[0, 1, 2]);
    // All pass the device's own checks; none of these frames is TCP.
    let headers: [[u8; header::LEN]; 5] = [
        [1, header::GSO_TCPV4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
        [1, header::GSO_TCPV6, 0, 0, 48, 0, 14, 0, 0, 0, 0, 0],
        [1, header::GSO_TCPV4, 60, 0, 0xff, 0xff, 58, 0, 0, 0, 0, 0],
        [1, header::GSO_NONE, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0],
        [1, header::GSO_TCPV6, 14, 0, 0xff, 0xff, 14, 0, 44, 0, 0, 0],
    ];
    for (number, header) in (1_u16..).zip(headers) {
        for kind in [[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0], [0, 3]] {
            let mut bytes = frame(OTHER, 60);
            bytes[12..14].copy_from_slice(&kind);
            guest.put(DATA, &[&header[..], &bytes].concat());
            guest.offer(1, &[(DATA, 72, 0)]);
        }
        assert_eq!(guest.ring(1).used_index(), 5 * number);
    }
    assert_eq!(guest.function.network_port().unwrap().link(), Link::Up);
}
