//! The damage of each fault, done from outside to a host that stands at a step, and its removal.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, kill_process, pidfd_open, prlimit,
};

use super::service::{PATIENCE, Service, disk, hidden};
use super::{Fault, Half};

/// How much more than now a host can map without memory: less than a thread's stack.
const LEFT: u64 = 1 << 20;

/// Waits until a process that was told to has stopped.
pub(crate) fn has_stopped(process: Pid) {
    let status = format!("/proc/{}/status", process.as_raw_pid());
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(&status).unwrap().contains("\nState:\tT") {
        assert!(Instant::now() < deadline, "process {process:?} has not stopped");
        thread::yield_now();
    }
}

/// What was done, to be undone.
pub(super) struct Damage {
    /// `None` if nothing was.
    fault: Option<Fault>,
    vm: &'static str,
    process: Option<Pid>,
}

impl Damage {
    /// Strikes the host, or the VM and its process.
    pub(super) fn strike(
        (fault, half): (Fault, Half),
        service: &Service,
        vm: &'static str,
        process: Option<Pid>,
    ) -> Self {
        let host = service.pid();
        match (fault, process) {
            (Fault::Error, _) => {
                fs::rename(disk(service.path(), vm), hidden(service.path(), vm)).unwrap();
            }
            (Fault::Hang, Some(process)) => kill_process(process, Signal::STOP).unwrap(),
            (Fault::KillVm, Some(process)) => kill(process),
            (Fault::Hang | Fault::KillVm, None) => panic!("the VM has no process"),
            (Fault::KillHost, _) => service.signal(Signal::KILL),
            (Fault::NoSpace, _) => fill(&service.path().join("filler")),
            (Fault::NoMemory, _) => {
                limit(host, Resource::As, [Some(mapped(host) + LEFT), None]);
            }
            (Fault::NoFiles, _) => {
                // Leaving, the host has a reserve: half of the files that it may open. Arriving, it uses all of them.
                let open = files(host);
                let hard = (half == Half::Leaving).then_some(2 * open);
                limit(host, Resource::Nofile, [Some(open), hard]);
            }
        }
        Self { fault: Some(fault), vm, process }
    }

    pub(super) fn none() -> Self {
        Self { fault: None, vm: "", process: None }
    }

    /// Whether the host can be asked while the damage lasts.
    pub(super) fn leaves_the_host_its_means(&self) -> bool {
        !matches!(self.fault, Some(Fault::NoMemory | Fault::NoFiles))
    }

    /// Removes the cause. What has ended stays so.
    pub(super) fn repair(&self, service: &mut Service) {
        let lives = service.lives();
        let Some(fault) = self.fault else { return };
        match fault {
            Fault::Error => {
                fs::rename(hidden(service.path(), self.vm), disk(service.path(), self.vm)).unwrap();
            }
            Fault::Hang => {
                // It may have been killed meanwhile.
                let _ = self.process.map(|process| kill_process(process, Signal::CONT));
            }
            Fault::KillVm | Fault::KillHost => {}
            Fault::NoSpace => fs::remove_file(service.path().join("filler")).unwrap(),
            Fault::NoMemory if lives => limit(service.pid(), Resource::As, [None; 2]),
            Fault::NoFiles if lives => limit(service.pid(), Resource::Nofile, [None; 2]),
            Fault::NoMemory | Fault::NoFiles => {}
        }
    }
}

/// Kills a process, and waits until it has ended: before that, it may still read what the host sends.
pub(super) fn kill(process: Pid) {
    let pidfd = pidfd_open(process, PidfdFlags::empty()).unwrap();
    kill_process(process, Signal::KILL).unwrap();
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut ended, None)).unwrap();
}

/// Fills a file system.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    for piece in [1 << 20, 1 << 12, 1] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
}

/// Sets the limits of a process, the soft one and the hard one. The one that is `None` becomes what the hard one is.
fn limit(process: Pid, resource: Resource, [soft, hard]: [Option<u64>; 2]) {
    let last = |line: &str| line.split_whitespace().rev().nth(1).unwrap().parse().ok();
    let text = fs::read_to_string(format!("/proc/{}/limits", process.as_raw_pid())).unwrap();
    let name = if resource == Resource::As { "Max address space" } else { "Max open files" };
    let now = text.lines().find(|line| line.starts_with(name)).and_then(last);
    let limits = Rlimit { current: soft.or(now), maximum: hard.or(now) };
    prlimit(Some(process), resource, limits).unwrap();
}

/// The bytes that a process has mapped.
fn mapped(process: Pid) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", process.as_raw_pid())).unwrap();
    let size = text.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    size.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// The limit of files that lets a process open none: the lowest number that is free.
fn files(process: Pid) -> u64 {
    let fds = fs::read_dir(format!("/proc/{}/fd", process.as_raw_pid())).unwrap().flatten();
    let numbers = fds.filter_map(|fd| fd.file_name().to_str()?.parse::<u64>().ok());
    let numbers: BTreeSet<_> = numbers.collect();
    (0..).find(|number| !numbers.contains(number)).unwrap()
}
