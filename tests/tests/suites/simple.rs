//! One live update, for each way to boot a guest.

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{Backing, GuestKernel, GuestRoot, HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, kernel, seldom_on_pool};
use perennial_tests::unified;
use serde_json::json;

pub(crate) const TESTS: &[Test] = &[
    both("a_bzimage_guest_with_an_initramfs_goes_on", bzimage),
    seldom_on_pool("guests_with_pvh_disks_files_and_all_of_their_memory_in_use_go_on", all_kinds),
    kernel("a_guest_that_boots_from_a_unified_kernel_image_on_its_disk_goes_on", unified_image)
        .unless(unified::missing),
    both("a_host_without_vms_is_updated", no_vm),
];

fn one_update(luo: Luo, vms: Vec<VmPlan>) -> Result<(), Failure> {
    let (mut host, before) = Host::boot(&HostPlan::new(vms).on(luo))?;
    if before.luo != luo.backend() || before.config_error.is_some() {
        return Err(format!("the host says: {before:?}").into());
    }
    host.wait_for_guests()?;
    let after = host.update(json!({"verify_frames": true}))?;
    if before.kernel == after.kernel || !after.unfinished.is_empty() {
        return Err(format!("before: {before:?}; after: {after:?}").into());
    }
    host.check_guests()?;
    let report = host.report()?;
    for vm in &report.vms {
        match &vm.frames {
            Some(frames) if frames.before == frames.after && frames.pages > 0 => {}
            frames => return Err(format!("{}: page frames: {frames:?}", vm.name).into()),
        }
    }
    if report.host.luo != luo.backend() || report.guest_ram_bytes_copied != 0 {
        return Err(format!("the report says: {report:?}").into());
    }
    let console = host.console();
    check_restore_is_silent(&console)?;
    if !console.contains("tsc_early_khz=") {
        return Err("the next kernel was not told the rate of the TSC".into());
    }
    host.power_off_and_check_disks()
}

/// Fails if KVM logged a register that it does not emulate after the live update began: no guest boots
/// then, so the restore has written the register.
fn check_restore_is_silent(console: &str) -> Result<(), Failure> {
    let (_, since) =
        console.split_once("live update 1 begins").ok_or("no live update on the console")?;
    match since.lines().find(|line| line.contains("Unhandled WRMSR")) {
        Some(line) => Err(format!("the restore made KVM log: {line}").into()),
        None => Ok(()),
    }
}

fn bzimage(luo: Luo) -> Result<(), Failure> {
    one_update(luo, vec![VmPlan::new("web", 256, 2)])
}

fn all_kinds(luo: Luo) -> Result<(), Failure> {
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    // Both disks have several requests in flight at the update, on several queues and without the page cache: one
    // by io_uring, one by threads and with a limit.
    let disk_readers = 8;
    let disk_options = "direct=on,num_queues=2";
    let on_disk = VmPlan { kernel, root, disk_options, disk_readers, ..VmPlan::new("db", 128, 1) };
    let (backing, root) = (Backing::File, GuestRoot::Disk);
    let disk_options =
        "direct=on,num_queues=3,_disable_io_uring=on,ops_size=20,ops_refill_time=100";
    let on_file =
        VmPlan { backing, root, disk_options, disk_readers, ..VmPlan::new("log", 128, 1) };
    let full = VmPlan { checksummed: "all".into(), kernel, ..VmPlan::new("full", 192, 1) };
    one_update(luo, vec![on_disk, on_file, full])
}

fn unified_image(luo: Luo) -> Result<(), Failure> {
    one_update(luo, vec![VmPlan { root: GuestRoot::Unified, ..VmPlan::new("uki", 256, 1) }])
}

fn no_vm(luo: Luo) -> Result<(), Failure> {
    let (mut host, before) = Host::boot(&HostPlan::default().on(luo))?;
    let after = host.update(json!({}))?;
    if before.kernel == after.kernel || after.live_updates != 1 {
        return Err(format!("before: {before:?}; after: {after:?}").into());
    }
    host.done();
    Ok(())
}
