//! Many VMs of 64 MiB on one host: what each phase of an update and of a handover takes. Three of them run Linux, the
//! others a guest that halts, because an emulated machine has one CPU for all of them.

use std::env;
use std::time::Instant;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::{Phase, Report};
use perennial_tests::suite::{Test, both};
use serde_json::json;

/// For `PERENNIAL_MANY`, which has the numbers of VMs: `16,32,64`.
pub(crate) const LONG_TESTS: &[Test] =
    &[both("many_vms_start_are_updated_and_are_handed_over", many)];

fn many(luo: Luo) -> Result<(), Failure> {
    for count in env::var("PERENNIAL_MANY")?.split(',') {
        on_one_host(luo, count.parse()?)?;
    }
    Ok(())
}

fn on_one_host(luo: Luo, count: u32) -> Result<(), Failure> {
    let vms: Vec<_> = ["web", "db", "mail"].map(|name| VmPlan::new(name, 64, 1)).into();
    let tiny = count.checked_sub(vms.len() as u32).ok_or("PERENNIAL_MANY: at least 3 VMs")?;
    let plan = HostPlan { tiny, ..HostPlan::new(vms) }.on(luo);
    let begun = Instant::now();
    let (mut host, cold) = Host::boot(&plan)?;
    eprintln!("{count} VMs: ready after {:?}", begun.elapsed());
    let files = cold.resources.open_files;
    host.wait_for_guests()?;
    for what in ["update", "handover", "update"] {
        let begun = Instant::now();
        let after = match what {
            "update" => host.update(json!({}))?,
            _ => host.hand_over(json!({}))?,
        };
        let took = begun.elapsed();
        if let Some(vm) = after.vms.iter().find(|vm| vm.state != "running") {
            return Err(format!("{what}: {vm:?}").into());
        }
        if after.vms.len() != count as usize {
            return Err(format!("{what}: {} VMs of {count}", after.vms.len()).into());
        }
        host.check_guests()?;
        let status = host.status()?;
        eprintln!(
            "{count} VMs: {what} {took:?}, {:?} (at first {files:?} files)",
            status.resources
        );
        show(&host.report()?);
    }
    host.power_off_and_check_disks()
}

/// Prints how long the phases took, in milliseconds: of the host, and of all VMs the mean and the longest.
fn show(report: &Report) {
    let ms = |phase: &Phase| (phase.end_ns - phase.start_ns) as f64 / 1e6;
    let host: Vec<_> =
        report.host.phases.iter().map(|p| format!("{} {:.0}", p.name, ms(p))).collect();
    eprintln!("    host: {}", host.join(", "));
    let mut blackouts: Vec<u64> = report.vms.iter().filter_map(|vm| vm.blackout_ns).collect();
    blackouts.sort_unstable();
    if let [first, .., last] = blackouts[..] {
        eprintln!("    blackouts: {:.0} to {:.0}", first as f64 / 1e6, last as f64 / 1e6);
    }
    let mut names: Vec<&str> = Vec::new();
    for phase in report.vms.iter().flat_map(|vm| &vm.phases) {
        if !names.contains(&&*phase.name) {
            names.push(&phase.name);
        }
    }
    let all = report.vms.iter().flat_map(|vm| &vm.phases);
    let shown = names.into_iter().map(|name| {
        let took: Vec<f64> = all.clone().filter(|p| p.name == name).map(ms).collect();
        let mean = took.iter().sum::<f64>() / took.len() as f64;
        format!("{name} {mean:.1} (at most {:.1})", took.iter().copied().fold(0.0, f64::max))
    });
    eprintln!("    VMs: {}", shown.collect::<Vec<_>>().join(", "));
}
