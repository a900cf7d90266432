//! PID 1: does what a person does who runs a VM in a terminal, and checks what that person sees.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::LocalModes;

use super::session::{IN_TERMINAL, Session, Terminal};
use super::{
    AGAIN, CONSOLES, DATA, GUEST, NETWORK, NETWORK_AGAIN, PASSED, PERENNIAL, VERDICT, consoles,
    network, pool_mount, user,
};

pub(super) type Problem = Box<dyn std::error::Error>;

/// The command line of every VM here. A guest that panics resets.
pub(super) const CMDLINE: &str =
    "console=ttyS0 panic=-1 quiet tsc=nowatchdog perennial.memory=1 perennial.busy=1";
/// A note of the guest's PID 1, once for each boot.
pub(super) const BOOTED: &str = "\"note\":\"boot\"";

/// The machine's disk, from which a guest boots.
const OWN_DISK: &str = "/dev/vda";

/// One thing that a person does.
type Step = fn() -> Result<(), Problem>;

/// Runs as PID 1, or as the program that a `Session` starts in its terminal.
pub fn main() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == IN_TERMINAL) {
        let problem = enter_terminal(arguments.collect());
        eprintln!("cannot enter the terminal: {problem}");
        std::process::exit(100);
    }
    let verdict = match all() {
        Ok(()) => PASSED.to_owned(),
        Err(problem) => problem.to_string().replace(['\r', '\n'], " "),
    };
    println!("{VERDICT}{verdict}");
    let _ = reboot(RebootCommand::PowerOff);
}

/// Makes the first argument the controlling terminal, and executes the others in it.
fn enter_terminal(arguments: Vec<std::ffi::OsString>) -> Problem {
    let enter = || -> Result<std::convert::Infallible, Problem> {
        rustix::process::setsid()?;
        // A session's first terminal becomes its controlling terminal.
        let path = arguments.first().ok_or("no terminal")?;
        let terminal = rustix::fs::open(path, OFlags::RDWR, Mode::empty())?;
        let file = || terminal.try_clone().map(Stdio::from);
        let mut command = Command::new(arguments.get(1).ok_or("no program")?);
        command.args(&arguments[2..]).stdin(file()?).stdout(file()?).stderr(file()?);
        Err(command.exec().into())
    };
    match enter() {
        Ok(never) => match never {},
        Err(problem) => problem,
    }
}

fn all() -> Result<(), Problem> {
    for (fs, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(fs, target, fs, MountFlags::empty(), None)?;
    }
    fs::create_dir_all("/dev/pts")?;
    mount("devpts", "/dev/pts", "devpts", MountFlags::empty(), c"ptmxmode=0666")?;
    // Only emergency messages go to the console, so that none splits the verdict.
    fs::write("/proc/sys/kernel/printk", "1")?;
    crate::modules::load_all();
    let kernel = fs::read_to_string("/proc/cmdline")?;
    let over_an_update: [(&str, Step); 4] = [
        (CONSOLES, consoles::before_the_update),
        (AGAIN, consoles::after_the_update),
        (NETWORK, network::before_the_update),
        (NETWORK_AGAIN, network::after_the_update),
    ];
    let is_asked =
        |(word, _): &&(&str, Step)| kernel.split_whitespace().any(|given| given == *word);
    let Some((word, step)) = over_an_update.iter().find(is_asked) else { return run_steps() };
    let is_first = [CONSOLES, NETWORK].contains(word);
    mount("debugfs", "/sys/kernel/debug", "debugfs", MountFlags::empty(), None)?;
    mount("/dev/vda", DATA, "ext4", MountFlags::RDONLY, None)?;
    pool_mount::set_up(is_first)?;
    step()
}

