//! Live updates between a distribution's kernels, which have no LUO: the VMs live in a pool.

use std::process::ExitCode;

use perennial_tests::control::ControlError;
use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{Backing, HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite;
use serde_json::{Value, json};

/// The steps of a live update, in order.
const STEPS: [&str; 7] =
    ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"];

fn main() -> ExitCode {
    suite::run_on(
        Luo::Pool,
        &[
            ("a_vm_goes_on_from_one_stock_kernel_to_another", one),
            ("two_vms_go_on_and_back_again", two_and_back),
            ("stopped_before_each_step_every_vm_runs_on_and_the_next_update_succeeds", each_step),
            ("a_command_line_that_would_lose_the_pool_is_refused_with_both_sides", refused),
            ("vms_come_back_although_the_next_configuration_is_wrong", next_configuration),
            ("a_host_without_what_a_pool_needs_says_so_and_runs_its_vms", no_pool),
        ],
    )
}

fn vm(name: &str, memory_mib: u64) -> VmPlan {
    VmPlan::new(name, memory_mib, 1)
}

fn boot(plan: HostPlan) -> Result<(Host, Status), Failure> {
    let (host, status) = Host::boot(&plan.on_pool())?;
    if status.luo != "pool" || status.config_error.is_some() {
        return Err(format!("the host says: {status:?}").into());
    }
    host.wait_for_guests()?;
    Ok((host, status))
}

/// One update that has to show everything: another kernel, the same page frames, no copy.
fn update(host: &mut Host, before: &Status) -> Result<Status, Failure> {
    let after = host.update(json!({"verify_frames": true}))?;
    if before.kernel == after.kernel || !after.unfinished.is_empty() {
        return Err(format!("before {before:?}, after {after:?}").into());
    }
    host.check_guests()?;
    let report = host.report()?;
    if report.host.luo != "pool" || report.guest_ram_bytes_copied != 0 {
        return Err(format!("the report says: {report:?}").into());
    }
    for vm in &report.vms {
        match &vm.frames {
            Some(frames) if frames.before == frames.after && frames.pages == vm.ram_bytes >> 12 => {
            }
            frames => return Err(format!("{}: page frames: {frames:?}", vm.name).into()),
        }
    }
    Ok(after)
}

fn one() -> Result<(), Failure> {
    let (mut host, before) = boot(HostPlan::new(vec![vm("web", 256)]))?;
    update(&mut host, &before)?;
    host.power_off_and_check_disks()
}

fn two_and_back() -> Result<(), Failure> {
    let file = VmPlan { backing: Backing::File, ..vm("log", 192) };
    let (mut host, a) = boot(HostPlan::new(vec![VmPlan::new("web", 256, 2), file]))?;
    let b = update(&mut host, &a)?;
    update(&mut host, &b)?;
    host.power_off_and_check_disks()
}

fn each_step() -> Result<(), Failure> {
    let (mut host, before) = boot(HostPlan::new(vec![vm("web", 256), vm("db", 192)]))?;
    for step in STEPS {
        let reply = host.try_update(json!({"stop_before": step}))?;
        if reply["outcome"] != "running" || reply["stopped_before"] != step {
            return Err(format!("stopped before {step}, the host says {reply}").into());
        }
        host.check_guests().map_err(|error| format!("stopped before {step}: {error}"))?;
    }
    update(&mut host, &before)?;
    host.power_off_and_check_disks()
}

fn refused() -> Result<(), Failure> {
    let plan = HostPlan::new(vec![vm("web", 192)]);
    let (mut host, before) = boot(plan)?;
    let here = "booted with `memmap=384M!1G`";
    let cases: [(Value, [&str; 2]); 5] = [
        (json!({"cmdline": "console=ttyS0"}), [here, "has no `memmap=`"]),
        (json!({"cmdline": "memmap=384M!2G"}), [here, "has `memmap=384M!2G`"]),
        (json!({"cmdline": "memmap=384M$1G"}), [here, "has `memmap=384M$1G`"]),
        (json!({"kernel": "/data/bad/truncated-bzImage"}), ["/data/bad/truncated-bzImage", ""]),
        (json!({"initramfs": "/data/nowhere/initramfs"}), ["/data/nowhere/initramfs", ""]),
    ];
    for (arguments, named) in cases {
        match host.try_update(arguments.clone()) {
            Err(ControlError::Refused { errors, outcome }) => {
                let text = errors.join(": ");
                if outcome.as_deref() != Some("running") || !named.iter().all(|n| text.contains(n))
                {
                    return Err(format!("{arguments}: {text}, outcome {outcome:?}").into());
                }
            }
            other => return Err(format!("{arguments} was not refused: {other:?}").into()),
        }
    }
    host.check_guests()?;
    update(&mut host, &before)?;
    host.power_off_and_check_disks()
}

fn next_configuration() -> Result<(), Failure> {
    let edit_b: fn(String) -> String = |config| config.replace("hostname", "hostnaem");
    let plan = HostPlan { edit_b: Some(edit_b), ..HostPlan::new(vec![vm("web", 192)]) };
    let (mut host, _) = boot(plan)?;
    let status = host.update(json!({}))?;
    if !status.config_error.clone().unwrap_or_default().join(": ").contains("hostnaem") {
        return Err(format!("what is wrong is not named: {status:?}").into());
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn no_pool() -> Result<(), Failure> {
    let edit_a: fn(String) -> String = |config| config.replace("\"nd_pmem\"", "\"nd_gone\"");
    let plan = HostPlan { edit_a: Some(edit_a), ..HostPlan::new(vec![vm("web", 192)]) };
    let (mut host, status) = Host::boot(&plan.on_pool())?;
    let said = status.config_error.clone().unwrap_or_default().join(": ");
    if !said.contains("`nd_gone`") || status.luo != "none" {
        return Err(format!("the absent module is not named: {status:?}").into());
    }
    host.wait_for_guests()?;
    match host.try_update(json!({})) {
        Err(error) if error.outcome() == Some("running") => {}
        other => return Err(format!("an update without LUO: {other:?}").into()),
    }
    host.check_guests()?;
    host.done();
    Ok(())
}
