//! Every fault at every step: what becomes of the guests.
//!
//! A cell is one host with two guests. The host stops itself at a step of leaving or of arriving (a debug build has a
//! breakpoint there), the test does real damage from outside, and the host goes on. Then the cause is removed, a host
//! that ended is started again as a service manager does, and what is preserved is restored. The guests' memory tells
//! what became of them: each boot writes its own number, and counts. The processes that have a VM's disk open tell
//! that it runs once.
//!
//! The results are the tables of `docs/faults.md`.

mod cell;
mod damage;
mod manager;
mod pending;
mod service;
mod store;
mod stuck;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::thread;

use cell::Cell;
pub(crate) use damage::has_stopped;
use rustix::process::{Pid, Signal, kill_process};
use service::{Service, VMS};

/// How many cells run at the same time.
const AT_ONCE: usize = 4;

/// Which cells are run: `all`, or those whose description has these words. Without it, those of every run.
const WANTED: &str = "PERENNIAL_FAULTS";

/// What carries the VMs to the next host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Backend {
    Keeper,
    Pool,
    Systemd,
}

/// The half of a handover to which a step belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Half {
    Leaving,
    Arriving,
}

/// What happens while the host stands at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// The step fails: leaving, it is refused (`--stop-before`); arriving, the VM's disk cannot be found from now on.
    Error,
    /// The VM's process stops for good (SIGSTOP).
    Hang,
    /// The VM's process is killed.
    KillVm,
    /// The host is killed.
    KillHost,
    /// The file system with the host's files is full.
    NoSpace,
    /// The host, and each process that it starts, can map no more than the host has now and 1 MiB (RLIMIT_AS).
    NoMemory,
    /// The host, and each process that it starts, can have no more files than now (RLIMIT_NOFILE).
    NoFiles,
}

const BACKENDS: [Backend; 3] = [Backend::Keeper, Backend::Pool, Backend::Systemd];
const LEAVING: [&str; 7] =
    ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"];
const ARRIVING: [&str; 8] =
    ["look", "retrieve", "open", "restore", "take", "resume", "finish", "report"];
const FAULTS: [Fault; 7] = [
    Fault::Error,
    Fault::Hang,
    Fault::KillVm,
    Fault::KillHost,
    Fault::NoSpace,
    Fault::NoMemory,
    Fault::NoFiles,
];

fn cells(backend: Backend) -> Vec<Cell> {
    let leaving = LEAVING.iter().map(|step| (Half::Leaving, *step));
    let steps = leaving.chain(ARRIVING.iter().map(|step| (Half::Arriving, *step)));
    let faults =
        |(half, step)| FAULTS.into_iter().map(move |fault| Cell { backend, half, step, fault });
    steps.flat_map(faults).filter(Cell::exists).collect()
}

/// Runs the cells side by side, those that take long first.
fn run(mut cells: Vec<Cell>) -> BTreeMap<Cell, Result<String, String>> {
    cells.sort_by_key(Cell::is_quick);
    let (queue, results) = (Mutex::new(cells.into_iter()), Mutex::new(BTreeMap::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(cell) = queue.lock().unwrap().next() else { return };
                    let result = cell.run_caught();
                    if let Err(why) = &result {
                        eprintln!("{cell:?}: {why}");
                    }
                    results.lock().unwrap().insert(cell, result);
                }
            });
        }
    });
    results.into_inner().unwrap()
}

/// Whether guests can run. If not, says so.
fn has_kvm() -> bool {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() {
        eprintln!("skipped: no /dev/kvm");
    }
    kvm.is_ok()
}

#[test]
fn a_defect_of_the_host_at_a_step_of_leaving_ends_no_vm() {
    if !has_kvm() {
        return;
    }
    let service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    let first = VMS.map(|name| service.counts_on(name).boot);
    for step in LEAVING {
        let before = VMS.map(|name| service.counts_on(name));
        service.set_breakpoint(&format!("panic {step}"));
        let refused = service.ctl(&["handover"]);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && said.contains("has a defect"), "{step}: {said}");
        assert!(said.contains(&format!("in the step `{step}`")), "{said}");
        for (name, before) in VMS.into_iter().zip(before) {
            let now = service.counts_on(name);
            assert!(now.boot == before.boot && now.count >= before.count, "{name}: {now:?}");
        }
    }
    let readies = service.readies();
    assert!(service.ctl(&["handover"]).status.success());
    assert!(service.becomes_ready(readies));
    assert_eq!(VMS.map(|name| service.counts_on(name).boot), first);
}

