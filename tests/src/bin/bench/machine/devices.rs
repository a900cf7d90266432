//! The blackout of a VM with four disks and four network devices, against that of a VM with one disk.
//!
//! Both VMs do the same work, on their first disk. Each has a machine of its own, so the two cannot take turns.

use std::time::Instant;

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{Backing, HostPlan, VmPlan};
use perennial_tests::samples::Samples;
use serde::Serialize;
use serde_json::json;

use super::table::Row;

/// RAM of the VM in MiB.
const VM_MIB: u64 = 256;
/// The most that many devices may cost.
const AT_MOST: f64 = 1.05;

/// The blackouts of one VM.
#[derive(Debug, Serialize)]
pub(super) struct Case {
    name: &'static str,
    blackout_ns: Samples,
}

/// Measures both VMs. Returns the blackouts, and the line of the table about them.
pub(super) fn measure(updates: usize) -> Result<([Case; 2], Row), Failure> {
    let vm = VmPlan { backing: Backing::File, ..VmPlan::new("vm0", VM_MIB, 1) };
    let one = case("1 disk", vm.clone(), updates)?;
    let many = case("4 disks and 4 nets", VmPlan { idle_disks: 3, idle_nets: 4, ..vm }, updates)?;
    let ratio = many.blackout_ns.ratio(&one.blackout_ns);
    let row = Row {
        title: "blackout with 4 disks and 4 nets, to that with 1 disk".into(),
        unit: "ms",
        values: [Some(many.blackout_ns.median() as f64 / 1e6), None, None],
        ratio: ratio.map(|ratio| [ratio; 3]),
        aim: format!("at most {AT_MOST}"),
        met: ratio.is_some_and(|ratio| ratio <= AT_MOST),
    };
    Ok(([one, many], row))
}

fn case(name: &'static str, vm: VmPlan, updates: usize) -> Result<Case, Failure> {
    let start = Instant::now();
    let (mut host, _) = Host::boot(&HostPlan::new(vec![vm]))?;
    for guest in host.guests() {
        guest.wait_for_note("memory", WORK)?;
    }
    let mut blackouts = Vec::new();
    for _ in 0..updates {
        host.update(json!({}))?;
        let report = host.report()?;
        blackouts.extend(report.vms.iter().filter_map(|vm| vm.blackout_ns));
        for guest in host.guests() {
            guest.wait_for_heartbeats(10, WORK)?;
        }
    }
    host.check_guests()?;
    host.done();
    let blackout_ns = Samples::new(blackouts);
    println!("{name:20} {}  [{:.0} s]", blackout_ns.text(), start.elapsed().as_secs_f64());
    Ok(Case { name, blackout_ns })
}
