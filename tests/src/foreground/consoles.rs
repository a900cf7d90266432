//! Consoles and logs of a host's VMs, over a handover and a live update: a person attaches, leaves and attaches
//! again; a log is rotated and renamed.
//!
//! PID 1 starts the host as a daemon, in both kernels. The second kernel has [`AGAIN`] on its command line. With the kernel's
//! LUO, another host has been killed there before, so that this one finds the VMs without a manifest.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use luo::Orchestrator;
use luo::kernel::Device;
use rustix::process::{Pid, Signal, kill_process};

use super::init::{BOOTED, CMDLINE, Problem};

use super::session::{Session, Terminal};
use super::{AGAIN, DATA, GUEST, NEXT_CMDLINE, PERENNIAL, intruder, logs, pool_mount};

const CONFIG: &str = "/config.toml";
const API: &str = "/run/perennial.sock";
/// The VMs with a console, and their serial ports.
const VMS: [(&str, &str); 2] = [("web", "socket=/run/consoles/web"), ("db", "pty")];

pub(super) fn before_the_update() -> Result<(), Problem> {
    logs::leave_nearly_full()?;
    let mut host = start_host()?;
    for (vm, _) in VMS {
        // What the guest has said before anybody was attached is shown.
        let mut session = attach(vm)?;
        session.wait_for(BOOTED)?;
        say(&mut session, "first")?;
        leave(session, "the first time")?;
        let mut session = attach(vm)?;
        say(&mut session, "second")?;
        leave(session, "the second time")?;
    }
    let mut replaced = attach("web")?;
    say(&mut replaced, "third")?;
    let mut stays = attach("web")?;
    replaced.wait_for("another client has taken")?;
    replaced.expect_end("replaced", 1)?;
    say(&mut stays, "fourth")?;

    logs::expect_rotation()?;
    logs::expect_to_follow_rename("before")?;

    // A console that is attached during a handover is attached again by itself.
    let status = ctl(&["handover"])?;
    say(&mut stays, "fifth").map_err(|problem| format!("{problem}; the status: {status}"))?;
    leave(stays, "after the handover")?;
    logs::expect_to_follow_rename("after the handover")?;

    let refused = ctl(&["update"]);
    let ended = host.try_wait()?;
    Err(format!("the live update did not take place: {refused:?}; the host: {ended:?}").into())
}

pub(super) fn after_the_update() -> Result<(), Problem> {
    let boot = match pool_mount::is_in_use()? {
        true => "live-update",
        false => {
            end_with_manifest()?;
            "lost"
        }
    };
    let mut host = start_host()?;
    let status = status_when_all_run()?;
    if !status.contains(&format!("\"boot\": \"{boot}\""))
        || !status.contains("\"/run/consoles/web\"")
    {
        return Err(format!("the status is {status}").into());
    }
    logs::expect_no_boot()?;
    for (vm, _) in VMS {
        let mut session = attach(vm)?;
        say(&mut session, "sixth")?;
        leave(session, "after the live update")?;
    }
    logs::expect_to_follow_rename("after the live update")?;

    intruder::try_all(ctl)?;

    // The power button of a VM works after both, and SIGTERM presses it.
    ctl(&["handover"])?;
    kill_process(Pid::from_child(&host), Signal::TERM)?;
    let ended = host.wait()?;
    let log = logs::text()?;
    match ended.success() && log.contains("it was pressed") {
        true => Ok(()),
        false => Err(format!("after SIGTERM: the host: {ended}; the log of its VM: {log}").into()),
    }
}

/// Waits until all VMs run, those that are found without a manifest too. Returns the status then.
fn status_when_all_run() -> Result<String, Problem> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let status = ctl(&["status"])?;
        if status.matches("\"state\": \"running\"").count() == VMS.len() + 1 {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err(format!("not all VMs run: {status}").into());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Leaves the kernel's LUO as a host does that is killed when it has retrieved the manifest, and nothing else: the session
/// ends with its process.
fn end_with_manifest() -> Result<(), Problem> {
    drop(Device::default().retrieve_session(&"perennial-host".parse()?)?);
    Ok(())
}

fn start_host() -> Result<Child, Problem> {
    let mut config = format!(
        "[update]\nkernel = \"{DATA}/bzImage\"\n\
         initramfs = \"{DATA}/initramfs\"\ncmdline = \"{NEXT_CMDLINE} {} {AGAIN}\"\n",
        pool_mount::parameter()?
    );
    for (name, serial) in VMS.into_iter().chain([("logged", logs::SERIAL)]) {
        config += &format!(
            "[[vm]]\nname = \"{name}\"\nmemory = \"size=64M\"\nkernel = \"{GUEST}/bzImage\"\n\
             initramfs = \"{GUEST}/initramfs\"\ncmdline = \"{CMDLINE} perennial.button=obey\"\nserial = \"{serial}\"\n"
        );
    }
    start(&config)
}

/// Starts a host with the sections `update` and `vm` of a configuration, and waits until it answers.
pub(super) fn start(config: &str) -> Result<Child, Problem> {
    let pool = pool_mount::line()?;
    fs::write(CONFIG, format!("[host]\nsocket = \"{API}\"\n{pool}{config}"))?;
    let mut host = Command::new(PERENNIAL).args(["host", "--config", CONFIG]).spawn()?;
    while UnixStream::connect(API).is_err() {
        if let Some(status) = host.try_wait()? {
            return Err(format!("the host ended: {status}").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(host)
}

/// Attaches a terminal to the console of a VM.
pub(super) fn attach(vm: &str) -> Result<Session, Problem> {
    Session::start(Terminal::open()?, &[PERENNIAL, "console", vm])
}

/// Has the guest repeat a word. What is typed while the console is attached again may be lost, as on a line
/// that is plugged in again.
pub(super) fn say(session: &mut Session, word: &str) -> Result<(), Problem> {
    const ATTEMPTS: u32 = 10;
    let mut missed = Ok(());
    for _ in 0..ATTEMPTS {
        session.expect_running()?;
        session.type_keys(format!("\rsay {word}\r").as_bytes())?;
        missed = session.wait_within(&format!("\"text\":\"{word}\""), Duration::from_secs(20));
        if missed.is_ok() {
            break;
        }
    }
    missed
}

/// Types the keys that leave a console.
pub(super) fn leave(mut session: Session, when: &str) -> Result<(), Problem> {
    session.type_keys(b"\x01x")?;
    session.expect_end(when, 0)?;
    session.terminal.expect_settings(when, &session.terminal.before)
}

/// Runs `perennial ctl` and returns its output.
pub(super) fn ctl(arguments: &[&str]) -> Result<String, Problem> {
    let output = Command::new(PERENNIAL).arg("ctl").args(arguments).output()?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(String::from_utf8_lossy(&output.stderr).into()),
    }
}
