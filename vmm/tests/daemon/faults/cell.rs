//! One cell of the tables: one fault at one step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

use super::damage::Damage;
use super::service::{Evidence, PATIENCE, Service, VMS};
use super::{Backend, Fault, Half};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cell {
    pub(super) backend: Backend,
    pub(super) half: Half,
    pub(super) step: &'static str,
    pub(super) fault: Fault,
}

/// What became of a guest, in the words of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It runs on under the host that was there before.
    Undone,
    /// It runs on under the next host.
    Runs,
    /// It was preserved, and runs on since the cause was removed and the VM restored.
    Preserved,
    /// Its memory ended with its processes. It was booted again.
    Anew,
    /// Its process ended, and nothing started it again.
    Ended,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Self::Undone => "undone",
            Self::Runs => "runs",
            Self::Preserved => "preserved",
            Self::Anew => "anew",
            Self::Ended => "ended",
        }
    }
}

impl Cell {
    /// Whether the fault is possible at the step.
    pub(super) fn exists(&self) -> bool {
        match (self.fault, self.half) {
            // There is no process of the VM yet.
            (Fault::Hang | Fault::KillVm, Half::Arriving) => {
                !["look", "retrieve"].contains(&self.step)
            }
            // A stop of the service is no request that can be refused.
            (Fault::Error, Half::Leaving) => self.backend != Backend::Systemd,
            _ => true,
        }
    }

    /// Whether the cell is short enough for every run: each step at which a host can be killed, and a few steps with
    /// other faults.
    pub(super) fn is_of_every_run(&self) -> bool {
        let is_example = match self.backend {
            Backend::Keeper => ["save", "take"].contains(&self.step),
            Backend::Systemd => self.step == "load" && self.fault == Fault::NoFiles,
            Backend::Pool => false,
        };
        self.fault == Fault::KillHost || (is_example && self.fault != Fault::Hang)
    }

    /// Whether no deadline has to pass.
    pub(super) fn is_quick(&self) -> bool {
        self.fault != Fault::Hang
    }

