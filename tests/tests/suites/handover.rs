//! Handovers: another program replaces the host's program under its VMs, on the same kernel.

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{Backing, HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, kernel, seldom_on_pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    seldom_on_pool("vms_go_on_over_handovers_and_live_updates_in_turn", in_turn),
    kernel("a_host_without_luo_hands_over_by_a_keeper", without_luo),
    kernel("what_cannot_take_over_is_refused_and_every_vm_runs_on", refused),
];

fn boot(plan: &HostPlan) -> Result<(Host, Status), Failure> {
    let (host, status) = Host::boot(plan)?;
    host.wait_for_guests()?;
    Ok((host, status))
}

fn two(luo: Luo) -> HostPlan {
    let file = VmPlan { backing: Backing::File, ..VmPlan::new("db", 128, 1) };
    HostPlan::new(vec![VmPlan::new("web", 256, 2), file]).on(luo)
}

/// Runs a handover and checks that the kernel is the same, which backend carried the VMs, and that they
/// run.
fn hand_over(host: &mut Host, before: &Status) -> Result<Status, Failure> {
    let after = host.hand_over(json!({}))?;
    let same = after.kernel == before.kernel && after.live_updates == before.live_updates;
    if !same || !after.unfinished.is_empty() {
        return Err(format!("before {before:?}, after {after:?}").into());
    }
    host.check_guests()?;
    let report = host.report()?;
    // The kernel's LUO returns preserved files only after a kexec.
    let carrier = if before.luo == "pool" { "pool" } else { "keeper" };
    if report.host.luo != carrier || report.guest_ram_bytes_copied != 0 {
        return Err(format!("the report says: {report:?}").into());
    }
    for vm in &report.vms {
        if vm.outcome != "running" || vm.blackout_ns.is_none() {
            return Err(format!("the report of {}: {vm:?}", vm.name).into());
        }
    }
    Ok(after)
}

fn in_turn(luo: Luo) -> Result<(), Failure> {
    let (mut host, a) = boot(&two(luo))?;
    let first = hand_over(&mut host, &a)?;
    let second = hand_over(&mut host, &first)?;
    let b = host.update(json!({}))?;
    if b.kernel == second.kernel || b.live_updates != 1 {
        return Err(format!("before the update {second:?}, after it {b:?}").into());
    }
    host.check_guests()?;
    let third = hand_over(&mut host, &b)?;
    let a = host.update(json!({}))?;
    if a.kernel == third.kernel || a.live_updates != 2 {
        return Err(format!("before the update {third:?}, after it {a:?}").into());
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn without_luo(luo: Luo) -> Result<(), Failure> {
    let (mut host, status) = boot(&HostPlan { without_luo: true, ..two(luo) })?;
    if status.luo != "keeper" {
        return Err(format!("the backend should be `keeper`: {status:?}").into());
    }
    let status = hand_over(&mut host, &status)?;
    hand_over(&mut host, &status)?;
    match host.try_update(json!({})) {
        Err(error) if error.outcome() == Some("running") => {}
        other => return Err(format!("an update without LUO: {other:?}").into()),
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn refused(luo: Luo) -> Result<(), Failure> {
    let (mut host, status) = boot(&two(luo))?;
    host.stop_before_each_step("handover")?;
    let cases: [(Value, &str); 4] = [
        (json!({"program": "/nowhere/perennial"}), "/nowhere/perennial"),
        (json!({"program": "/data/bad/empty"}), "/data/bad/empty"),
        (json!({"program": "/data"}), "/data"),
        (json!({"program": "/etc/perennial.toml"}), "/etc/perennial.toml"),
    ];
    for (arguments, named) in cases {
        host.expect_refusal("handover", arguments, named)?;
    }
    host.check_guests()?;
    hand_over(&mut host, &status)?;
    host.power_off_and_check_disks()
}
