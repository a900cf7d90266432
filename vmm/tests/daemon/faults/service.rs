//! A host with two guests, as its service manager sees it: started, stopped at a step, ended, started again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;

use super::Backend;
use super::manager::{CAPACITY, Manager};
use crate::host::{PERENNIAL, spawn_host};
use crate::kernel::{COUNT, COUNTS_A_BOOT, image};

/// How long a loaded machine may take for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// The VMs. The first one is the most urgent.
pub(super) const VMS: [&str; 2] = ["one", "two"];

/// What a guest's memory says: which boot of it this is, and how far it has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Evidence {
    pub(super) boot: u32,
    pub(super) count: u32,
}

/// A service with its files. Its host is killed when this is dropped.
pub(super) struct Service {
    backend: Backend,
    // Before the directory, which has its socket.
    manager: Option<Manager>,
    directory: tempfile::TempDir,
    host: Running,
    /// The logs of hosts that have ended.
    past: String,
}

/// A host's process and its log so far.
struct Running {
    child: Child,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

impl Log {
    fn follow(self: Arc<Self>, stderr: ChildStderr) {
        thread::spawn(move || {
            let lines = BufReader::new(stderr).lines().map_while(Result::ok);
            lines.for_each(|line| self.add(|(all, _)| all.push(line)));
            self.add(|(_, ended)| *ended = true);
        });
    }

    fn add(&self, change: impl FnOnce(&mut (Vec<String>, bool))) {
        change(&mut self.lines.lock().unwrap());
        self.grown.notify_all();
    }

    fn text(&self) -> String {
        self.lines.lock().unwrap().0.join("\n")
    }
}

impl Service {
    /// Starts a host in `directory`. `update` are lines of `[update]`.
    pub(super) fn start(backend: Backend, directory: tempfile::TempDir, update: &str) -> Self {
        Self::start_with_store(backend, directory, update, CAPACITY)
    }

    /// The same, with a store that takes so many fds.
    pub(super) fn start_with_store(
        backend: Backend,
        directory: tempfile::TempDir,
        update: &str,
        capacity: usize,
    ) -> Self {
        let path = directory.path();
        let (socket, lock) = (path.join("socket"), path.join("lock"));
        let mut text = format!("[host]\nsocket = {socket:?}\nlock = {lock:?}\n");
        // A pool allocates all of it.
        let memory = if backend == Backend::Pool { "32M" } else { "1G" };
        if backend == Backend::Pool {
            let pool = path.join("pool");
            fs::create_dir(&pool).unwrap();
            text += &format!("pool = {pool:?}\n");
        }
        // These guests do not shut down.
        text += &format!("stop-within-s = 1\n[update]\n{update}\n");
        for (name, priority) in VMS.iter().zip([100, 10]) {
            let (kernel, disk) = (path.join(format!("{name}.elf")), disk(path, name));
            fs::write(&kernel, image(COUNTS_A_BOOT)).unwrap();
            fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
            text += &format!(
                "[[vm]]\nname = \"{name}\"\nmemory = \"size={memory}\"\nkernel = {kernel:?}\n\
                 serial = \"off\"\npriority = {priority}\ndisk = [\"path={}\"]\n",
                disk.display()
            );
        }
        fs::write(path.join("config.toml"), text).unwrap();
        let manager = (backend == Backend::Systemd).then(|| Manager::start(path, capacity));
        let host = run(path, manager.as_ref());
        let service = Self { backend, directory, manager, host, past: String::new() };
        service.wait_until_ready(0);
        service
    }

    /// Starts the host again, as a service manager does after its end.
    pub(super) fn start_again(&mut self) {
        self.restart();
        self.wait_until_ready(0);
    }

    /// The same, and does not wait until the host is ready.
    pub(super) fn restart(&mut self) {
        self.wait_for_its_end();
        self.past += &(self.log() + "\n-- ended --\n");
        self.host = run(self.path(), self.manager.as_ref());
    }