#[test]
fn a_defect_of_the_host_costs_no_vm_whose_process_ended_after_its_state_was_saved() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    let before = VMS.map(|name| service.counts_on(name));
    let process = Pid::from_raw(service.vm(VMS[0])["pid"].as_i64().unwrap() as i32).unwrap();
    service.set_breakpoint("preserve-state");
    let mut client = service.leave(&[]).unwrap();
    service.wait_for_breakpoint();
    damage::kill(process);
    service.set_breakpoint("panic sync");
    service.signal(Signal::CONT);
    assert!(!client.wait().unwrap().success());
    service.runs(VMS[0]);
    for (name, before) in VMS.into_iter().zip(before) {
        let now = service.counts_on(name);
        assert!(now.boot == before.boot && now.count >= before.count, "{name}: {now:?}");
    }
}

#[test]
fn a_store_that_takes_too_few_files_for_an_update_is_told_before_it() {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: no /dev/kvm");
        return;
    }
    let looked = |capacity| {
        let directory = tempfile::tempdir().unwrap();
        let service = Service::start_with_store(Backend::Systemd, directory, "", capacity);
        let nowhere = ["preflight", "--kernel", "/nowhere", "--initramfs", "/nowhere"];
        String::from_utf8(service.ctl(&nowhere).stdout).unwrap()
    };
    assert!(!looked(manager::CAPACITY).contains("fd-store"));
    // At least a piece of RAM and a document for each of the two VMs, and three files of the host.
    let said = looked(6);
    assert!(said.contains("refusal `fd-store`: the update puts "), "{said}");
    assert!(
        said.contains("which takes 6 more") && said.contains("FileDescriptorStoreMax="),
        "{said}"
    );
}

#[test]
fn an_update_is_refused_while_another_host_has_vms() {
    if !has_kvm() {
        return;
    }
    let start = |backend| Service::start(backend, tempfile::tempdir().unwrap(), "");
    // A host that can do live updates, and any other one.
    let (host, other) = (start(Backend::Systemd), start(Backend::Keeper));
    let named = format!("refusal `other-host`: process {} is", other.pid().as_raw_pid());
    let said = || {
        let nowhere = ["preflight", "--kernel", "/nowhere", "--initramfs", "/nowhere"];
        String::from_utf8(host.ctl(&nowhere).stdout).unwrap()
    };
    assert!(said().contains(&named), "{}", said());
    assert!(!said().contains(&format!("process {} is", host.pid().as_raw_pid())), "{}", said());
    drop(other);
    assert!(!said().contains(&named), "{}", said());
}

#[test]
fn a_vm_whose_process_ends_after_its_state_was_saved_survives_a_handover_that_is_undone() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    let before = service::VMS.map(|name| service.counts_on(name));
    let process = service.vm(service::VMS[0])["pid"].as_i64().unwrap();
    service.set_breakpoint("preserve-state");
    let client = service.leave(&["--stop-before", "jump"]).unwrap();
    service.wait_for_breakpoint();
    damage::kill(Pid::from_raw(process as i32).unwrap());
    service.signal(Signal::CONT);
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", service.logs());
    for (name, before) in service::VMS.into_iter().zip(before) {
        let now = service.counts_on(name);
        assert_eq!(now.boot, before.boot, "{name}: it was booted again\n{}", service.logs());
        assert!(now.count > before.count, "{name} went back");
        assert_eq!(service.runners(name).len(), 1);
    }
    assert!(service.logs().contains("VM `one` was restored"), "{}", service.logs());
}

