//! Tests only for hosts with a pool: a distribution's kernels, huge pages, a watchdog, and a pool that is missing,
//! out of reach, or left by another boot.

use std::fs::File;
use std::os::unix::fs::FileExt;

use perennial_tests::control::{ControlError, expect_refusal};
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::{Status, VmStatus};
use perennial_tests::suite::{Test, pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    pool("a_stock_guest_goes_on_there_and_back_in_its_frames_on_huge_pages", there_and_back),
    pool("memory_of_a_guest_that_resets_is_there_for_it_again", reset),
    pool("a_host_without_what_a_pool_needs_says_so_and_runs_its_vms", no_pool),
    pool("what_is_out_of_reach_is_kept_passed_on_or_given_up_but_never_doubled", out_of_reach),
    pool(
        "a_machine_that_hangs_or_panics_after_the_jump_comes_back_with_the_kernel_before",
        watchdog,
    ),
    pool("what_another_boot_left_in_the_memory_is_not_resumed", another_boot),
];

fn vm(name: &str, memory_mib: u64) -> VmPlan {
    VmPlan::new(name, memory_mib, 1)
}

fn boot(plan: &HostPlan) -> Result<(Host, Status), Failure> {
    let (host, status) = Host::boot(plan)?;
    if status.luo != "pool" || status.config_error.is_some() || status.boot != "cold" {
        return Err(format!("the host says: {status:?}").into());
    }
    host.wait_for_guests()?;
    Ok((host, status))
}

/// The UUID that follows from the name `web`.
const UUID: &str = "4b82b14c-b2d1-511a-8fd3-41fae68544bd";

/// The request for the SMBIOS tables of VM `web`.
fn smbios() -> Value {
    json!({"do": "memory", "vm": "web", "address": 0xf_0000, "bytes": 256})
}

fn there_and_back(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan { stock_guests: true, ..HostPlan::new(vec![VmPlan::new("web", 256, 2)]) };
    let (mut host, mut before) = boot(&plan.on(luo))?;
    let uuid = host.guests()[0].wait_for_note("boot", WORK)?["uuid"].clone();
    if uuid != UUID {
        return Err(format!("the guest reads the UUID {uuid}, not {UUID}").into());
    }
    let tables = host.request(smbios())?;
    for _ in 0..2 {
        expect_huge_pages(&host.status()?.vms[0])?;
        let after = host.update(json!({"verify_frames": true}))?;
        if before.kernel == after.kernel || !after.unfinished.is_empty() {
            return Err(format!("before {before:?}, after {after:?}").into());
        }
        host.check_guests()?;
        let vm = host.report()?.vms.remove(0);
        match &vm.frames {
            // The digest covers all of the VM's RAM, because RAM in a pool has no holes.
            Some(frames) if frames.before == frames.after && frames.pages == vm.ram_bytes >> 12 => {
            }
            frames => return Err(format!("page frames: {frames:?}").into()),
        }
        before = after;
    }
    if host.request(smbios())? != tables {
        return Err("the SMBIOS tables are not what they were".into());
    }
    expect_huge_pages(&host.status()?.vms[0])?;
    host.power_off_and_check_disks()
}

/// Errors unless KVM maps the VM's RAM in huge pages only: the pool's start, its files and their mappings
/// are aligned for that.
fn expect_huge_pages(vm: &VmStatus) -> Result<(), Failure> {
    match vm.mapped {
        Some(mapped) if mapped.small == 0 && mapped.huge > 0 => Ok(()),
        mapped => Err(format!("KVM has the RAM of {} mapped in {mapped:?}", vm.name).into()),
    }
}

fn reset(luo: Luo) -> Result<(), Failure> {
    // The pool has no room for twice the VM's memory.
    let (host, _) = boot(&HostPlan::new(vec![vm("web", 256)]).on(luo))?;
    let boot_id = |host: &Host| Ok::<_, Failure>(boots(host, "web")?.pop());
    let first = boot_id(&host)?;
    host.guests()[0].order("reboot")?;
    while boot_id(&host)? == first {
        host.guests()[0].wait_for_heartbeats(1, WORK)?;
    }
    host.done();
    Ok(())
}

