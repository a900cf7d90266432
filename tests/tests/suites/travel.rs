//! A VM that a host cannot restore goes along with every update and handover, untouched, until a host can.

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{Backing, HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, both, kernel, pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    both("a_vm_whose_disk_is_gone_goes_along_until_a_host_has_the_disk", disk_gone),
    kernel("vms_whose_manifest_cannot_be_read_go_along_until_a_host_can", other_program),
];

/// Too long for every run.
pub(crate) const LONG_TESTS: &[Test] = &[
    pool("vms_whose_manifest_cannot_be_read_go_along_in_a_pool", other_program),
    both("a_vm_from_a_newer_cpu_goes_along_until_a_host_has_the_cpu", cpu_gone),
];

/// The arguments of an update to a side, by a host that has the images in `data`.
fn to(data: &str, side: char) -> Value {
    json!({
        "kernel": format!("{data}/{side}/bzImage"),
        "initramfs": format!("{data}/{side}/initramfs"),
    })
}

/// Errors unless the VM is in this state, with `named` in its error.
fn expect(status: &Status, name: &str, state: &str, named: &str) -> Result<(), Failure> {
    let vm = status.vms.iter().find(|vm| vm.name == name).ok_or("no such VM")?;
    let error = vm.error.clone().unwrap_or_default().join(": ");
    match vm.state == state && error.contains(named) {
        true => Ok(()),
        false => Err(format!("{name} should be {state} for `{named}`: {status:?}").into()),
    }
}

fn check_only(host: &Host, name: &str) -> Result<(), Failure> {
    let guest = host.guests().iter().find(|guest| guest.name() == name).ok_or("no such guest")?;
    Ok(guest.wait_until_settled(WORK)?)
}

fn disk_gone(luo: Luo) -> Result<(), Failure> {
    let log = VmPlan { backing: Backing::File, ..VmPlan::new("log", 128, 1) };
    let plan = HostPlan {
        luo,
        // The next host does not find the file system with the disk's file.
        edit_b: Some(|config| config.replace("target = \"/data\"", "target = \"/elsewhere\"")),
        ..HostPlan::new(vec![VmPlan::new("web", 128, 1), log])
    };
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    host.expect_refusal("update", json!({}), "the disk /data/log.img is on /dev/vda here")?;
    let status = host.update(json!({"force": ["disk-hidden"]}))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    if status.unfinished != ["perennial-vm-log"] {
        return Err(format!("the session of the VM is not named: {status:?}").into());
    }
    check_only(&host, "web")?;
    let status = host.hand_over(json!({}))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    check_only(&host, "web")?;
    // What is undone leaves it preserved.
    host.try_update(with(to("/elsewhere", 'b'), json!({"stop_before": "jump"})))?;
    expect(&host.status()?, "log", "preserved", "/data/log.img")?;
    let status = host.update(to("/elsewhere", 'b'))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    check_only(&host, "web")?;
    let status = host.update(to("/elsewhere", 'a'))?;
    expect(&status, "log", "running", "")?;
    if !status.unfinished.is_empty() || status.live_updates != 3 {
        return Err(format!("after the VM came back: {status:?}").into());
    }
    // The guest verifies its memory and its disk.
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn with(mut arguments: Value, more: Value) -> Value {
    if let (Value::Object(arguments), Value::Object(more)) = (&mut arguments, more) {
        arguments.extend(more);
    }
    arguments
}

fn other_program(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan {
        luo,
        other_binding_b: Some(["entry-v1", "entry-v9"]),
        ..HostPlan::new(vec![VmPlan::new("web", 128, 1)])
    };
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    host.expect_refusal("update", json!({}), "initramfs-documents")?;
    let forced = json!({"force": ["initramfs-documents"]});
    let status = host.update(forced.clone())?;
    expect(&status, "web", "preserved", "vm-entry-v9")?;
    let status = host.update(with(to("/data", 'b'), forced))?;
    expect(&status, "web", "preserved", "vm-entry-v9")?;
    let status = host.update(to("/data", 'a'))?;
    expect(&status, "web", "running", "")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn cpu_gone(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan::new(vec![VmPlan::new("web", 128, 1)]).on(luo);
    let older = format!("{} clearcpuid=avx2,erms", plan.cmdline());
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    for _ in 0..2 {
        let status = host.update(with(to("/data", 'b'), json!({"cmdline": older})))?;
        expect(&status, "web", "preserved", "")?;
    }
    let status = host.update(with(to("/data", 'a'), json!({"cmdline": plan.cmdline()})))?;
    expect(&status, "web", "running", "")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}
