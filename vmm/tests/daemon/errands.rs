//! Commands for a VM whose process hangs: they wait for it, and nobody else does.
//!
//! The host answers the requests of one connection in their order, unless it goes on with one of them and serves all else
//! meanwhile. So that an answer comes before that of an earlier request shows that nobody waited, without a clock.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::guests::{Vm, host, stop_next_vm_process, vm_processes};
use crate::host::Host;
use crate::kernel::{COUNTS, HALTS};

/// The number of a command that waits.
const WAITS: u64 = 1;

/// A client that asks for several things at the same time.
pub(crate) struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    number: u64,
}

impl Client {
    /// A client that has asked for `command`, which waits.
    pub(crate) fn asks(host: &Host, command: &Value) -> Self {
        let mut client = Self::of(host.connect());
        client.says(WAITS, command);
        client
    }

    pub(crate) fn of(stream: UnixStream) -> Self {
        let lines = BufReader::new(stream.try_clone().unwrap());
        Self { stream, lines, number: WAITS }
    }

    pub(crate) fn says(&mut self, id: u64, command: &Value) {
        let mut line = command.clone();
        line["id"] = id.into();
        writeln!(self.stream, "{line}").unwrap();
    }

    pub(crate) fn hears(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).unwrap() > 0, "the host has closed the connection");
        serde_json::from_str(&line).unwrap()
    }

    /// The answer to a command that is asked for and answered while the first one waits.
    fn meanwhile(&mut self, command: &Value) -> Value {
        self.number += 1;
        self.says(self.number, command);
        let answer = self.hears();
        assert_eq!(answer["id"], self.number, "the host waited: {answer}");
        answer
    }

    pub(crate) fn does(&mut self, command: &Value) -> Value {
        let answer = self.meanwhile(command);
        assert!(answer["ok"].is_object(), "{command}: {answer}");
        answer["ok"].clone()
    }

    /// The error of a command that is refused while the first one waits.
    pub(crate) fn is_refused(&mut self, command: &Value) -> String {
        let answer = self.meanwhile(command);
        assert!(answer["error"].is_array(), "{command}: {answer}");
        answer["error"].to_string()
    }

    /// The answer to the command that waits.
    pub(crate) fn is_answered(&mut self) -> Value {
        let answer = self.hears();
        assert_eq!(answer["id"], WAITS, "{answer}");
        answer
    }
}

fn of(command: &str, vm: &str) -> Value {
    json!({"do": command, "vm": vm})
}