    pub(super) fn wait_for_its_end(&mut self) {
        self.host.child.wait().unwrap();
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn pid(&self) -> Pid {
        Pid::from_child(&self.host.child)
    }

    /// Whether the host's process has not ended.
    pub(super) fn lives(&mut self) -> bool {
        self.host.child.try_wait().unwrap().is_none()
    }

    /// The log of the present host.
    fn log(&self) -> String {
        self.host.log.text()
    }

    /// The logs of all hosts, for the text of a failure.
    pub(super) fn logs(&self) -> String {
        self.past.clone() + &self.log()
    }

    /// The number of hosts of this process that have become ready.
    pub(super) fn readies(&self) -> usize {
        self.log().matches("ready: ").count()
    }

    /// Waits until one more than `before` hosts have been ready. Returns false if the process ends before that.
    pub(super) fn becomes_ready(&self, before: usize) -> bool {
        let readies = |lines: &[String]| lines.iter().filter(|l| l.contains("ready: ")).count();
        let lines = self.host.log.lines.lock().unwrap();
        let waits = |(lines, ended): &mut (Vec<String>, bool)| readies(lines) <= before && !*ended;
        let (lines, timeout) =
            self.host.log.grown.wait_timeout_while(lines, PATIENCE, waits).unwrap();
        assert!(!timeout.timed_out(), "the host does not become ready:\n{}", lines.0.join("\n"));
        readies(&lines.0) > before
    }

    fn wait_until_ready(&self, before: usize) {
        assert!(self.becomes_ready(before), "the host ended:\n{}", self.log());
    }

    /// Names the step at which the host stops next.
    pub(super) fn set_breakpoint(&self, step: &str) {
        fs::write(self.path().join("breakpoint"), step).unwrap();
    }

    /// Waits until the host has stopped at the step. Returns the VM whose step it is, if it is one VM's.
    pub(super) fn wait_for_breakpoint(&mut self) -> Option<&'static str> {
        let deadline = Instant::now() + PATIENCE;
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        while waitid(WaitId::Pid(self.pid()), stopped).ok().flatten().is_none() {
            assert!(self.lives(), "the host ended before the step:\n{}", self.log());
            assert!(Instant::now() < deadline, "the step does not come:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
        let vm = fs::read_to_string(self.path().join("breakpoint")).unwrap();
        VMS.into_iter().find(|name| *name == vm)
    }

    /// Starts what leads to another host.
    pub(super) fn leave(&self, more: &[&str]) -> Option<Child> {
        if self.backend == Backend::Systemd {
            self.signal(Signal::TERM);
            return None;
        }
        Some(self.begin(&[&["handover"], more].concat()))
    }

    /// Starts a command of a client.
    pub(super) fn begin(&self, arguments: &[&str]) -> Child {
        let mut command = self.ctl_command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PERENNIAL);
        command.args(["ctl", "--socket"]).arg(self.path().join("socket")).args(arguments);
        command
    }

    pub(super) fn ctl(&self, arguments: &[&str]) -> Output {
        self.ctl_command(arguments).output().unwrap()
    }

    pub(super) fn status(&self) -> Value {
        let output = self.ctl(&["status"]);
        assert!(output.status.success(), "{output:?}\n{}", self.log());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until the host can be asked.
    pub(super) fn wait_until_it_answers(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.ctl(&["status"]).status.success() {
            assert!(Instant::now() < deadline, "the host does not answer:\n{}", self.logs());
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(super) fn vm(&self, name: &str) -> Value {
        let status = self.status();
        let vms = status["vms"].as_array().unwrap();
        vms.iter().find(|vm| vm["name"] == name).unwrap().clone()
    }

    pub(super) fn state(&self, name: &str) -> String {
        self.vm(name)["state"].as_str().unwrap().to_owned()
    }

    /// Waits until a VM runs.
    pub(super) fn runs(&self, name: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.state(name) != "running" {
            assert!(Instant::now() < deadline, "{name} does not run\n{}", self.logs());
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn evidence(&self, name: &str) -> Evidence {
        let output = self.ctl(&["memory", name, COUNT, "8"]);
        assert!(output.status.success(), "{output:?}\n{}", self.log());
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let bytes = u64::from_str_radix(answer["memory"].as_str().unwrap(), 16).unwrap();
        let bytes = bytes.to_be_bytes();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Evidence { count: word(0), boot: word(4) }
    }

    /// Waits until a guest counts on, and returns what its memory says then.
    pub(super) fn counts_on(&self, name: &str) -> Evidence {
        let (before, deadline) = (self.evidence(name), Instant::now() + PATIENCE);
        loop {
            let now = self.evidence(name);
            if now.count != before.count {
                return now;
            }
            assert!(Instant::now() < deadline, "{name} stands at {before:?}\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The processes, of this host or left over from another, that have a VM's disk open.
    pub(super) fn runners(&self, name: &str) -> Vec<i32> {
        let disk = fs::metadata(disk(self.path(), name))
            .or_else(|_| fs::metadata(hidden(self.path(), name)))
            .unwrap();
        let has_disk = |pid: &i32| {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let mut files = fds.filter_map(|fd| fs::metadata(fd.path()).ok());
            files.any(|file| (file.dev(), file.ino()) == (disk.dev(), disk.ino()))
        };
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_vm_process(*pid)).filter(has_disk).collect()
    }

    /// The processes of VMs that are children of the host, the eldest first.
    pub(super) fn vm_processes(&self) -> Vec<Pid> {
        let pid = self.pid().as_raw_pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        children.filter(|pid| is_vm_process(*pid)).filter_map(Pid::from_raw).collect()
    }

    /// The service manager.
    pub(super) fn manager(&self) -> &Manager {
        self.manager.as_ref().unwrap()
    }

    /// Waits until the log has these words.
    pub(super) fn wait_for_words(&self, words: &str) {
        let lines = self.host.log.lines.lock().unwrap();
        let waits = |(lines, ended): &mut (Vec<String>, bool)| {
            !lines.iter().any(|line| line.contains(words)) && !*ended
        };
        let (lines, _) = self.host.log.grown.wait_timeout_while(lines, PATIENCE, waits).unwrap();
        let text = lines.0.join("\n");
        assert!(text.contains(words), "no `{words}` in\n{text}");
    }

    /// Whether the service manager still has the state of a VM, which a later host may restore.
    pub(super) fn is_still_kept(&self, name: &str) -> bool {
        self.manager
            .as_ref()
            .is_some_and(|manager| manager.names().contains(&format!("perennial-vm-{name}/0")))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.host.child.kill();
        let _ = self.host.child.wait();
    }
}

/// The disk of a VM.
pub(super) fn disk(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.img"))
}

/// Where the disk of a VM is while no host can find it.
pub(super) fn hidden(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.hidden"))
}

fn is_vm_process(pid: i32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.starts_with(b"perennial\0vmm\0")
}

fn run(path: &Path, manager: Option<&Manager>) -> Running {
    let passed = manager.map(Manager::pass);
    let mut words: Vec<_> = passed.iter().flat_map(|passed| passed.wrapper.clone()).collect();
    words.extend([PERENNIAL, "host", "--config"].map(str::to_owned));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg(path.join("config.toml"));
    command.env("PERENNIAL_BREAKPOINT", path.join("breakpoint"));
    command.env("PERENNIAL_POOL_WITHOUT_DAX", "1");
    if let Some(passed) = &passed {
        command.envs(passed.environment.iter().cloned());
    }
    let mut child = spawn_host(&mut command);
    let log = Arc::new(Log::default());
    Arc::clone(&log).follow(child.stderr.take().unwrap());
    Running { child, log }
}
