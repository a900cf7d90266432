//! One VM over one live update, once for each way in which a guest can be booted.

use std::process::ExitCode;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{Backing, GuestKernel, GuestRoot, HostPlan, VmPlan};
use perennial_tests::suite;
use serde_json::json;

fn main() -> ExitCode {
    suite::run(&[
        ("a_bzimage_guest_with_an_initramfs_goes_on", bzimage),
        ("a_pvh_guest_with_its_root_on_a_disk_goes_on", pvh),
        ("a_bzimage_guest_whose_disks_are_files_of_the_host_goes_on", file_backed),
        ("a_pvh_guest_with_an_initramfs_that_touched_all_of_its_memory_goes_on", all_memory),
        ("a_host_without_vms_is_updated", no_vm),
    ])
}

fn one_update(vm: VmPlan) -> Result<(), Failure> {
    let (mut host, before) = Host::boot(&HostPlan::new(vec![vm]))?;
    host.wait_for_guests()?;
    let after = host.update(json!({"verify_frames": true}))?;
    if before.kernel == after.kernel {
        return Err(format!("the kernel is still {}", after.kernel).into());
    }
    host.check_guests()?;
    let report = host.report()?;
    for vm in &report.vms {
        match &vm.frames {
            Some(frames) if frames.before == frames.after && frames.pages > 0 => {}
            frames => return Err(format!("{}: page frames: {frames:?}", vm.name).into()),
        }
    }
    if report.guest_ram_bytes_copied != 0 {
        return Err(format!("{} bytes of RAM were copied", report.guest_ram_bytes_copied).into());
    }
    host.power_off_and_check_disks()
}

fn bzimage() -> Result<(), Failure> {
    one_update(VmPlan::new("web", 256, 2))
}

fn pvh() -> Result<(), Failure> {
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    one_update(VmPlan { kernel, root, ..VmPlan::new("db", 256, 1) })
}

fn file_backed() -> Result<(), Failure> {
    let (backing, root) = (Backing::File, GuestRoot::Disk);
    one_update(VmPlan { backing, root, ..VmPlan::new("log", 256, 1) })
}

fn all_memory() -> Result<(), Failure> {
    let (checksummed, kernel) = ("all".into(), GuestKernel::Pvh);
    one_update(VmPlan { checksummed, kernel, ..VmPlan::new("full", 256, 1) })
}

fn no_vm() -> Result<(), Failure> {
    let (mut host, before) = Host::boot(&HostPlan::default())?;
    let after = host.update(json!({}))?;
    if before.kernel == after.kernel || after.live_updates != 1 {
        return Err(format!("before: {before:?}; after: {after:?}").into());
    }
    host.done();
    Ok(())
}
