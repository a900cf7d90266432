//! One host a machine, and a host that goes on without what it can do without.

use std::fs;
use std::process::Command;

use rustix::process::geteuid;

use crate::guests;
use crate::host::{Host, PERENNIAL};
use crate::kernel::COUNTS;

impl Host {
    /// Starts a second host with the configuration `text`, which must refuse to run. Returns what it says.
    fn second(&self, text: &str) -> String {
        let config = self.directory.path().join("second.toml");
        fs::write(&config, text).unwrap();
        let output =
            Command::new(PERENNIAL).args(["host", "--config"]).arg(config).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn a_second_host_ends_before_it_opens_anything() {
    let mut host = Host::start();
    let lock = host.directory.path().join("lock");
    let socket = host.directory.path().join("another-socket");
    let text = format!("[host]\nlock = {lock:?}\nsocket = {socket:?}\n");
    let own = format!("(process {})", host.child.id());
    for _ in 0..2 {
        let said = host.second(&text);
        assert!(said.contains("another host runs") && said.contains(&own), "{said}");
        assert!(!socket.exists());
        assert!(host.ctl(&["handover"]).status.success());
        host.wait_until_ready("boot handover");
    }
    let said = host.second(&text);
    assert!(said.contains(&own), "the lock goes along with a handover: {said}");

    // A host that was killed is in nobody's way.
    host.child.kill().unwrap();
    host.child.wait().unwrap();
    let said = host.second(&format!("[host]\nlock = {lock:?}\nsocket = {:?}\n", lock.join("no")));
    assert!(said.contains("cannot offer the API"), "{said}");
}

#[test]
fn a_lock_that_cannot_be_made_ends_a_cold_host_and_a_host_with_a_new_lock_keeps_the_old_one() {
    let mut host = Host::start();
    let [old, new] = ["lock", "new-lock"].map(|name| host.directory.path().join(name));
    let socket = host.directory.path().join("another-socket");
    let with_lock =
        |lock: &std::path::Path| format!("[host]\nlock = {lock:?}\nsocket = {socket:?}\n");
    // A file has no directory in it.
    let nowhere = old.join("no");
    let said = host.second(&with_lock(&nowhere));
    assert!(said.contains("cannot lock") && said.contains(nowhere.to_str().unwrap()), "{said}");
    assert!(!socket.exists());
    let config = fs::read_to_string(host.config()).unwrap();
    let changed = config.replace(old.to_str().unwrap(), new.to_str().unwrap());
    assert_ne!(config, changed);
    fs::write(host.config(), changed).unwrap();
    assert!(host.ctl(&["handover"]).status.success());
    host.wait_until_ready("boot handover");
    for lock in [&old, &new] {
        let said = host.second(&with_lock(lock));
        assert!(said.contains("another host runs"), "{}: {said}", lock.display());
    }
}

#[test]
fn a_socket_that_cannot_be_there_ends_a_cold_host_and_not_one_that_took_over() {
    let mut host = Host::start();
    let socket = host.socket();
    let config = fs::read_to_string(host.config()).unwrap();
    let blocked = config.replace("/socket\"", "/lock/socket\"");
    assert_ne!(config, blocked);
    fs::write(host.config(), blocked).unwrap();
    assert!(host.ctl(&["handover"]).status.success());
    host.wait_until_ready("boot handover");
    assert!(socket.exists(), "it listens where the last host did");
    let status = String::from_utf8(host.ctl(&["status"]).stdout).unwrap();
    assert!(status.contains("cannot offer the API on"), "{status}");
}

#[test]
fn the_vms_of_two_hosts_of_a_machine_run_as_different_users() {
    if !geteuid().is_root() {
        return eprintln!("skipped: only root gives VMs users of their own");
    }
    let host = || guests::host("", &[("web", COUNTS, "")]);
    let (Some(one), Some(other)) = (host(), host()) else { return };
    let users = [&one, &other].map(|host| {
        let vm = host.wait_for("web", |vm| vm["state"] == "running");
        let status = fs::read_to_string(format!("/proc/{}/status", vm["pid"])).unwrap();
        status.lines().find(|line| line.starts_with("Uid:")).unwrap().to_owned()
    });
    assert_ne!(users[0], users[1]);
}
