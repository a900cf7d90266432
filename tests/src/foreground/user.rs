//! `perennial run` by a user without any privilege, who may open `/dev/kvm`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::PERENNIAL;
use super::init::{BOOTED, Problem, arguments};
use crate::tap;

const USER: u32 = 1000;
/// The user's directory.
const HOME: &str = "/home";
/// The user's tap, which root has made and switched on.
const TAP: &str = "users";
const TUN: &str = "/dev/net/tun";
/// Most user namespaces that users of this machine may have.
const NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// Boots a VM where users may make namespaces, and where they may not. It has a disk and a seed with relative paths,
/// and the user's tap. The two are different for their network.
pub(super) fn without_root() -> Result<(), Problem> {
    fs::create_dir_all(HOME)?;
    File::create("disk.raw")?.set_len(1 << 20)?;
    fs::create_dir("seed")?;
    fs::write("seed/user-data", "#cloud-config\n")?;
    let tap = tap::open(TAP)?;
    tap::keep_for(&tap, USER)?;
    tap::set_address(TAP, Ipv4Addr::new(192, 168, 78, 1), Ipv4Addr::new(255, 255, 255, 0))?;
    drop(tap);
    for path in [HOME, "disk.raw", "/dev/kvm", TUN] {
        chown(path, Some(USER), Some(USER))?;
    }
    let one = boot(&["a user of its own", "PID namespace"])?;
    let most = fs::read_to_string(NAMESPACES)?;
    fs::write(NAMESPACES, "0")?;
    let other = boot(&["a user of its own", "user namespace"])?;
    fs::write(NAMESPACES, most)?;
    for path in ["/dev/kvm", TUN] {
        chown(path, Some(0), Some(0))?;
    }
    tap::delete(TAP)?;
    match one == other {
        false => Ok(()),
        true => Err(format!("two VMs have the MAC address {one}").into()),
    }
}

/// Boots a VM whose process has all of its confinement but the parts `missing`. Returns its MAC address.
fn boot(missing: &[&str]) -> Result<String, Problem> {
    let socket = format!("{HOME}/api");
    let mut command = Command::new(PERENNIAL);
    command.args(&arguments()[1..]).args(["--api-socket", &socket, "--net", &format!("tap={TAP}")]);
    command.args(["--disk", "path=disk.raw", "--cloud-init", "seed"]);
    command.uid(USER).gid(USER).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let booted = loop {
        let line = lines.next().ok_or("it ended before its guest booted")??;
        if line.contains(BOOTED) {
            break line;
        }
    };
    let mac = booted.split_once("\"mac\":\"").and_then(|(_, rest)| rest.split_once('"'));
    let mac = mac.map(|(mac, _)| mac.to_owned()).filter(|mac| !mac.is_empty());
    let mac = mac.ok_or_else(|| format!("the guest has no network device: {booted}"))?;

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
        Some(0) => Ok(mac),
        other => Err(format!("after SIGTERM the status is {other:?}").into()),
    }
}