#[test]
fn a_vm_whose_process_ends_before_it_reads_that_it_is_to_resume_survives_as_well() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    let before = service::VMS.map(|name| service.counts_on(name));
    let process = Pid::from_raw(service.vm(service::VMS[0])["pid"].as_i64().unwrap() as i32);
    service.set_breakpoint("preserve-state");
    let client = service.leave(&["--stop-before", "jump"]).unwrap();
    service.wait_for_breakpoint();
    kill_process(process.unwrap(), Signal::STOP).unwrap();
    // A process that waits for a message takes one that comes before it has stopped.
    damage::has_stopped(process.unwrap());
    service.signal(Signal::CONT);
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", service.logs());
    // An operator looks, and ends a process that hangs.
    assert_eq!(service.state(service::VMS[0]), "running");
    damage::kill(process.unwrap());
    for (name, before) in service::VMS.into_iter().zip(before) {
        service.runs(name);
        let now = service.counts_on(name);
        assert_eq!(now.boot, before.boot, "{name}: it was booted again\n{}", service.logs());
        assert!(now.count > before.count, "{name} went back");
        assert_eq!(service.runners(name).len(), 1);
    }
    assert!(service.logs().contains("VM `one` is restored"), "{}", service.logs());
}

#[test]
fn a_handover_that_takes_longer_than_its_budget_is_undone() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "budget = 1");
    let before = VMS.map(|name| service.counts_on(name));
    service.set_breakpoint("jump");
    let client = service.leave(&[]).unwrap();
    service.wait_for_breakpoint();
    // It is time itself that must pass.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    service.signal(Signal::CONT);
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("has taken longer than 1s"), "{said}");
    for (name, before) in VMS.into_iter().zip(before) {
        let now = service.counts_on(name);
        assert!(now.boot == before.boot && now.count > before.count, "{name}: {now:?}");
    }
}

#[test]
fn a_signal_that_ends_the_host_is_not_forgotten_by_a_handover_that_goes_on() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    service.set_breakpoint("jump");
    let client = service.leave(&[]).unwrap();
    service.wait_for_breakpoint();
    service.signal(Signal::TERM);
    service.signal(Signal::CONT);
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("was told to end meanwhile"), "{said}\n{}", service.logs());
    service.wait_for_its_end();
    assert!(service.logs().contains("got SIGTERM"), "{}", service.logs());
}

/// Whether a process has a signal blocked that ends a host.
fn blocks_an_ending_signal(process: Pid) -> bool {
    let status = format!("/proc/{}/status", process.as_raw_pid());
    let status = fs::read_to_string(status).unwrap();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
    let blocked = u64::from_str_radix(blocked, 16).unwrap();
    [Signal::TERM, Signal::INT].iter().any(|signal| blocked & (1 << (signal.as_raw() - 1)) != 0)
}

#[test]
fn a_signal_that_comes_right_before_the_next_program_ends_the_next_host() {
    if !has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Keeper, tempfile::tempdir().unwrap(), "");
    let leave = |service: &Service| {
        let mut client = service.leave(&[]).unwrap();
        thread::spawn(move || client.wait());
    };
    leave(&service);
    assert!(service.becomes_ready(1), "{}", service.logs());
    service.runs(service::VMS[0]);
    for process in service.vm_processes().into_iter().chain([service.pid()]) {
        assert!(!blocks_an_ending_signal(process), "{process:?}");
    }
    service.set_breakpoint("exec");
    leave(&service);
    service.wait_for_breakpoint();
    service.signal(Signal::TERM);
    service.signal(Signal::CONT);
    service.wait_for_words("got SIGTERM");
    service.wait_for_its_end();
    assert_eq!(service.readies(), 3, "the next host takes the signal\n{}", service.logs());
}

#[test]
fn no_fault_at_any_step_loses_a_guest_that_memory_could_have_saved() {
    if !has_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root, who mounts file systems and sets limits of other processes");
        return;
    }
    let all = BACKENDS.into_iter().flat_map(cells);
    let wanted = std::env::var(WANTED).ok();
    let are_all = wanted.as_deref() == Some("all");
    let is_wanted = |cell: &Cell| match &wanted {
        None => cell.is_of_every_run(),
        Some(_) if are_all => true,
        Some(words) => format!("{cell:?}").contains(words),
    };
    let results = run(all.filter(is_wanted).collect());
    let tables = table::text(&results);
    let failed = results.values().filter(|result| result.is_err()).count();
    assert_eq!(failed, 0, "cells failed, for the causes above:\n{tables}");
    println!("{tables}");
    table::check(&results, are_all);
}
