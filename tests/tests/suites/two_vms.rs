//! Two VMs of different size, different number of vCPUs, different processors and different kinds of boot.

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{GuestKernel, GuestRoot, HostPlan, Luo, VmPlan};
use perennial_tests::report::Report;
use perennial_tests::suite::{Test, seldom_on_pool};
use serde_json::json;

pub(crate) const TESTS: &[Test] =
    &[seldom_on_pool("each_of_two_vms_is_what_it_was_running_paused_or_stopped", states)];

fn plan() -> HostPlan {
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    let more = VmPlan::new("small", 128, 1);
    let small = VmPlan { kernel, root, cpu: "x86-64-v2", line: "priority = 90", ..more };
    HostPlan::new(vec![VmPlan::new("large", 512, 2), small])
}

/// Three updates of one host: both run, one is paused, one is stopped.
fn states(luo: Luo) -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&plan().on(luo))?;
    host.wait_for_guests()?;
    let status = host.update(json!({"verify_frames": true}))?;
    expect_states(&status.vms, &["running", "running"])?;
    host.check_guests()?;
    small_is_first(&host.report()?)?;

    host.request(json!({"do": "pause", "vm": "small"}))?;
    let status = host.update(json!({}))?;
    expect_states(&status.vms, &["running", "paused"])?;
    host.request(json!({"do": "resume", "vm": "small"}))?;
    host.check_guests()?;

    host.request(json!({"do": "stop", "vm": "small", "now": true}))?;
    host.forget_guest("small");
    let status = host.update(json!({}))?;
    expect_states(&status.vms, &["running", "stopped"])?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// The more urgent VM is restored first, although it is the second one in the configuration.
fn small_is_first(report: &Report) -> Result<(), Failure> {
    let begin = |name: &str| {
        let vm = report.vms.iter().find(|vm| vm.name == name)?;
        vm.phases.iter().find(|phase| phase.name == "spawn").map(|phase| phase.start_ns)
    };
    match (begin("small"), begin("large")) {
        (Some(small), Some(large)) if small < large => Ok(()),
        other => Err(format!("`small` and `large` begin at {other:?}: {report:?}").into()),
    }
}

fn expect_states(
    vms: &[perennial_tests::report::VmStatus],
    expected: &[&str],
) -> Result<(), Failure> {
    let states: Vec<&str> = vms.iter().map(|vm| vm.state.as_str()).collect();
    if states == expected {
        return Ok(());
    }
    Err(format!("the VMs are {states:?}, not {expected:?}: {vms:?}").into())
}