    /// Runs the cell. Returns its text for the table, or what went wrong.
    pub(super) fn run_caught(self) -> Result<String, String> {
        catch_unwind(AssertUnwindSafe(|| self.run())).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default()
        })
    }

    fn run(self) -> String {
        let directory = tempfile::tempdir().unwrap();
        let _mounted = Mounted::on(&directory);
        let update = if self.fault == Fault::Hang { "budget = 5" } else { "" };
        let mut service = Service::start(self.backend, directory, update);
        let before = VMS.map(|name| service.counts_on(name));
        let (damage, struck) = self.strike(&mut service);
        let is_ended = !service.lives();
        let mut states = None;
        if !is_ended && damage.leaves_the_host_its_means() {
            states = Some(VMS.map(|name| service.state(name)));
        }
        damage.repair(&mut service);
        if is_ended {
            service.start_again();
        }
        service.wait_until_it_answers();
        let states = states.unwrap_or_else(|| VMS.map(|name| service.state(name)));
        if states.iter().any(|state| state == "withheld") && self.backend == Backend::Systemd {
            // The host could not reach the store, and says so: the next one can.
            service.signal(Signal::TERM);
            service.start_again();
        }
        let fates = [0, 1].map(|vm| self.fate(&service, VMS[vm], before[vm], &states[vm]));
        let (struck, other) = match struck {
            "two" => (fates[1], fates[0]),
            _ => (fates[0], fates[1]),
        };
        self.judge(struck, other, &service);
        if self.backend == Backend::Pool {
            self.assert_ran_once(&mut service);
        }
        match struck == other {
            true => struck.word().to_owned(),
            false => format!("{}; {}", struck.word(), other.word()),
        }
    }

    /// Lets the host leave, and do damage when it, or the next host, stands at the step. Returns when the host has
    /// come to an end of that, with the VM that was struck.
    fn strike(self, service: &mut Service) -> (Damage, &'static str) {
        let processes = VMS.map(|name| service.vm(name)["pid"].as_i64().unwrap());
        let readies = service.readies();
        let is_refused = self.fault == Fault::Error && self.half == Half::Leaving;
        let more = if is_refused { vec!["--stop-before", self.step] } else { vec![] };
        if !is_refused {
            service.set_breakpoint(self.step);
        }
        let leaves_by_itself = self.backend != Backend::Systemd;
        let client = service.leave(&more);
        if !leaves_by_itself && self.half == Half::Arriving {
            service.restart();
        }
        let vm = if is_refused { None } else { service.wait_for_breakpoint() };
        let struck = vm.unwrap_or(VMS[0]);
        let place = usize::from(struck == VMS[1]);
        let process = match self.half {
            Half::Leaving => rustix::process::Pid::from_raw(processes[place] as i32),
            Half::Arriving => service.vm_processes().get(place).copied(),
        };
        let damage = match is_refused {
            true => Damage::none(),
            false => Damage::strike((self.fault, self.half), service, struck, process),
        };
        if self.fault != Fault::KillHost && !is_refused {
            service.signal(Signal::CONT);
        }
        if self.fault == Fault::KillHost {
            // The client learns of it before the process has ended.
            service.wait_for_its_end();
        }
        if leaves_by_itself || self.half == Half::Arriving {
            let readies = if leaves_by_itself { readies } else { 0 };
            wait_for_the_end(service, client, readies);
        } else {
            service.wait_for_its_end();
        }
        (damage, struck)
    }

    /// Finds out what became of a guest that was in this state at the end of the fault. Restores it if it is preserved.
    fn fate(self, service: &Service, name: &str, before: Evidence, state: &str) -> Fate {
        let was_preserved = ["preserved", "withheld"].contains(&state);
        if was_preserved && self.fault != Fault::Hang || service.state(name) == "preserved" {
            let output = service.ctl(&["restore", name]);
            // Another may have been restored with it, or it went on by itself.
            if service.state(name) != "running" {
                panic!("{name} is not restored: {output:?}\n{}", service.logs());
            }
        }
        let now_state = service.state(name);
        let fate = match now_state.as_str() {
            "running" => {
                let now = service.counts_on(name);
                match now.boot == before.boot {
                    false => Fate::Anew,
                    true => {
                        assert!(now.count >= before.count, "{name} went back: {before:?} {now:?}");
                        match (was_preserved, service.status()["boot"] == "cold") {
                            (true, _) => Fate::Preserved,
                            (false, true) => Fate::Undone,
                            (false, false) => Fate::Runs,
                        }
                    }
                }
            }
            _ => Fate::Ended,
        };
        let expected = usize::from(now_state == "running");
        let deadline = Instant::now() + PATIENCE;
        // A process that was killed takes a moment to end.
        while service.runners(name).len() != expected {
            let runners = service.runners(name);
            assert!(Instant::now() < deadline, "{name} is {now_state}, and runs in {runners:?}");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(
            fate == Fate::Undone || !service.is_still_kept(name),
            "{name}: {fate:?}, and its old state may still come"
        );
        fate
    }

    /// What a guest had when it ran does not come back from the pool when its host has been killed.
    fn assert_ran_once(self, service: &mut Service) {
        let before =
            VMS.map(|name| (service.state(name) == "running").then(|| service.counts_on(name)));
        service.signal(Signal::KILL);
        service.start_again();
        for (name, before) in VMS.into_iter().zip(before) {
            // One that could not finish the sessions leaves a manifest without the VM's state.
            let Some(before) = before.filter(|_| service.state(name) != "failed") else { continue };
            service.runs(name);
            assert_ne!(service.counts_on(name).boot, before.boot, "{name} ran before");
        }
    }

    /// Nothing is lost but what the fault itself ends.
    fn judge(self, struck: Fate, other: Fate, service: &Service) {
        let is_saved = |fate| matches!(fate, Fate::Undone | Fate::Runs | Fate::Preserved);
        // systemd stops the service in any case, and a guest whose process does not save its state then ends.
        let is_stopped = (self.backend, self.half) == (Backend::Systemd, Half::Leaving);
        let saves = ["load", "preserve-ram", "pause", "save"].contains(&self.step);
        let runs = ["finish", "report"].contains(&self.step);
        let ends_struck = match self.fault {
            Fault::KillVm => saves || runs,
            Fault::Hang => is_stopped && saves,
            _ => false,
        };
        assert!(
            self.fault == Fault::KillHost || (is_saved(other) && (ends_struck || is_saved(struck))),
            "struck: {struck:?}, the other: {other:?}\n{}",
            service.logs()
        );
    }
}

/// Waits until the request is answered, another host is ready, or the host has ended.
fn wait_for_the_end(service: &mut Service, client: Option<Child>, readies: usize) {
    let deadline = Instant::now() + PATIENCE;
    let mut client = client;
    loop {
        if service.readies() > readies || !service.lives() {
            break;
        }
        if let Some(child) = &mut client
            && let Some(status) = child.try_wait().unwrap()
        {
            if status.success() && service.logs().contains("handing over") {
                service.becomes_ready(readies);
            }
            break;
        }
        assert!(Instant::now() < deadline, "no end\n{}", service.logs());
        thread::sleep(Duration::from_millis(5));
    }
    if let Some(mut child) = client {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A small file system over a directory, which can be filled.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn on(directory: &tempfile::TempDir) -> Self {
        let options = c"size=256m";
        mount("faults", directory.path(), "tmpfs", MountFlags::empty(), options).unwrap();
        Self(directory.path().to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = std::fs::remove_dir(&self.0);
    }
}
