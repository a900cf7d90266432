//! Network devices that lose their tap or whose link is down, over a handover and a live update; and a tap that a
//! user brings to `perennial run` as a file descriptor.
//!
//! PID 1 starts the host as a daemon, in both kernels. The second kernel has [`NETWORK_AGAIN`] on its command line.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::consoles::{attach, ctl, leave, say, start};
use super::init::{BOOTED, CMDLINE, Problem, arguments};
use super::session::{Session, Terminal};
use super::{DATA, GUEST, NETWORK_AGAIN, NEXT_CMDLINE, pool_mount};
use crate::network::ECHO_PORT;
use crate::tap;

/// The VM, and its tap, which the host makes.
const VM: &str = "web";
const TAP: &str = "vm-web";
/// The taps that PID 1 makes: one, and one with two queues.
const OWN_TAP: &str = "own";
const OWN_QUEUES: &str = "own2";
/// The addresses of the two ends of a tap.
const HOST_END: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const GUEST_END: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// What stands before and behind the address of its network device in a guest's note of its boot.
const MAC: (&str, char) = ("\"mac\":\"", '"');
/// Bytes that a guest sends back.
const BYTES: usize = 256 << 10;
/// Longest time for a guest to answer, or for the status to change.
const WITHIN: Duration = Duration::from_secs(120);

pub(super) fn before_the_update() -> Result<(), Problem> {
    let mut host = start_host()?;
    let mut session = attach(VM)?;
    session.wait_for(BOOTED)?;
    session.wait_for("\"note\":\"echo\"")?;
    expect_traffic(TAP).map_err(|e| format!("at the start: {e}"))?;

    // The guest resets its queues one by one, and sets them up with other sizes.
    session.type_keys(b"\rring 64\r")?;
    session.wait_for("\"note\":\"ring\",\"text\":\"64\"")?;
    exchange().map_err(|e| format!("after a change of the queues: {e}"))?;

    // The tap goes, and everything else stays.
    tap::delete(TAP)?;
    wait_for_link("gone")?;
    wait_for_carrier(&mut session, false)?;
    say(&mut session, "alone")?;
    ctl(&["handover"])?;
    wait_for_link("up")?;
    wait_for_carrier(&mut session, true)?;
    expect_traffic(TAP).map_err(|e| format!("after the handover: {e}"))?;

    // The setting of the link, and a tap that is gone, over a live update.
    ctl(&["link", VM, "down"])?;
    wait_for_link("down")?;
    wait_for_carrier(&mut session, false)?;
    tap::delete(TAP)?;
    wait_for_link("gone")?;
    let refused = ctl(&["update"]);
    let ended = host.try_wait()?;
    Err(format!("the live update did not take place: {refused:?}; the host: {ended:?}").into())
}

pub(super) fn after_the_update() -> Result<(), Problem> {
    let mut host = start_host()?;
    wait_for_link("down")?;
    let mut session = attach(VM)?;
    say(&mut session, "down")?;
    ctl(&["link", VM, "up"])?;
    wait_for_link("up")?;
    wait_for_carrier(&mut session, true)?;
    expect_traffic(TAP).map_err(|e| format!("after the live update: {e}"))?;
    leave(session, "after the live update")?;
    ctl(&["stop", VM, "--now"])?;
    kill_process(Pid::from_child(&host), Signal::TERM)?;
    let ended = host.wait()?;
    if !ended.success() {
        return Err(format!("after SIGTERM: the host: {ended}").into());
    }
    with_an_open_tap()
}