/// A VM whose process is to hang, and another one.
fn two() -> Option<Host> {
    let vms: [Vm<'_>; 2] = [("hangs", COUNTS, ""), ("other", COUNTS, "")];
    let host = host("", &vms)?;
    host.counts_on("hangs");
    host.counts_on("other");
    Some(host)
}

/// Asserts that the host and its other VM do not wait for the command that waits, which has the VM `hangs` `done`, and
/// that nothing else is done with the VM.
fn nobody_else_waits(host: &Host, client: &mut Client, done: &str) {
    client.does(&json!({"do": "status"}));
    for command in ["pause", "resume", "dump"] {
        client.does(&of(command, "other"));
    }
    host.counts_on("other");
    let busy = format!("VM `hangs` is being {done} by another command");
    for command in ["pause", "resume", "dump", "boot", "stop"] {
        let error = client.is_refused(&of(command, "hangs"));
        assert!(error.contains(&busy), "{command}: {error}");
    }
    let error = client.is_refused(&json!({"do": "handover"}));
    assert!(error.contains(&busy), "{error}");
}

#[test]
fn a_pause_a_resume_and_a_dump_of_a_process_that_hangs_keep_nobody_else_waiting() {
    let Some(host) = two() else { return };
    let path = host.directory.path().join("state");
    let cases = [
        (of("pause", "hangs"), "paused", "paused"),
        (of("dump", "hangs"), "dumped", "paused"),
        (of("resume", "hangs"), "resumed", "running"),
        (json!({"do": "dump", "vm": "hangs", "path": path}), "dumped", "running"),
        (of("dump", "hangs"), "dumped", "running"),
    ];
    for (command, done, then) in cases {
        host.signal_vm("hangs", Signal::STOP);
        let mut client = Client::asks(&host, &command);
        nobody_else_waits(&host, &mut client, done);
        host.signal_vm("hangs", Signal::CONT);
        let answer = client.is_answered();
        assert!(answer["ok"].is_object(), "{command}: {answer}");
        assert_eq!(host.vm("hangs")["state"], then, "{command}");
        if command["path"].is_null() && done == "dumped" {
            assert!(answer["ok"]["document"].as_str().unwrap().len() > 1000);
        }
    }
    host.counts_on("hangs");
    assert!(std::fs::metadata(path).unwrap().len() > 500);
}

#[test]
fn a_boot_that_hangs_keeps_nobody_else_waiting() {
    let Some(host) = two() else { return };
    assert!(host.ctl(&["stop", "hangs", "--now"]).status.success());
    let stopped = stop_next_vm_process(host.child.id());
    let mut client = Client::asks(&host, &of("boot", "hangs"));
    let stopped = Pid::from_raw(stopped.join().unwrap()).unwrap();
    nobody_else_waits(&host, &mut client, "booted");
    assert_eq!(host.vm("hangs")["state"], "booting");
    kill_process(stopped, Signal::CONT).unwrap();
    let answer = client.is_answered();
    assert!(answer["ok"].is_object(), "{answer}");
    host.counts_on("hangs");

    // One whose process ends fails, and the VM is as before.
    assert!(host.ctl(&["stop", "hangs", "--now"]).status.success());
    let stopped = stop_next_vm_process(host.child.id());
    let mut client = Client::asks(&host, &of("boot", "hangs"));
    kill_process(Pid::from_raw(stopped.join().unwrap()).unwrap(), Signal::KILL).unwrap();
    let answer = client.is_answered();
    assert!(answer["error"].to_string().contains("VM `hangs`"), "{answer}");
    assert_eq!(host.vm("hangs")["state"], "stopped");
}

#[test]
fn a_vm_that_a_command_boots_can_be_left_out_of_a_handover() {
    let Some(mut host) = two() else { return };
    assert!(host.ctl(&["stop", "hangs", "--now"]).status.success());
    let stopped = stop_next_vm_process(host.child.id());
    let mut client = Client::asks(&host, &of("boot", "hangs"));
    stopped.join().unwrap();
    let error = client.is_refused(&json!({"do": "handover"}));
    assert!(error.contains("is being booted") && error.contains("leave the VM out"), "{error}");
    host.hands_over(&["--without", "hangs"]);
    assert_eq!(host.vm("hangs")["state"], "stopped");
    host.counts_on("other");
    assert_eq!(vm_processes(host.child.id()).len(), 1, "the process in which it booted is left");
}

#[test]
fn a_restore_that_hangs_keeps_nobody_else_waiting() {
    let Some(mut host) = two() else { return };
    let count = host.counted("hangs");
    // Its process ends at the arrival.
    let stopped = stop_next_vm_process(host.child.id());
    let kill = |pid: i32| kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let killed = thread::spawn(move || kill(stopped.join().unwrap()));
    host.hands_over(&[]);
    killed.join().unwrap();
    assert_eq!(host.vm("hangs")["state"], "preserved");
    for command in [of("restore", "hangs"), of("recover", "hangs"), json!({"do": "recover"})] {
        let stopped = stop_next_vm_process(host.child.id());
        let mut client = Client::asks(&host, &command);
        let stopped = Pid::from_raw(stopped.join().unwrap()).unwrap();
        nobody_else_waits(&host, &mut client, "restored");
        let error = client.is_refused(&of("restore", "hangs"));
        assert!(error.contains("is being restored by another command"), "{error}");
        assert_eq!(host.vm("hangs")["state"], "restoring");
        // Its process ends: the VM is preserved as before.
        kill_process(stopped, Signal::KILL).unwrap();
        let answer = client.is_answered();
        assert_eq!(answer["outcome"], "preserved", "{answer}");
        assert_eq!(host.vm("hangs")["state"], "preserved");
    }
    // A client that leaves changes nothing.
    let stopped = stop_next_vm_process(host.child.id());
    let client = Client::asks(&host, &of("restore", "hangs"));
    let stopped = Pid::from_raw(stopped.join().unwrap()).unwrap();
    drop(client);
    host.answers();
    kill_process(stopped, Signal::CONT).unwrap();
    host.wait_for("hangs", |vm| vm["state"] == "running");
    host.counts_on("hangs");
    assert!(host.counted("hangs") >= count, "it was started anew");
}

#[test]
fn a_command_ends_with_its_vm_and_goes_on_without_its_client() {
    let Some(host) = two() else { return };
    // Its client leaves.
    host.signal_vm("hangs", Signal::STOP);
    let mut client = Client::asks(&host, &of("pause", "hangs"));
    client.does(&json!({"do": "status"}));
    drop(client);
    host.answers();
    host.signal_vm("hangs", Signal::CONT);
    host.wait_for("hangs", |vm| vm["state"] == "paused");
    assert!(host.ctl(&["resume", "hangs"]).status.success());

    // Its VM's process ends.
    host.signal_vm("hangs", Signal::STOP);
    let mut client = Client::asks(&host, &of("dump", "hangs"));
    client.does(&json!({"do": "status"}));
    host.signal_vm("hangs", Signal::KILL);
    let error = client.is_answered()["error"].to_string();
    assert!(error.contains("`hangs` is failed: it was not dumped"), "{error}");

    // An operator has the last word.
    for (command, done) in [("pause", "paused"), ("boot", "booted")] {
        let stopped = match command {
            "boot" => Some(stop_next_vm_process(host.child.id())),
            _ => {
                assert!(host.ctl(&["boot", "hangs"]).status.success());
                host.signal_vm("hangs", Signal::STOP);
                None
            }
        };
        let mut client = Client::asks(&host, &of(command, "hangs"));
        stopped.map(|stopped| stopped.join().unwrap());
        client.does(&json!({"do": "status"}));
        assert!(host.ctl(&["stop", "hangs", "--now"]).status.success());
        let error = client.is_answered()["error"].to_string();
        assert!(error.contains(&format!("`hangs` is stopped: it was not {done}")), "{error}");
    }
    host.counts_on("other");
}

#[test]
fn a_host_that_ends_gives_up_the_commands_that_wait_and_shuts_the_guests_down() {
    let vms: [Vm<'_>; 1] = [("hangs", HALTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    host.signal_vm("hangs", Signal::STOP);
    let mut client = Client::asks(&host, &of("pause", "hangs"));
    client.does(&json!({"do": "status"}));
    host.signal(Signal::TERM);
    let error = client.is_answered()["error"].to_string();
    assert!(error.contains("`hangs` is stopping: it was not paused"), "{error}");
    // A second signal pulls the plug.
    host.signal(Signal::TERM);
    assert!(host.child.wait().unwrap().success());
}