fn run_steps() -> Result<(), Problem> {
    // The paths of the guest's files are relative.
    std::env::set_current_dir(GUEST)?;
    let steps: [(&str, Step); 9] = [
        ("typing and leaving", typing_and_leaving),
        ("a guest that powers off", powering_off),
        ("a signal", a_signal),
        ("without a terminal", without_a_terminal),
        ("a VM that fails", a_vm_that_fails),
        ("a VM that cannot boot", a_vm_that_cannot_boot),
        ("a guest from its own disk", from_its_own_disk),
        ("a pseudoterminal and a tap that is not named", a_terminal_and_a_tap_that_are_made),
        ("a user without root", user::without_root),
    ];
    steps.into_iter().try_for_each(|(name, step)| step().map_err(|e| format!("{name}: {e}").into()))
}

/// `perennial run` with the guest's files.
pub(super) fn arguments() -> Vec<&'static str> {
    let mut arguments = vec![PERENNIAL, "run", "--kernel", "bzImage", "--initramfs", "initramfs"];
    arguments.extend(["--memory", "size=64M", "--cmdline", CMDLINE]);
    arguments
}

fn booted() -> Result<Session, Problem> {
    let mut session = Session::start(Terminal::open()?, &arguments())?;
    session.wait_for(BOOTED)?;
    Ok(session)
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<(), Problem> {
    match found == wanted {
        true => Ok(()),
        false => Err(format!("{what}: {found:?}, not {wanted:?}").into()),
    }
}

fn typing_and_leaving() -> Result<(), Problem> {
    let mut session = booted()?;
    let cooked = session.terminal.before.clone();
    let raw = session.terminal.settings()?;
    expect("raw", raw.local_modes & (LocalModes::ICANON | LocalModes::ECHO), LocalModes::empty())?;
    expect("output modes", raw.output_modes, cooked.output_modes)?;
    session.type_keys(b"say hello\r")?;
    session.wait_for("\"text\":\"hello\"")?;

    // Stopped, as by a shell, the program gives the terminal back, and takes it again when it goes on.
    kill_process(session.pid()?, Signal::TSTP)?;
    waitid(WaitId::Pid(session.pid()?), WaitIdOptions::STOPPED)?.ok_or("it did not stop")?;
    session.terminal.expect_settings("stopped", &cooked)?;
    kill_process(session.pid()?, Signal::CONT)?;
    session.type_keys(b"\x01h")?;
    session.wait_for("Ctrl-A x leaves; ")?;
    session.terminal.expect_settings("continued", &raw)?;

    // A reset boots again; the console stays. The guest's Ctrl-C ends nothing.
    session.type_keys(b"\x03reboot\r")?;
    session.wait_for(BOOTED)?;
    session.type_keys(b"\r")?;
    session.type_keys(b"say again\r")?;
    session.wait_for("\"text\":\"again\"")?;
    session.type_keys(b"\x01x")?;
    session.expect_end("left", 0)?;
    session.terminal.expect_settings("left", &cooked)
}

fn powering_off() -> Result<(), Problem> {
    let mut session = booted()?;
    session.type_keys(b"poweroff\r")?;
    session.expect_end("powered off", 0)?;
    session.terminal.expect_settings("powered off", &session.terminal.before)
}

/// A signal to every process in the foreground, as when the terminal's window is closed.
fn a_signal() -> Result<(), Problem> {
    let mut session = booted()?;
    kill_process_group(session.pid()?, Signal::HUP)?;
    session.expect_end("SIGHUP", 0)?;
    session.terminal.expect_settings("SIGHUP", &session.terminal.before)
}

/// The end of the input ends nothing, and does not keep the program busy.
fn without_a_terminal() -> Result<(), Problem> {
    let arguments = arguments();
    let mut command = Command::new(arguments[0]);
    command.args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let mut wait_for = |text: &str| -> Result<(), Problem> {
        while !lines.next().ok_or(format!("it ended before {text:?}"))??.contains(text) {}
        Ok(())
    };
    wait_for(BOOTED)?;
    wait_for("\"seq\":2,")?;
    let pid = Pid::from_child(&child);
    let vm = child_of(pid)?;
    let before = [cpu_ticks(pid)?, cpu_ticks(vm)?];
    wait_for("\"seq\":60,")?;
    // To copy what the guest sends takes less than to emulate the serial port that it sends it by.
    let [program, guest] = [cpu_ticks(pid)? - before[0], cpu_ticks(vm)? - before[1]];
    if program > guest {
        return Err(format!("it used {program} ticks of CPU time, the VM's process {guest}").into());
    }
    kill_process(pid, Signal::TERM)?;
    expect("status", child.wait()?.code(), Some(0))
}

/// CPU time of a process in user mode and in the kernel, in ticks (proc(5), `stat`, fields 14 and 15).
fn cpu_ticks(pid: Pid) -> Result<u64, Problem> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// The only child of a process: the process of its VM.
fn child_of(pid: Pid) -> Result<Pid, Problem> {
    let pid = pid.as_raw_nonzero();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Ok(child) = name.parse() else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{name}/stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(1));
        if parent == Some(pid.to_string().as_str()) {
            return Pid::from_raw(child).ok_or("a child with pid 0".into());
        }
    }
    Err("it has no VM's process".into())
}

