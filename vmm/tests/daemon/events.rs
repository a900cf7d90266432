//! `ctl events`: what a client that watches is told, and by which host.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

use crate::host::{Host, PERENNIAL};

/// A running `perennial ctl events`. Killed when dropped.
pub(crate) struct Watcher {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Watcher {
    pub(crate) fn start(host: &Host) -> Self {
        let mut command = Command::new(PERENNIAL);
        command.args(["ctl", "--socket"]).arg(host.socket()).arg("events");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    pub(crate) fn next(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).unwrap() > 0, "it ended");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VM that cannot start, so that this needs no KVM.
const VM: &str = "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/nowhere\"\n";

#[test]
fn a_client_is_told_the_states_and_the_steps_of_handovers_by_one_host_after_the_other() {
    let mut host = Host::start_with(VM);
    let mut watcher = Watcher::start(&host);
    let vm = watcher.next();
    assert_eq!(
        (&vm["event"], &vm["vm"], &vm["state"]),
        (&"vm".into(), &"web".into(), &"failed".into())
    );
    assert!(vm["error"].to_string().contains("/nowhere"), "{vm}");

    // A VM that has ended is left as it is.
    for arguments in [&["stop", "web"][..], &["stop", "web", "--now"]] {
        let answer: Value = serde_json::from_slice(&host.ctl(arguments).stdout).unwrap();
        assert_eq!(answer["ended"], "was-stopped");
        let status = &host.status()["vms"][0];
        assert_eq!((&status["state"], &status["error"]), (&vm["state"], &vm["error"]));
    }

    // One that stops before a step says so.
    assert!(host.ctl(&["handover", "--stop-before", "preserve-ram"]).status.success());
    let step = watcher.next();
    assert_eq!((&step["event"], &step["step"]), (&"step".into(), &"load".into()));
    assert_eq!((&step["transaction"], &step["vm"]), (&"handover".into(), &Value::Null));
    let undone = watcher.next();
    assert_eq!((&undone["event"], &undone["outcome"]), (&"undone".into(), &"running".into()));

    assert!(host.ctl(&["handover"]).status.success());
    let steps: Vec<Value> = (0..7).map(|_| watcher.next()).collect();
    let names: Vec<&str> = steps.iter().map(|s| s["step"].as_str().unwrap()).collect();
    assert_eq!(names, ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"]);
    assert_eq!(watcher.next()["event"], "jumping");
    host.wait_until_ready("boot handover");
    assert_eq!(watcher.next()["vm"], "web", "the next host begins with the states again");

    assert!(host.ctl(&["power-off"]).status.success());
    assert!(watcher.child.wait().unwrap().success());
}

#[test]
fn a_vm_that_fails_and_is_to_boot_again_is_stopped_and_a_client_is_told() {
    let host = Host::start_with(&format!("{VM}restart = \"always\"\n"));
    let mut watcher = Watcher::start(&host);
    let answer: Value = serde_json::from_slice(&host.ctl(&["stop", "web"]).stdout).unwrap();
    assert_eq!(answer["ended"], "pulled");
    while watcher.next()["state"] != "stopped" {}
    let status = &host.status()["vms"][0];
    assert_eq!((&status["state"], &status["error"]), (&"stopped".into(), &Value::Null));
}

#[test]
fn clients_that_watch_do_not_keep_others_out() {
    let host = Host::start_with(VM);
    let mut watchers: Vec<Watcher> = (0..16).map(|_| Watcher::start(&host)).collect();
    for watcher in &mut watchers {
        watcher.next();
    }
    let refused = host.ctl(&["events"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("16 clients watch the events"), "{said}");
    host.answers();
    drop(watchers);
    // Their places are free again once the host has noticed that they have left.
    while !Watcher::start(&host).lines.read_line(&mut String::new()).is_ok_and(|count| count > 0) {}
}
