//! Measures the blackout, and compares it with the floor: an update of the same host without VMs.
//!
//! Every case uses the same pair of kernels.

use std::collections::BTreeMap;
use std::env;
use std::time::Instant;

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::kernels::{self, Role};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::{Phase, Report};
use perennial_tests::samples::Samples;
use perennial_tests::{qemu, suite};
use serde::Serialize;
use serde_json::{Value, json};

use crate::target::{self, Target};

/// RAM of the host in every case, in MiB: enough for four VMs of 512 MiB, or one of 2 GiB.
const HOST_MIB: u64 = 4096;

/// Number of updates in each case, unless `PERENNIAL_BENCH_ROUNDS` sets another.
const ROUNDS: u64 = 5;

/// The measurements with one set of VMs.
#[derive(Debug, Serialize)]
struct Case {
    name: &'static str,
    vms: usize,
    ram_bytes_each: u64,
    /// The longest blackout of any VM in each update.
    blackout_ns: Samples,
    reboot_to_init_ns: Samples,
    /// For each phase, the longest time of any VM in each update.
    phases: BTreeMap<String, Samples>,
    guest_ram_bytes_copied: u64,
    page_frames_unchanged: bool,
}

pub(crate) fn bench() -> Result<Value, Failure> {
    if let Some(reason) = suite::missing(Luo::Kernel, Role::Guest) {
        return Err(reason.into());
    }
    let rounds = match env::var("PERENNIAL_BENCH_ROUNDS") {
        Ok(text) => {
            text.parse().map_err(|_| format!("PERENNIAL_BENCH_ROUNDS is `{text}`, not a number"))?
        }
        Err(_) => ROUNDS,
    };
    let accelerator = qemu::accelerator();
    let kernel = kernels::find(Role::HostA)?;
    println!("Host: {HOST_MIB} MiB, {accelerator}, Linux {}", kernel.release);
    println!("{rounds} updates in each case; min / median / max\n");
    let cases = [
        measure("floor", vec![], rounds)?,
        measure("1 x 512 MiB", vec![vm("vm0", 512)], rounds)?,
        measure("1 x 2048 MiB", vec![vm("vm0", 2048)], rounds)?,
        measure("4 x 512 MiB", ["vm0", "vm1", "vm2", "vm3"].map(|n| vm(n, 512)).into(), rounds)?,
    ];
    let targets = targets(&cases);
    print_phases(&cases[1..]);
    target::print(&targets);
    for case in &cases[1..] {
        println!(
            "  {:44} {} bytes of guest RAM copied, page frames {}",
            case.name,
            case.guest_ram_bytes_copied,
            if case.page_frames_unchanged { "unchanged" } else { "CHANGED or unknown" }
        );
    }
    Ok(json!({
        "accelerator": accelerator.to_string(),
        "host_kernel": kernel.release,
        "host_ram_mib": HOST_MIB,
        "floor_ns": cases[0].reboot_to_init_ns.median(),
        "cases": cases,
        "targets": targets,
    }))
}

/// A VM whose guest has touched all of its RAM.
fn vm(name: &str, memory_mib: u64) -> VmPlan {
    VmPlan { checksummed: "all".into(), ..VmPlan::new(name, memory_mib, 1) }
}

fn measure(name: &'static str, vms: Vec<VmPlan>, rounds: u64) -> Result<Case, Failure> {
    let start = Instant::now();
    let plan = HostPlan { memory_mib: Some(HOST_MIB), ..HostPlan::new(vms) };
    let ram_bytes_each = plan.vms.first().map_or(0, |vm| vm.memory_mib << 20);
    let (mut host, _) = Host::boot(&plan)?;
    // A single emulated CPU may have to fill the memory of all guests.
    let filled = WORK * plan.vms.len() as u32;
    for guest in host.guests() {
        guest.wait_for_note("memory", filled)?;
    }
    let mut reports = Vec::new();
    for _ in 0..rounds {
        host.update(json!({}))?;
        reports.push(host.report()?);
        for guest in host.guests() {
            guest.wait_for_heartbeats(10, WORK)?;
        }
    }
    // One more update, which is not a sample, because the digest of the page frames takes time.
    host.update(json!({"verify_frames": true}))?;
    let verified = host.report()?;
    host.check_guests()?;
    host.done();
    let case = case(name, plan.vms.len(), ram_bytes_each, &reports, &verified);
    let shown = if case.vms == 0 { &case.reboot_to_init_ns } else { &case.blackout_ns };
    println!("{name:14} {}  [{:.0} s]", shown.text(), start.elapsed().as_secs_f64());
    Ok(case)
}

fn case(
    name: &'static str,
    vms: usize,
    ram_bytes_each: u64,
    reports: &[Report],
    verified: &Report,
) -> Case {
    let each = |value: fn(&Report) -> Option<u64>| {
        Samples::new(reports.iter().filter_map(value).collect())
    };
    let mut phases: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for report in reports {
        let mut longest: BTreeMap<&str, u64> = BTreeMap::new();
        for Phase { name, start_ns, end_ns } in report.vms.iter().flat_map(|vm| &vm.phases) {
            let took = end_ns.saturating_sub(*start_ns);
            let entry = longest.entry(name).or_default();
            *entry = took.max(*entry);
        }
        for (name, took) in longest {
            phases.entry(name.to_owned()).or_default().push(took);
        }
    }
    let mut frames = verified.vms.iter().map(|vm| vm.frames.as_ref());
    Case {
        name,
        vms,
        ram_bytes_each,
        blackout_ns: each(|r| r.vms.iter().filter_map(|vm| vm.blackout_ns).max()),
        reboot_to_init_ns: each(|r| Some(r.host.reboot_to_init_ns)),
        phases: phases.into_iter().map(|(name, all)| (name, Samples::new(all))).collect(),
        guest_ram_bytes_copied: verified.guest_ram_bytes_copied,
        page_frames_unchanged: frames
            .all(|f| f.is_some_and(|f| f.before == f.after && f.pages > 0)),
    }
}

fn targets(cases: &[Case; 4]) -> Vec<Target> {
    let [floor, one, big, four] = cases;
    let [one, big, four] = [one, big, four].map(|case| &case.blackout_ns);
    vec![
        Target::ratio("1 x 512 MiB to floor", one, &floor.reboot_to_init_ns, 1.5),
        Target::ratio("1 x 2048 MiB to 1 x 512 MiB", big, one, 1.1),
        Target::ratio("4 x 512 MiB to 1 x 512 MiB", four, one, 1.25),
    ]
}

/// Medians of every phase, one column for each case.
fn print_phases(cases: &[Case]) {
    println!("\nMedian of each phase, for the VM with the longest one");
    let names: std::collections::BTreeSet<&String> =
        cases.iter().flat_map(|case| case.phases.keys()).collect();
    print!("  {:20}", "");
    cases.iter().for_each(|case| print!("{:>16}", case.name));
    println!();
    for name in names {
        print!("  {name:20}");
        for case in cases {
            let median = case.phases.get(name).map_or(0, Samples::median);
            print!("{:>16}", perennial_tests::timeline::human(median));
        }
        println!();
    }
}
