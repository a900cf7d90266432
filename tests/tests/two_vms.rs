//! Two VMs of different size, different number of vCPUs and different kinds of boot.

use std::process::ExitCode;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{GuestKernel, GuestRoot, HostPlan, VmPlan};
use perennial_tests::suite;
use serde_json::json;

fn main() -> ExitCode {
    suite::run(&[
        ("two_vms_of_different_size_go_on", both_go_on),
        ("a_vm_that_was_stopped_stays_stopped_and_the_other_goes_on", one_stopped),
        ("a_vm_that_was_paused_stays_paused_until_it_is_resumed", one_paused),
    ])
}

fn plan() -> HostPlan {
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    let small = VmPlan { kernel, root, ..VmPlan::new("small", 128, 1) };
    HostPlan::new(vec![VmPlan::new("large", 512, 2), small])
}

fn both_go_on() -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&plan())?;
    host.wait_for_guests()?;
    let status = host.update(json!({"verify_frames": true}))?;
    expect_states(&status.vms, &["running", "running"])?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn one_stopped() -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&plan())?;
    host.wait_for_guests()?;
    host.request(json!({"do": "stop", "vm": "small"}))?;
    host.forget_guest("small");
    let status = host.update(json!({}))?;
    expect_states(&status.vms, &["running", "stopped"])?;
    host.check_guests()?;
    host.done();
    Ok(())
}

fn one_paused() -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&plan())?;
    host.wait_for_guests()?;
    host.request(json!({"do": "pause", "vm": "small"}))?;
    let status = host.update(json!({}))?;
    expect_states(&status.vms, &["running", "paused"])?;
    host.request(json!({"do": "resume", "vm": "small"}))?;
    host.check_guests()?;
    host.done();
    Ok(())
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
