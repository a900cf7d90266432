//! `perennial run` by a user without any privilege, who may open `/dev/kvm`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::PERENNIAL;
use super::init::{BOOTED, Problem, arguments};

const USER: u32 = 1000;
/// The user's directory.
const HOME: &str = "/home";
/// Most user namespaces that users of this machine may have.
const NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// Boots a VM where users may make namespaces, and where they may not.
pub(super) fn without_root() -> Result<(), Problem> {
    fs::create_dir_all(HOME)?;
    chown(HOME, Some(USER), Some(USER))?;
    chown("/dev/kvm", Some(USER), Some(USER))?;
    boot(&["a user of its own", "PID namespace"])?;
    let most = fs::read_to_string(NAMESPACES)?;
    fs::write(NAMESPACES, "0")?;
    boot(&["a user of its own", "user namespace"])?;
    fs::write(NAMESPACES, most)?;
    chown("/dev/kvm", Some(0), Some(0))?;
    Ok(())
}

/// Boots a VM whose process has all of its confinement but the parts `missing`.
fn boot(missing: &[&str]) -> Result<(), Problem> {
    let socket = format!("{HOME}/api");
    let mut command = Command::new(PERENNIAL);
    command.args(&arguments()[1..]).args(["--api-socket", &socket]);
    command.uid(USER).gid(USER).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    while !lines.next().ok_or("it ended before its guest booted")??.contains(BOOTED) {}

    let output = Command::new(PERENNIAL).args(["ctl", "--socket", &socket, "status"]).output()?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    let vm = &status["vms"][0];
    let parts: Vec<&str> = vm["unconfined"]
        .as_array()
        .ok_or("it is confined in full")?
        .iter()
        .filter_map(|part| part.as_str()?.split(": ").next())
        .collect();
    if parts != missing {
        return Err(format!("the VM should lack {missing:?}: {vm}").into());
    }
    let process = Path::new("/proc").join(vm["pid"].to_string());
    let found = fs::read_to_string(process.join("status"))?;
    for line in [
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "CapPrm:\t0000000000000000",
        "Uid:\t1000\t1000\t1000\t1000",
    ] {
        if !found.lines().any(|found| found == line) {
            return Err(format!("without {missing:?} there is no {line:?} in {found}").into());
        }
    }
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    while lines.next().transpose()?.is_some() {}
    match child.wait()?.code() {
        Some(0) => Ok(()),
        other => Err(format!("after SIGTERM the status is {other:?}").into()),
    }
}
