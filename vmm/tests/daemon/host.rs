//! A host without VMs that is not PID 1, as a process of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use crate::guests::vm_processes;

pub(crate) const PERENNIAL: &str = env!("CARGO_BIN_EXE_perennial");

/// How long the host of a test lives at most, on a loaded machine too.
const LIFETIME: Timespec = Timespec { tv_sec: 600, tv_nsec: 0 };

/// Starts a command that becomes a host. If it does not end within [`LIFETIME`], it is killed, so that whoever waits for its
/// end, its log or its answer fails instead of waiting for ever.
pub(crate) fn spawn_host(command: &mut Command) -> Child {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    thread::spawn(move || {
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut ended, Some(&LIFETIME))) == Ok(0) {
            eprintln!("the host of a test still runs after {} s: it is killed", LIFETIME.tv_sec);
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    });
    child
}

/// A running host. Killed when dropped.
pub(crate) struct Host {
    pub(crate) child: Child,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) log: BufReader<std::process::ChildStderr>,
}

impl Host {
    pub(crate) fn start() -> Self {
        Self::start_with("")
    }

    /// Starts a host whose configuration has this text behind `[host]`.
    pub(crate) fn start_with(vms: &str) -> Self {
        Self::start_in(|_| vms.to_owned())
    }

    /// Starts a host with what `vms` writes behind `[host]`, given the host's directory.
    pub(crate) fn start_in(vms: impl FnOnce(&Path) -> String) -> Self {
        let (command, directory) = Self::command(vms);
        let mut host = Self::run(command, directory);
        host.wait_until_ready("boot cold");
        host
    }

    /// The command of a host with what `vms` writes behind `[host]`, and the directory of its files.
    pub(crate) fn command(vms: impl FnOnce(&Path) -> String) -> (Command, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.toml");
        let socket = directory.path().join("socket");
        let lock = directory.path().join("lock");
        let vms = vms(directory.path());
        fs::write(&config, format!("[host]\nsocket = {socket:?}\nlock = {lock:?}\n{vms}")).unwrap();
        let mut command = Command::new(PERENNIAL);
        command.args(["host", "--config"]).arg(&config);
        (command, directory)
    }

    /// Starts a command that becomes a host.
    pub(crate) fn run(mut command: Command, directory: tempfile::TempDir) -> Self {
        let mut child = spawn_host(&mut command);
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, directory, log }
    }

    /// Ends the host, and starts another one with the same configuration and directory.
    pub(crate) fn start_again(mut self) -> Self {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        let mut command = Command::new(PERENNIAL);
        command.args(["host", "--config"]).arg(directory.path().join("config.toml"));
        Self::run(command, directory)
    }

    /// Reads the log up to the line with `ready:`, which must contain `how`.
    pub(crate) fn wait_until_ready(&mut self, how: &str) {
        let line = self.wait_for_line("ready:");
        assert!(line.contains(how), "{line}");
    }

    /// Reads the log up to the line with `ready:`, and returns the line. `None` if the host ends before that.
    pub(crate) fn becomes_ready(&mut self) -> Option<String> {
        let mut line = String::new();
        while !line.contains("ready:") {
            line.clear();
            if self.log.read_line(&mut line).unwrap() == 0 {
                return None;
            }
        }
        Some(line)
    }

    /// Reads the log up to a line with this text, and returns the line.
    pub(crate) fn wait_for_line(&mut self, text: &str) -> String {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "the host ended");
        }
        line
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(PERENNIAL)
            .args(["ctl", "--socket"])
            .arg(self.socket())
            .args(arguments)
            .output()
            .unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The answer to `status`.
    pub(crate) fn status(&self) -> serde_json::Value {
        let output = self.ctl(&["status"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn answers(&self) {
        let output = self.ctl(&["status"]);
        assert!(output.status.success(), "{output:?}");
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // One that a test has stopped before it asked the kernel to end it with its host would stay for ever.
        for vm in vm_processes(self.child.id()).into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(vm, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