/// The boot ids in the guest's notes so far, in order.
fn boots(host: &Host, guest: &str) -> Result<Vec<Value>, Failure> {
    let guest = host.guests().iter().find(|g| g.name() == guest).ok_or("no such guest")?;
    let notes = guest.notes().into_iter().filter(|note| note["note"] == "boot");
    Ok(notes.map(|note| note["boot_id"].clone()).collect())
}

fn no_pool(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan { edit_a: Some(without_driver), ..HostPlan::new(vec![vm("web", 192)]) };
    let (mut host, status) = Host::boot(&plan.on(luo))?;
    let said = status.config_error.clone().unwrap_or_default().join(": ");
    let why = status.luo_error.clone().unwrap_or_default();
    if !said.contains("`nd_gone`") || status.luo != "keeper" || !why.contains("/pool") {
        return Err(
            format!("the status does not name the missing module and pool: {status:?}").into()
        );
    }
    host.wait_for_guests()?;
    expect_refusal(&host.try_update(json!({})), "running", "/pool")?;
    host.check_guests()?;
    host.done();
    Ok(())
}

/// Changes a configuration so that the host does not load the pool's driver.
fn without_driver(config: String) -> String {
    config.replace("\"nd_pmem\"", "\"nd_gone\"")
}

fn expect_states(status: &Status, expected: [&str; 2]) -> Result<(), Failure> {
    match status.vms.iter().map(|vm| vm.state.as_str()).eq(expected) {
        true => Ok(()),
        false => Err(format!("not {expected:?}: {status:?}").into()),
    }
}

fn out_of_reach(luo: Luo) -> Result<(), Failure> {
    let vms = vec![vm("web", 128), vm("db", 128)];
    let plan = HostPlan { edit_b: Some(without_driver), ..HostPlan::new(vms) };
    let (mut host, _) = boot(&plan.on(luo))?;

    // The next host cannot reach the VMs, and must not boot them a second time. The preflight knows it.
    host.expect_refusal("update", json!({}), "`initramfs-modules`")?;
    let anyway = json!({"force": ["driver", "initramfs-modules"]});
    let status = host.update(anyway.clone())?;
    expect_states(&status, ["withheld", "withheld"])?;
    let error = status.vms[0].error.clone().unwrap_or_default().join(": ");
    if status.luo != "none" || !error.contains("`stop`") || !error.contains("/pool") {
        return Err(format!("the status names neither cause nor remedy: {status:?}").into());
    }
    match host.request(json!({"do": "boot", "vm": "web"})) {
        Err(ControlError::Refused { errors, .. }) if errors.join(": ").contains("withheld") => {}
        other => return Err(format!("a VM that may be preserved was booted: {other:?}").into()),
    }
    // Another look at the pool fails as well, and takes nothing.
    match host.request(json!({"do": "restore", "vm": "web"})) {
        Err(ControlError::Refused { errors, .. }) if errors.join(": ").contains("/pool") => {}
        other => return Err(format!("not a look that failed: {other:?}").into()),
    }
    expect_states(&host.status()?, ["withheld", "withheld"])?;

    // A host that can reach them resumes them as they were.
    let status = host.update(json!({}))?;
    expect_states(&status, ["running", "running"])?;
    host.check_guests()?;

    // A VM that was given up can be booted again; then its old state must not come back.
    let status = host.update(anyway)?;
    expect_states(&status, ["withheld", "withheld"])?;
    host.request(json!({"do": "stop", "vm": "web", "now": true}))?;
    host.request(json!({"do": "boot", "vm": "web"}))?;
    expect_states(&host.status()?, ["running", "withheld"])?;
    expect_refusal(&host.try_update(json!({})), "preserved", "`web` was given up")?;
    while boots(&host, "web")?.len() < 2 {
        host.guests()[0].wait_for_heartbeats(1, WORK)?;
    }
    host.done();
    Ok(())
}