/// `perennial run` with the file descriptor of a tap. Nothing can replace its program or its kernel, which it says
/// before anything happens to its VM.
fn with_an_open_tap() -> Result<(), Problem> {
    std::env::set_current_dir(GUEST)?;
    let own = tap::open(OWN_TAP)?;
    let (net, cmdline) = (format!("fd={}", lend(&own)?), cmdline());
    let mut arguments = arguments();
    let at = arguments.iter().position(|word| *word == CMDLINE).ok_or("no command line")?;
    arguments[at] = &cmdline;
    let socket = "/run/own.sock";
    arguments.extend(["--net", &net, "--api-socket", socket]);
    let mut session = Session::start(Terminal::open()?, &arguments)?;
    let mac = session.find_before(BOOTED, MAC)?;
    session.wait_for("\"note\":\"echo\"")?;
    expect_traffic(OWN_TAP)?;
    for command in ["update", "handover"] {
        match ctl(&["--socket", socket, command]) {
            Err(why) if why.to_string().contains("`perennial run` keeps its VM only while") => {}
            other => return Err(format!("{command}: {other:?}").into()),
        }
        session.expect_running()?;
        exchange().map_err(|error| format!("after the refused {command}: {error}"))?;
    }
    // The guest's next boot has the same descriptor.
    session.type_keys(b"\rreboot\r")?;
    let again = session.find_before(BOOTED, MAC)?;
    session.wait_for("\"note\":\"echo\"")?;
    exchange().map_err(|error| format!("after a reset of the guest: {error}"))?;
    session.type_keys(b"\x01x")?;
    session.expect_end("with an open tap", 0)?;
    // All VMs of `perennial run` have one name, and each has an address of its own.
    drop(own);
    let queues = [tap::open_queue(OWN_QUEUES)?, tap::open_queue(OWN_QUEUES)?];
    let net = format!("fd=[{},{}]", lend(&queues[0])?, lend(&queues[1])?);
    let at = arguments.iter().position(|word| word.starts_with("fd=")).ok_or("no fd=")?;
    arguments[at] = &net;
    arguments.extend(["--cpus", "boot=2"]);
    let mut other = Session::start(Terminal::open()?, &arguments)?;
    let others = other.find_before(BOOTED, MAC)?;
    other.wait_for("\"note\":\"echo\"")?;
    expect_traffic(OWN_QUEUES)?;
    other.type_keys(b"\rnet\r")?;
    other.wait_for("\"pairs\":2")?;
    other.type_keys(b"\x01x")?;
    other.expect_end("another VM with a tap of two queues", 0)?;
    match mac == again && mac != others && mac.len() == "02:00:00:00:00:00".len() {
        true => Ok(()),
        false => {
            Err(format!("the addresses are {mac}, after a reset {again}, of another VM {others}")
                .into())
        }
    }
}

/// Lets the programs that this one starts inherit a file. Returns its number.
fn lend(file: &File) -> Result<i32, Problem> {
    rustix::io::fcntl_setfd(file, FdFlags::empty())?;
    Ok(file.as_raw_fd())
}

fn cmdline() -> String {
    format!("{CMDLINE} ip={GUEST_END}::{HOST_END}:{MASK}::eth0:off perennial.echo={ECHO_PORT}")
}

fn start_host() -> Result<Child, Problem> {
    start(&format!(
        "[update]\nkernel = \"{DATA}/bzImage\"\ninitramfs = \"{DATA}/initramfs\"\n\
         cmdline = \"{NEXT_CMDLINE} {} {NETWORK_AGAIN}\"\n\
         [[vm]]\nname = \"{VM}\"\nmemory = \"size=64M\"\nkernel = \"{GUEST}/bzImage\"\n\
         initramfs = \"{GUEST}/initramfs\"\ncmdline = \"{}\"\nserial = \"pty\"\n\
         net = [\"tap={TAP}\"]\n",
        pool_mount::parameter()?,
        cmdline()
    ))
}

/// Gives the tap, which is new, its address, and errors unless the guest then sends back what it gets.
fn expect_traffic(tap: &str) -> Result<(), Problem> {
    tap::set_address(tap, HOST_END, MASK)?;
    exchange()
}

/// Errors unless the guest sends back what it gets.
fn exchange() -> Result<(), Problem> {
    let address = (GUEST_END, ECHO_PORT).into();
    let mut stream = TcpStream::connect_timeout(&address, WITHIN)?;
    stream.set_read_timeout(Some(WITHIN))?;
    let sent: Vec<u8> = (0..BYTES).map(|at| (at / 251) as u8 ^ at as u8).collect();
    let mut writer = stream.try_clone()?;
    let bytes = sent.clone();
    let writes = thread::spawn(move || writer.write_all(&bytes));
    let mut returned = vec![0; BYTES];
    stream.read_exact(&mut returned)?;
    writes.join().map_err(|_| "the writer panicked")??;
    if returned == sent { Ok(()) } else { Err("the guest sent back something else".into()) }
}

/// Has the guest wait until its carrier is there, or is not.
fn wait_for_carrier(session: &mut Session, on: bool) -> Result<(), Problem> {
    // What is typed while the console is attached again may be lost. The word is a new one, because an answer
    // to an earlier one may come twice and late.
    static WAITS: AtomicU32 = AtomicU32::new(0);
    say(session, &format!("ready {}", WAITS.fetch_add(1, Ordering::Relaxed)))?;
    let on = u8::from(on);
    session.type_keys(format!("\rcarrier {on}\r").as_bytes())?;
    session.wait_for(&format!("\"note\":\"carrier\",\"text\":\"{on}\""))
}

/// Waits until the status says so of the link of the only network device.
fn wait_for_link(wanted: &str) -> Result<(), Problem> {
    let deadline = Instant::now() + WITHIN;
    loop {
        let status: Value = serde_json::from_str(&ctl(&["status"])?)?;
        let links = &status["vms"][0]["links"];
        let is_wanted = |links: &serde_json::Map<_, _>| links.values().eq([wanted]);
        match links.as_object() {
            Some(links) if is_wanted(links) => return Ok(()),
            _ if Instant::now() > deadline => {
                return Err(format!("the links are {links}, not {wanted}").into());
            }
            _ => thread::sleep(Duration::from_millis(200)),
        }
    }
}
