//! Clients that behave badly, beside an operator whose commands must be carried out.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::Value;

use crate::guests::{self, PATIENCE};
use crate::host::{Host, PERENNIAL};
use crate::kernel::COUNTS;

impl Host {
    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        // A host that does not answer is an error, and no test that never ends.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Most memory that the host ever used, in KiB.
    pub(crate) fn peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

#[test]
fn idle_clients_do_not_lock_an_operator_out() {
    let host = Host::start();
    let idle: Vec<UnixStream> = (0..200).map(|_| host.connect()).collect();
    host.answers();
    drop(idle);
    host.answers();
}

#[test]
fn clients_that_send_without_end_cost_bounded_memory_and_delay_nobody() {
    let host = Host::start();
    let before = host.peak_kib();
    for flood in [&b"\n"[..], b"x", b"{\"do\":\"status\"}\n", b"nonsense\n"] {
        let mut streams: Vec<UnixStream> = (0..8).map(|_| host.connect()).collect();
        let piece = flood.repeat((64 << 10) / flood.len());
        for stream in &mut streams {
            stream.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(500) {
            for stream in &mut streams {
                // It may be cut off, or not be read from.
                let _ = stream.write(&piece);
            }
        }
        host.answers();
    }
    let grown = host.peak_kib() - before;
    assert!(grown < 32 << 10, "it grew by {grown} KiB");
}

#[test]
fn a_host_without_file_descriptors_still_answers_its_operator() {
    let host = Host::start();
    let pid = Pid::from_child(&host.child);
    let open = fs::read_dir(format!("/proc/{}/fd", host.child.id())).unwrap().count() as u64;
    let few = Rlimit { current: Some(open + 3), maximum: Some(open + 3) };
    prlimit(Some(pid), Resource::Nofile, few).unwrap();
    let _idle: Vec<UnixStream> = (0..10).map(|_| host.connect()).collect();
    host.answers();
}

#[test]
fn what_a_client_asked_for_before_it_left_is_not_carried_out() {
    let mut host = Host::start();
    host.signal(Signal::STOP);
    let mut gone = host.connect();
    gone.write_all(b"{\"do\":\"power-off\",\"now\":true}\n").unwrap();
    drop(gone);
    host.signal(Signal::CONT);
    host.answers();
    assert!(host.child.try_wait().unwrap().is_none());

    // One that only said that it will send no more does wait for its answer.
    let mut waiting = host.connect();
    waiting.write_all(b"{\"id\":7,\"do\":\"power-off\",\"now\":true}\n").unwrap();
    waiting.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"id\":7,\"ok\""), "{answer}");
    assert!(host.child.wait().unwrap().success());
}

#[test]
fn clients_that_wait_for_the_end_of_a_vm_lock_nobody_out() {
    let vms = [("one", COUNTS, ""), ("two", COUNTS, "")];
    let Some(host) = guests::host("", &vms) else { return };
    // Its guest does not know of the power button.
    let stop = b"{\"do\":\"stop\",\"vm\":\"one\",\"within_s\":86400}\n";
    let mut greedy = host.connect();
    greedy.write_all(&stop.repeat(65)).unwrap();
    let mut refused = String::new();
    BufReader::new(&greedy).read_line(&mut refused).unwrap();
    assert!(refused.contains("64 requests of this client wait"), "{refused}");
    let mut waiting: Vec<UnixStream> = Vec::new();
    for _ in 0..100 {
        let mut stream = host.connect();
        stream.write_all(stop).unwrap();
        waiting.push(stream);
    }
    host.answers();
    for vm in ["two", "one"] {
        let output = host.ctl(&["stop", vm, "--now"]);
        assert!(output.status.success(), "{output:?}");
    }
    let mut answer = String::new();
    BufReader::new(waiting.last().unwrap()).read_line(&mut answer).unwrap();
    assert!(answer.contains("pulled"), "{answer}");
}

#[test]
fn an_operator_reaches_a_host_whose_socket_was_removed() {
    let mut host = Host::start();
    fs::remove_file(host.socket()).unwrap();
    host.wait_for_line("it is made again");
    host.answers();
}

#[test]
fn a_command_whose_output_nobody_reads_to_its_end_has_not_failed() {
    let host = Host::start();
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/vm-v1.dtb");
    let socket = host.socket().display().to_string();
    let commands: [&[&str]; 4] = [
        &["ctl", "--socket", &socket, "status"],
        &["state", "show", document],
        &["state", "check", document, document],
        &["--version"],
    ];
    for arguments in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(PERENNIAL);
        let output = command.args(arguments).stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

/// Runs `ctl` against a host that this test plays: it answers the request with these lines, in which ID is the request's
/// id, and hangs up.
fn ctl_hears(command: &str, lines: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut ctl = Command::new(PERENNIAL);
    ctl.args(["ctl", "--socket"]).arg(&socket).arg(command);
    let ctl = ctl.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = String::new();
    BufReader::new(&stream).read_line(&mut request).unwrap();
    let id = serde_json::from_str::<Value>(&request).unwrap()["id"].to_string();
    for line in lines {
        writeln!(stream, "{}", line.replace("ID", &id)).unwrap();
    }
    drop(stream);
    ctl.wait_with_output().unwrap()
}

#[test]
fn an_operator_is_told_the_reply_to_his_own_request_and_nothing_that_was_meant_for_others() {
    let of_others = [
        r#"{"event":"ready","status":{}}"#,
        r#"{"id":1,"ok":{"ended":"pulled"}}"#,
        r#"{"id":1,"error":["no"]}"#,
        r#"{"id":0,"ok":{}}"#,
        "the end of a line",
    ];
    let told = |last: &str| ctl_hears("status", &[&of_others[..], &[last]].concat());
    let Output { status, stdout, stderr } = told(r#"{"id":ID,"ok":{"here":true}}"#);
    let stdout: Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!((status.success(), &stdout["here"]), (true, &true.into()));
    assert_eq!(String::from_utf8(stderr).unwrap(), "");
    for (id, why) in [("ID", "refused"), ("0", "too long")] {
        let Output { status, stderr, .. } = told(&format!(r#"{{"id":{id},"error":["{why}"]}}"#));
        let said = String::from_utf8(stderr).unwrap();
        assert!(!status.success() && said.contains(why), "{said}");
    }
    let said = String::from_utf8(told(r#"{"event":"jumping"}"#).stderr).unwrap();
    assert!(said.starts_with("jumping\n") && said.contains("without an answer"), "{said}");
}