fn watchdog(luo: Luo) -> Result<(), Failure> {
    // Side `b` takes less time than a kernel needs to start.
    let plan = HostPlan { watchdog: Some([120, 12]), ..HostPlan::new(vec![vm("web", 128)]) };
    let plan = plan.on(luo);
    let (mut host, _) = boot(&plan)?;
    // The watchdog of side `a` runs on over the jump. Side `b` opens it in time.
    host.update(json!({}))?;
    host.check_guests()?;
    let said = host.console();
    if !said.contains("/dev/watchdog resets this machine if it hangs for 12 s") {
        return Err(format!("side b does not feed its watchdog:\n{said}").into());
    }
    // A kernel without the driver is like one that hangs.
    let cmdline = format!("{} module_blacklist=i6300esb", plan.cmdline());
    host.send(json!({"do": "update", "cmdline": cmdline}))?;
    let status = host.wait_for_reset()?;
    if status.live_updates != 0 {
        return Err(format!("the watchdog did not reset the machine: {status:?}").into());
    }
    // The host adds the time until the reboot.
    let cmdline = cmdline.replace(" panic=-1", "");
    panics_after_the_jump(&mut host, &format!("{cmdline} unknown_nmi_panic"))?;
    host.done();
    Ok(())
}

/// A kernel that panics after the jump reboots the machine, which enters the kernel from before. The VMs boot there.
fn panics_after_the_jump(host: &mut Host, cmdline: &str) -> Result<(), Failure> {
    let boot_ids = boots(host, "web")?;
    host.update(json!({"cmdline": cmdline}))?;
    host.change_machine("nmi")?;
    let status = host.wait_for_reset()?;
    let console = host.console();
    let after = console.rsplit_once("Kernel panic - not syncing: NMI").map(|(_, after)| after);
    if !after.is_some_and(|after| after.contains("Rebooting in 10 seconds")) {
        return Err(format!("no panic with a reboot:\n{console}").into());
    }
    if status.live_updates != 0 || status.vms[0].state != "running" {
        return Err(format!("the machine came back otherwise: {status:?}").into());
    }
    while boots(host, "web")?.len() == boot_ids.len() {
        host.guests()[0].wait_for_heartbeats(1, WORK)?;
    }
    Ok(())
}

fn another_boot(luo: Luo) -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("ram");
    let plan = HostPlan::new(vec![vm("web", 192)]).on(luo);
    let plan = HostPlan { edit_b: Some(without_driver), ram_file: Some(path.clone()), ..plan };

    // The pool's memory has other contents at first.
    let ram = File::create(&path)?;
    ram.set_len(plan.memory_mib() << 20)?;
    let pool = plan.pool().ok_or("no pool")?.in_ram_file();
    for at in [pool.start, pool.end - 4096] {
        ram.write_all_at(&[0xa5; 4096], at)?;
    }
    let (mut host, _) = boot(&plan)?;
    let status = host.update(json!({"force": ["driver", "initramfs-modules"]}))?;
    if status.vms[0].state != "withheld" {
        return Err(format!("the VM is not in the pool: {status:?}").into());
    }
    // A new machine starts with the same memory: a complete pool with a VM, which this host's
    // configuration does not format again.
    host.done();
    let edit_a: fn(String) -> String =
        |config| config.replace(", format-from = \"/data/pool.ext4\"", "");
    let (host, status) = boot(&HostPlan { edit_a: Some(edit_a), ..plan })?;
    if status.live_updates != 0 || !status.unfinished.is_empty() {
        return Err(format!("the host resumed state of another boot: {status:?}").into());
    }
    if boots(&host, "web")?.len() != 1 {
        return Err("the guest did not boot again".into());
    }
    host.power_off_and_check_disks()
}
