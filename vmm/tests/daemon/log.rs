//! A host whose log nobody reads.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::host::{Host, PERENNIAL};

/// A pipe that has no room for another line.
fn full_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (reader, mut writer) = io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'\n'; 4096]).is_ok() {}
    // The host's end of the pipe waits, as that of any program.
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

/// A process that is killed when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_host_whose_log_nobody_reads_answers_and_ends() {
    let (mut reader, writer) = full_pipe();
    let (mut command, directory) = Host::command(|_| String::new());
    let mut host = Killed(command.stderr(writer).spawn().unwrap());
    drop(command);
    let socket = directory.path().join("socket");
    let deadline = Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "the host waits for somebody to read its log");
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = Command::new(PERENNIAL)
        .args(["ctl", "--socket"])
        .arg(&socket)
        .arg("status")
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    kill_process(Pid::from_child(&host.0), Signal::TERM).unwrap();
    while host.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the host does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut read = String::new();
    reader.read_to_string(&mut read).unwrap();
    assert_eq!(read.trim(), "", "nothing of the log had room");
}
