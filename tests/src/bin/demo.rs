//! `make demo`: replaces a host's kernel under two running VMs, and shows that they went on.
//!
//! Its argument selects the LUO: `pool` (the default), under a distribution's kernels, or `kernel`,
//! under kernels that are built with LUO.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use perennial_tests::continuity::Check;
use perennial_tests::host::{Failure, Host};
use perennial_tests::kernels::{self, Role};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::{Report, Status, VmReport};
use perennial_tests::{binaries, paths, qemu, suite, timeline};
use serde_json::{Value, json};

/// Number of heartbeats for which each guest is watched before the update and after it.
const WATCHED: u64 = 30;

fn main() -> ExitCode {
    let narrator = Narrator(Instant::now());
    let luo = match std::env::args().nth(1).as_deref() {
        None | Some("pool") => Luo::Pool,
        Some("kernel") => Luo::Kernel,
        Some(other) => {
            narrator.say(&format!("The argument is `{other}`, neither `pool` nor `kernel`."));
            return ExitCode::FAILURE;
        }
    };
    match demo(&narrator, luo) {
        Ok(true) => {
            narrator.say("All checks passed: the VMs outlived their host's kernel.");
            ExitCode::SUCCESS
        }
        Ok(false) => {
            narrator.say("Some checks FAILED; see the table above.");
            ExitCode::FAILURE
        }
        Err(error) => {
            narrator.say(&format!("FAILED: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints what happens, with the time since the start.
struct Narrator(Instant);

impl Narrator {
    fn say(&self, text: &str) {
        let elapsed = self.0.elapsed().as_secs_f64();
        println!("[{elapsed:6.1} s] {text}");
    }
}

fn plan(luo: Luo) -> HostPlan {
    let vms = vec![VmPlan::new("web", 512, 2), VmPlan::new("db", 256, 1)];
    // With a pool, guests run a distribution's kernel too, so that no kernel has to be built.
    HostPlan { luo, stock_guests: luo == Luo::Pool, ..HostPlan::new(vms) }
}

fn demo(narrator: &Narrator, luo: Luo) -> Result<bool, Failure> {
    let [a, b] = luo.hosts();
    let guest = if luo == Luo::Pool { b } else { Role::Guest };
    if let Some(reason) = suite::missing(luo, guest) {
        return Err(reason.into());
    }
    let (a, b) = (kernels::find(a)?, kernels::find(b)?);
    narrator.say(&format!("Host kernels: {}, then {}.", a.release, b.release));
    narrator.say("Building the images' binaries (minutes the first time, seconds afterwards).");
    binaries::build()?;
    let accelerator = qemu::accelerator();
    narrator.say(&format!("The host is a machine in QEMU on {accelerator}."));

    narrator
        .say("Measuring the floor: the same host without VMs, from reboot() to the next PID 1.");
    let floor_ns = floor(luo)?;
    narrator.say(&format!("Floor: {}.", timeline::human(floor_ns)));

    narrator.say("Booting the host with its VMs.");
    let (mut host, before) = Host::boot(&plan(luo))?;
    narrator.say(&format!("Host is up: Linux {}, LUO: {}.", before.kernel, before.luo));
    host.wait_for_guests()?;
    show_guests(narrator, &host)?;

    narrator.say(&format!("Live update: replacing {} under the running VMs.", before.kernel));
    let start = Instant::now();
    let after = host.update(json!({"verify_frames": true}))?;
    narrator.say(&format!(
        "Host is up again: Linux {}, {:.1} s after the request.",
        after.kernel,
        start.elapsed().as_secs_f64()
    ));
    show_guests(narrator, &host)?;
    narrator.say("Waiting until each guest has verified all of its memory again.");
    // The demo continues after a failure, which the table shows.
    let settled = host.check_guests();
    let report = host.report()?;
    let checks = all_checks(&host, &report);
    let disks = host.power_off_and_check_disks();
    let outcome = Outcome { luo, before, after, floor_ns, report, checks };
    let held = outcome.show(narrator)?;
    for problem in [settled.err(), disks.as_ref().err().map(|e| e.to_string().into())] {
        problem.iter().for_each(|problem| narrator.say(&format!("PROBLEM: {problem}")));
    }
    if disks.is_ok() {
        narrator
            .say("Both disks, read from the outside, hold every record that the guests reported.");
    }
    Ok(held && disks.is_ok())
}

/// Measures the time from `reboot()` to PID 1 of the next kernel, on a host without VMs.
fn floor(luo: Luo) -> Result<u64, Failure> {
    let (mut host, _) = Host::boot(&plan(luo).without_vms())?;
    host.update(json!({}))?;
    let report = host.report()?;
    host.done();
    Ok(report.host.reboot_to_init_ns)
}

/// Prints each guest's latest heartbeat.
fn show_guests(narrator: &Narrator, host: &Host) -> Result<(), Failure> {
    for guest in host.guests() {
        guest.wait_for_heartbeats(WATCHED, perennial_tests::host::WORK)?;
        if let Some(beat) = guest.last() {
            narrator.say(&format!("  {:>4} says: {}", guest.name(), beat.to_line().trim_end()));
        }
    }
    Ok(())
}

type Checks = BTreeMap<String, Vec<Check>>;

/// The checks of the guests' heartbeats and of the host's report, by name of the VM.
fn all_checks(host: &Host, report: &Report) -> Checks {
    let mut all = Checks::new();
    for guest in host.guests() {
        let mut checks = guest.checks();
        let vm = report.vms.iter().find(|vm| vm.name == guest.name());
        checks.push(frames_check(vm));
        checks.push(outcome_check(vm));
        all.insert(guest.name().to_owned(), checks);
    }
    all
}

fn frames_check(vm: Option<&VmReport>) -> Check {
    let frames = vm.and_then(|vm| vm.frames.as_ref());
    let ok = frames.is_some_and(|f| f.before == f.after && f.pages > 0);
    let evidence = frames.map_or("not in the host's report".to_owned(), |f| {
        format!("{} pages, digest {} then {}", f.pages, f.before, f.after)
    });
    Check { name: "page-frames", ok, evidence }
}

fn outcome_check(vm: Option<&VmReport>) -> Check {
    let outcome = vm.map_or("not in the report", |vm| vm.outcome.as_str());
    let blackout = vm.map_or("unknown".to_owned(), timeline::blackout);
    let ok = outcome == "running" && vm.is_some_and(|vm| vm.blackout_ns.is_some());
    Check { name: "outcome", ok, evidence: format!("{outcome}, blackout {blackout}") }
}

struct Outcome {
    luo: Luo,
    before: Status,
    after: Status,
    floor_ns: u64,
    report: Report,
    checks: Checks,
}

impl Outcome {
    /// Prints the results and writes them to files. Returns whether all checks passed.
    fn show(&self, narrator: &Narrator) -> Result<bool, Failure> {
        let mut held = true;
        for (vm, checks) in &self.checks {
            println!("\n{vm}");
            for check in checks {
                let mark = if check.ok { "ok  " } else { "FAIL" };
                println!("  {mark}  {:16} {}", check.name, check.evidence);
                held &= check.ok;
            }
        }
        let different = self.before.kernel != self.after.kernel;
        let copied = self.report.guest_ram_bytes_copied;
        for (what, ok) in [
            (format!("kernel: {} -> {}", self.before.kernel, self.after.kernel), different),
            (format!("LUO: {}", self.report.host.luo), self.report.host.luo == self.luo.backend()),
            (format!("bytes of guest RAM copied: {copied}"), copied == 0),
            (format!("VMs checked: {}", self.checks.len()), self.checks.len() == 2),
        ] {
            println!("{}  {what}", if ok { "ok  " } else { "FAIL" });
            held &= ok;
        }
        println!("\n{}", timeline::text(&self.report));
        println!("Floor (no VM): {}", timeline::human(self.floor_ns));
        for vm in &self.report.vms {
            if let Some(blackout) = vm.blackout_ns {
                let ratio = blackout as f64 / self.floor_ns.max(1) as f64;
                println!("{}: blackout/floor {ratio:.2}", vm.name);
            }
        }
        println!();
        let directory = paths::results("demo")?;
        for (name, contents) in [
            ("timeline.svg", timeline::svg(&self.report)),
            ("report.json", serde_json::to_string_pretty(&self.json())?),
        ] {
            let path = directory.join(name);
            fs::write(&path, contents)?;
            narrator.say(&format!("Wrote {}", path.display()));
        }
        Ok(held)
    }

    fn json(&self) -> Value {
        let vms: Vec<Value> = self.report.vms.iter().map(|vm| self.vm_json(vm)).collect();
        json!({
            "host_kernel_before": self.before.kernel,
            "host_kernel_after": self.after.kernel,
            "luo_backend": self.report.host.luo,
            "floor_ns": self.floor_ns,
            "guest_ram_bytes_copied": self.report.guest_ram_bytes_copied,
            "accelerator": qemu::accelerator().to_string(),
            "host_phases": self.report.host.phases,
            "vms": vms,
        })
    }

    fn vm_json(&self, vm: &VmReport) -> Value {
        let checks = self.checks.get(&vm.name).map(Vec::as_slice).unwrap_or_default();
        let by_name: BTreeMap<_, _> = checks.iter().map(|c| (c.name, c.ok)).collect();
        let evidence: BTreeMap<_, _> = checks.iter().map(|c| (c.name, &c.evidence)).collect();
        json!({
            "name": vm.name,
            "ram_bytes": vm.ram_bytes,
            "blackout_ns": vm.blackout_ns,
            "outcome": vm.outcome,
            "phases": vm.phases,
            "checks": by_name,
            "evidence": evidence,
        })
    }
}
