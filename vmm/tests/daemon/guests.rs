//! Hosts with guests of a few bytes: guests that reset again and again, and processes that hang.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;

use crate::faults::has_stopped;
use crate::host::Host;
use crate::kernel::{COUNT, COUNTS, RESETS, image};

/// How long a loaded machine may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// One VM: its name, its guest's code, and more lines of its section.
pub(crate) type Vm<'a> = (&'a str, &'a [u8], &'a str);

/// Whether there is KVM, with a word about it if there is none.
pub(crate) fn has_kvm() -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    opened.inspect_err(|_| eprintln!("skipped: no /dev/kvm")).is_ok()
}

/// A host with these VMs, or `None`, with a word about it, where there is no KVM.
pub(crate) fn host(update: &str, vms: &[Vm<'_>]) -> Option<Host> {
    has_kvm().then_some(())?;
    Some(Host::start_in(|directory| configuration(directory, update, vms)))
}

/// The configuration of these VMs, whose kernels are written to a directory.
pub(crate) fn configuration(directory: &Path, update: &str, vms: &[Vm<'_>]) -> String {
    let mut text = format!("[update]\n{update}\n");
    for (name, code, lines) in vms {
        let kernel = directory.join(format!("{name}.elf"));
        fs::write(&kernel, image(code)).unwrap();
        text += &format!(
            "[[vm]]\nname = \"{name}\"\nmemory = \"size=32M\"\nkernel = {kernel:?}\n\
             serial = \"off\"\n{lines}\n"
        );
    }
    text
}

impl Host {
    pub(crate) fn vm(&self, name: &str) -> Value {
        let status = self.status();
        let vms = status["vms"].as_array().unwrap();
        vms.iter().find(|vm| vm["name"] == name).unwrap().clone()
    }

    /// Waits until what `status` says of a VM fulfils `holds`, and returns it.
    pub(crate) fn wait_for(&self, name: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let vm = self.vm(name);
            if holds(&vm) {
                return vm;
            }
            assert!(Instant::now() < deadline, "{vm}");
            // The host has no event for the state of a VM.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The number to which a guest has counted.
    pub(crate) fn count(&self, name: &str) -> String {
        let output = self.ctl(&["memory", name, COUNT, "4"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same as a number, which has 32 bits.
    pub(crate) fn counted(&self, name: &str) -> u32 {
        let answer: Value = serde_json::from_str(&self.count(name)).unwrap();
        u32::from_str_radix(answer["memory"].as_str().unwrap(), 16).unwrap().swap_bytes()
    }

    /// Waits until a guest counts on.
    pub(crate) fn counts_on(&self, name: &str) {
        let (before, deadline) = (self.count(name), Instant::now() + PATIENCE);
        while self.count(name) == before {
            assert!(Instant::now() < deadline, "{name} stands at {before}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal_vm(&self, name: &str, signal: Signal) {
        let pid = self.vm(name)["pid"].as_i64().unwrap();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }

    pub(crate) fn hands_over(&mut self, more: &[&str]) {
        let output = self.ctl(&[&["handover"], more].concat());
        assert!(output.status.success(), "{output:?}");
        self.wait_until_ready("boot handover");
    }
}

#[test]
fn a_guest_that_resets_again_and_again_waits_and_is_no_obstacle_to_a_handover() {
    let vms = [("loops", RESETS, "restart = \"on-failure\""), ("counts", COUNTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    host.counts_on("counts");
    for _ in 0..3 {
        let vm = host.wait_for("loops", |vm| vm["restarts"].as_u64().unwrap() >= 2);
        assert_eq!((&vm["restart"], &vm["error"]), (&"on-failure".into(), &Value::Null));
        host.hands_over(&[]);
        host.counts_on("counts");
    }
    let vm = host.wait_for("loops", |vm| vm["next_boot_ms"].as_u64() > Some(200));
    assert_eq!(vm["state"], "restarting");
    // An operator has the last word.
    assert!(host.ctl(&["stop", "loops", "--now"]).status.success());
    let vm = host.vm("loops");
    assert_eq!((&vm["state"], &vm["next_boot_ms"]), (&"stopped".into(), &Value::Null));
    host.hands_over(&[]);
    assert_eq!(host.vm("loops")["state"], "stopped");
}

#[test]
fn a_boot_by_command_that_fails_leaves_the_vm_to_its_policy() {
    let Some(host) = host("", &[("loops", RESETS, "restart = \"on-failure\"")]) else { return };
    let kernel = host.directory.path().join("loops.elf");
    let aside = kernel.with_extension("aside");
    host.wait_for("loops", |vm| vm["next_boot_ms"].as_u64() > Some(1000));
    fs::rename(&kernel, &aside).unwrap();
    let output = host.ctl(&["boot", "loops"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("loops.elf"), "{said}");
    let vm = host.vm("loops");
    assert_eq!(vm["state"], "restarting", "{vm}");
    fs::rename(&aside, &kernel).unwrap();
    let restarts = vm["restarts"].as_u64();
    host.wait_for("loops", |vm| vm["restarts"].as_u64() > restarts);
}

#[test]
fn a_guest_that_only_resets_is_given_up_without_a_policy() {
    let Some(host) = host("", &[("loops", RESETS, "")]) else { return };
    let vm = host.wait_for("loops", |vm| vm["state"] == "failed");
    assert!(vm["error"][0].as_str().unwrap().contains("10 times in a row"), "{vm}");
    assert_eq!(vm["restarts"], 9);
}

#[test]
fn a_vm_that_boots_again_keeps_the_host_from_nothing_and_is_no_obstacle_to_a_handover() {
    let vms = [("loops", RESETS, "restart = \"on-failure\""), ("counts", COUNTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    let exists = |pid| Path::new(&format!("/proc/{pid}")).exists();
    for _ in 0..2 {
        host.counts_on("counts");
        // As a process that searches a disk, which a guest has made for that, or waits for one on a server that is gone.
        let stopped = stop_next_vm_process(host.child.id()).join().unwrap();
        let vm = host.vm("loops");
        assert_eq!((&vm["state"], &vm["pid"]), (&"restarting".into(), &Value::Null), "{vm}");
        host.counts_on("counts");
        assert!(exists(stopped), "the host has waited until it gave up the process");
        host.hands_over(&[]);
        assert!(!exists(stopped), "the next host has to end it");
    }
    // It boots when its process goes on.
    let stopped = stop_next_vm_process(host.child.id()).join().unwrap();
    let before = host.vm("loops")["restarts"].as_u64();
    kill_process(Pid::from_raw(stopped).unwrap(), Signal::CONT).unwrap();
    host.wait_for("loops", |vm| vm["restarts"].as_u64() > before);
    assert!(host.ctl(&["stop", "loops", "--now"]).status.success());
    assert_eq!(host.vm("loops")["state"], "stopped");
    host.counts_on("counts");
}

#[test]
fn a_vm_that_hangs_when_the_host_starts_delays_the_boot_of_no_other() {
    if !has_kvm() {
        return;
    }
    let vms = [("hangs", COUNTS, ""), ("other", COUNTS, "")];
    let (command, directory) = Host::command(|directory| configuration(directory, "", &vms));
    let mut host = Host::run(command, directory);
    let stopped = stop_next_vm_process(host.child.id()).join().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let both = loop {
        let processes = vm_processes(host.child.id());
        if processes.iter().any(|pid| *pid != stopped) {
            break processes;
        }
        assert!(Instant::now() < deadline, "{processes:?}");
        thread::sleep(Duration::from_millis(5));
    };
    assert!(both.contains(&stopped), "the other one waited until that process had ended");
    kill_process(Pid::from_raw(stopped).unwrap(), Signal::CONT).unwrap();
    host.wait_until_ready("hangs running, other running");
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
}

#[test]
fn a_vm_whose_process_ends_boots_again_by_its_policy_only() {
    let vms = [("stays", COUNTS, ""), ("again", COUNTS, "restart = \"always\"")];
    let Some(host) = host("", &vms) else { return };
    for name in ["stays", "again"] {
        host.counts_on(name);
        host.signal_vm(name, Signal::KILL);
    }
    host.wait_for("stays", |vm| vm["state"] == "failed");
    host.wait_for("again", |vm| vm["state"] == "running" && vm["restarts"] == 1);
    host.counts_on("again");
    assert_eq!(host.vm("stays")["state"], "failed");
}

#[test]
fn a_process_that_hangs_delays_a_handover_by_the_budget_and_loses_nothing() {
    let vms = [("one", COUNTS, ""), ("hangs", COUNTS, ""), ("two", COUNTS, "")];
    let Some(mut host) = host("budget = 5", &vms) else { return };
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
    host.signal_vm("hangs", Signal::STOP);
    for _ in 0..2 {
        let output = host.ctl(&["handover"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains("[guests: running]"), "{said}");
        assert!(said.contains("`hangs`") && said.contains("has not answered"), "{said}");
        assert!(said.contains("--without"), "{said}");
        // The others do not wait for it.
        host.counts_on("one");
        host.counts_on("two");
    }
    // Its late answers are no crime: it goes on, and can be handed over.
    host.signal_vm("hangs", Signal::CONT);
    host.counts_on("hangs");
    host.hands_over(&[]);
    vms.iter().for_each(|(name, ..)| host.counts_on(name));

    // Left out, it ends with its host.
    host.signal_vm("hangs", Signal::STOP);
    let refused = host.ctl(&["handover", "--without", "nobody"]);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("there is no VM `nobody`"));
    host.hands_over(&["--without", "hangs"]);
    assert_eq!(host.vm("hangs")["state"], "stopped");
    host.counts_on("one");
    host.counts_on("two");
    assert!(host.ctl(&["boot", "hangs"]).status.success());
    host.counts_on("hangs");
}

/// Stops the first process of a VM that the host starts from now on. Returns its ID.
pub(crate) fn stop_next_vm_process(host: u32) -> JoinHandle<i32> {
    let before = vm_processes(host);
    thread::spawn(move || {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(pid) = vm_processes(host).into_iter().find(|pid| !before.contains(pid)) {
                kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
                return pid;
            }
            assert!(Instant::now() < deadline, "no VM's process was started");
        }
    })
}

/// Stops the process of the most urgent VM when the next host is about to ask it to restore the VM. Returns the process.
fn stop_at_its_restore(host: u32, breakpoint: PathBuf, name: &'static str) -> JoinHandle<i32> {
    fs::write(&breakpoint, "restore").unwrap();
    thread::spawn(move || {
        let pid = Pid::from_raw(host as i32).unwrap();
        let stops = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        loop {
            let status = waitid(WaitId::Pid(pid), stops).unwrap().unwrap();
            assert!(status.stopped(), "the host has ended");
            // The VMs come to it side by side.
            let is_its = fs::read_to_string(&breakpoint).unwrap() == name;
            // That of the most urgent one was started first.
            let process = vm_processes(host)[0];
            if is_its {
                let process = Pid::from_raw(process).unwrap();
                kill_process(process, Signal::STOP).unwrap();
                has_stopped(process);
            } else {
                fs::write(&breakpoint, "restore").unwrap();
            }
            kill_process(pid, Signal::CONT).unwrap();
            if is_its {
                return process;
            }
        }
    })
}

/// The processes of VMs that are children of this process.
pub(crate) fn vm_processes(host: u32) -> Vec<i32> {
    let children = format!("/proc/{host}/task/{host}/children");
    let children = fs::read_to_string(children).unwrap_or_default();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let is_vm = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(b"perennial\0vmm\0")
    };
    children.filter(is_vm).collect()
}

/// The VMs of the report in the order in which a phase of theirs began.
fn in_order_of(report: &Value, phase: &str) -> Vec<String> {
    let start = |vm: &Value| {
        let phases = vm["phases"].as_array().unwrap();
        phases.iter().find(|p| p["name"] == phase).map(|p| p["start_ns"].as_u64().unwrap())
    };
    let vms = report["vms"].as_array().unwrap().iter();
    let mut vms: Vec<_> =
        vms.map(|vm| (start(vm), vm["name"].as_str().unwrap().to_owned())).collect();
    vms.sort();
    vms.into_iter().map(|(_, name)| name).collect()
}

#[test]
fn a_vm_that_hangs_at_its_restore_delays_no_other_and_goes_on_or_is_restored_anew() {
    let vms = [
        ("third", COUNTS, "priority = 10"),
        ("hangs", COUNTS, "priority = 100"),
        ("second", COUNTS, ""),
    ];
    if !has_kvm() {
        return;
    }
    let (mut command, directory) = Host::command(|directory| configuration(directory, "", &vms));
    let breakpoint = directory.path().join("breakpoint");
    command.env("PERENNIAL_BREAKPOINT", &breakpoint);
    let mut host = Host::run(command, directory);
    host.wait_until_ready("boot cold");
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
    host.hands_over(&[]);
    let report = host.ctl(&["report"]).stdout;
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(in_order_of(&report, "spawn"), ["hangs", "second", "third"]);
    assert_eq!(in_order_of(&report, "resume").len(), 3);
    let status = host.status();
    let names: Vec<_> = status["vms"].as_array().unwrap().iter().map(|vm| &vm["name"]).collect();
    assert_eq!(names, ["third", "hangs", "second"], "as in the configuration");

    for then in ["continue", "restore", "handover"] {
        vms.iter().for_each(|(name, ..)| host.counts_on(name));
        let count = host.counted("hangs");
        let stopped = stop_at_its_restore(host.child.id(), breakpoint.clone(), "hangs");
        host.hands_over(&[]);
        let pid = stopped.join().unwrap();
        let vm = host.vm("hangs");
        assert_eq!(vm["state"], "preserved", "{vm}");
        assert!(vm["error"].to_string().contains("and still does"), "{vm}");
        host.counts_on("second");
        host.counts_on("third");
        match then {
            "continue" => kill_process(Pid::from_raw(pid).unwrap(), Signal::CONT).unwrap(),
            "restore" => assert!(host.ctl(&["restore", "hangs"]).status.success()),
            _ => host.hands_over(&[]),
        }
        let vm = host.wait_for("hangs", |vm| vm["state"] == "running");
        assert_eq!(vm["pid"] == pid, then == "continue", "{vm}");
        host.counts_on("hangs");
        assert!(host.counted("hangs") >= count, "it was started anew");
        let report: Value = serde_json::from_slice(&host.ctl(&["report"]).stdout).unwrap();
        let vms = report["vms"].as_array().unwrap();
        assert!(vms.iter().all(|vm| vm["outcome"] == "running"), "{report}");
    }
}

#[test]
#[ignore = "waits for the minute that a process has to answer"]
fn pausing_a_process_that_hangs_is_an_error_and_its_guest_goes_on_later() {
    let Some(host) = host("", &[("hangs", COUNTS, "")]) else { return };
    host.counts_on("hangs");
    host.signal_vm("hangs", Signal::STOP);
    let output = host.ctl(&["pause", "hangs"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("did not answer in time"), "{said}");
    host.signal_vm("hangs", Signal::CONT);
    host.counts_on("hangs");
    assert_eq!(host.vm("hangs")["state"], "running");
    assert!(host.ctl(&["pause", "hangs"]).status.success());
    let count = host.count("hangs");
    assert_eq!(host.count("hangs"), count, "it is paused");
}

#[test]
fn the_preflight_takes_documents_to_be_larger_than_they_are_but_not_by_far() {
    let vms = [("small", COUNTS, "cpus = 1"), ("large", COUNTS, "cpus = 16")];
    let Some(host) = host("", &vms) else { return };
    for (name, vcpus) in [("small", 1), ("large", 16)] {
        host.counts_on(name);
        let path = host.directory.path().join(name);
        let dumped = host.ctl(&["dump", name, &path.display().to_string()]);
        assert!(dumped.status.success(), "{dumped:?}");
        let (found, taken) = (
            fs::metadata(path).unwrap().len(),
            vmm::live_update::preflight::bytes_of_documents(vcpus),
        );
        eprintln!("{vcpus} vCPUs: a document of {found} bytes, taken to be {taken}");
        // The rest of the room is for the manifest, the index and larger processors.
        assert!(2 * found <= taken && taken <= 20 * found, "{vcpus} vCPUs: {found}, {taken}");
    }
}