/// A guest boots what is on its disk, as README's second command line does it, and does so again when it resets.
fn from_its_own_disk() -> Result<(), Problem> {
    if !Path::new(OWN_DISK).exists() {
        // The harness has said why.
        return Ok(());
    }
    fs::create_dir_all("/seed")?;
    fs::write("/seed/user-data", "#cloud-config\n")?;
    let disk = format!("path={OWN_DISK}");
    let mut arguments = vec![PERENNIAL, "run", "--disk", &disk, "--cloud-init", "/seed"];
    arguments.extend(["--cpus", "boot=2", "--memory", "size=128M", "--cmdline", CMDLINE]);
    let mut session = Session::start(Terminal::open()?, &arguments)?;
    session.wait_for(BOOTED)?;
    session.type_keys(b"\rreboot\r")?;
    session.wait_for(BOOTED)?;
    session.type_keys(b"\rpoweroff\r")?;
    session.expect_end("powered off", 0)
}

/// `perennial run` says where the serial port is, and makes the tap for which Cloud Hypervisor's README leaves the name
/// empty.
fn a_terminal_and_a_tap_that_are_made() -> Result<(), Problem> {
    let arguments = arguments();
    let mut command = Command::new(arguments[0]);
    command.args(&arguments[1..]).args(["--serial", "pty", "--net", "tap=,mac=,ip=,mask="]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(child.stderr.take().ok_or("no standard error")?).lines();
    let tap = Path::new("/sys/class/net/vmtap0");
    let mut place = || -> Result<String, Problem> {
        loop {
            let line = said.next().ok_or("it ended before it said where the serial port is")??;
            if let Some((_, place)) = line.split_once("the serial port is at ") {
                return Ok(place.to_owned());
            }
        }
    };
    for keys in ["\rreboot\r", "\rpoweroff\r"] {
        let path = place()?;
        let mut options = File::options();
        options.read(true).write(true).custom_flags(OFlags::NOCTTY.bits().cast_signed());
        let mut port = options.open(&path)?;
        let mut lines = BufReader::new(port.try_clone()?).lines();
        while !lines.next().ok_or(format!("{path} ended before the boot"))??.contains(BOOTED) {}
        if !tap.exists() {
            return Err("there is no tap vmtap0".into());
        }
        port.write_all(keys.as_bytes())?;
    }
    expect("status", child.wait()?.code(), Some(0))?;
    expect("the tap is there", tap.exists(), false)
}

fn a_vm_that_fails() -> Result<(), Problem> {
    let mut session = booted()?;
    kill_process(child_of(session.pid()?)?, Signal::KILL)?;
    session.wait_for("VM `vm` failed")?;
    session.expect_end("failed", 1)?;
    session.terminal.expect_settings("failed", &session.terminal.before)
}

fn a_vm_that_cannot_boot() -> Result<(), Problem> {
    let mut arguments = arguments();
    arguments[3] = "missing";
    let mut session = Session::start(Terminal::open()?, &arguments)?;
    session.wait_for("cannot open kernel missing")?;
    session.expect_end("cannot boot", 1)?;
    session.terminal.expect_settings("cannot boot", &session.terminal.before)
}
