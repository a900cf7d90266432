//! Disks that grow, and what the guest and the operator see of it.

use std::time::Instant;

use perennial_tests::control::ControlError;
use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{GuestKernel, GuestRoot, HostPlan, Luo, VmPlan};
use perennial_tests::report::DiskStatus;
use perennial_tests::suite::{Test, kernel};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] =
    &[kernel("disks_that_grow_are_larger_for_a_guest_that_runs_and_stay_so", storage)];

const MIB: u64 = 1 << 20;
/// The disks of `db` on the host: with the guest's records, and with its root file system.
const RECORDS: &str = "/dev/vdb";
const ROOT: &str = "/data/db.root";
fn storage(luo: Luo) -> Result<(), Failure> {
    let disk_options = "direct=on";
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    let db = VmPlan { disk_options, disk_readers: 2, kernel, root, ..VmPlan::new("db", 128, 2) };
    let (mut host, _) = Host::boot(&HostPlan::new(vec![db]).on(luo))?;
    host.wait_for_guests()?;
    let disk = disk_of(&mut host, RECORDS)?;
    let told = (disk.state.as_str(), disk.direct, disk.queues, disk.bytes);
    if told != ("working", true, 2, 16 * MIB) || disk.errors != 0 {
        return Err(format!("the status says of db's disk: {disk:?}").into());
    }
    grow(&mut host)?;
    host.update(json!({}))?;
    host.check_guests()?;
    if disk_of(&mut host, RECORDS)?.bytes != 24 * MIB {
        return Err("db's disk has another size after the update".into());
    }
    host.power_off_and_check_disks()
}

/// The disks of `db`, a block device and a file, grow while the guest uses them.
fn grow(host: &mut Host) -> Result<(), Failure> {
    host.change_machine("block_resize disk1 24M")?;
    expect_growth(host, RECORDS, None, ("/dev/vdb", 24 * MIB))?;
    expect_written(&host.guests()[0], "/dev/vdb", 23 * MIB)?;
    let larger = disk_of(host, ROOT)?.bytes + MIB;
    expect_growth(host, ROOT, Some(larger), ("/dev/vda", larger))?;
    // A block device cannot be grown from here, and no disk becomes smaller.
    for (size, named) in [(32 * MIB, "grow it there"), (8 * MIB, "cannot become smaller")] {
        let resize = json!({"do": "resize-disk", "vm": "db", "disk": RECORDS, "size": size});
        match host.request(resize) {
            Err(ControlError::Refused { errors, .. }) if errors.join(": ").contains(named) => {}
            other => return Err(format!("a resize to {size} bytes: {other:?}").into()),
        }
    }
    Ok(())
}

/// Resizes the disk `disk` of `db`. Errors unless its guest then has that size.
fn expect_growth(
    host: &mut Host,
    disk: &str,
    size: Option<u64>,
    (in_guest, bytes): (&str, u64),
) -> Result<(), Failure> {
    let mut resize = json!({"do": "resize-disk", "vm": "db", "disk": disk});
    if let Some(size) = size {
        resize["size"] = json!(size);
    }
    let resized = host.request(resize)?;
    if resized["bytes"] != bytes {
        return Err(format!("the resize of {disk} says {resized}").into());
    }
    // The guest's kernel takes over the size some time after its interrupt.
    let deadline = Instant::now() + WORK;
    let guest = &host.guests()[0];
    loop {
        let before = sizes(&guest.notes()).len();
        guest.order(&format!("size {in_guest}"))?;
        let notes =
            guest.wait_for_notes("the size of its disk", WORK, |all| sizes(all).len() > before)?;
        match sizes(&notes).last() {
            Some(size) if *size == bytes => break,
            size if Instant::now() > deadline => {
                return Err(format!("{in_guest} has {size:?} bytes in the guest").into());
            }
            _ => {}
        }
    }
    Ok(())
}

fn sizes(notes: &[Value]) -> Vec<u64> {
    let sizes = notes.iter().filter(|note| note["note"] == "size");
    sizes.filter_map(|note| note["bytes"].as_u64()).collect()
}

/// Errors unless the guest can write a block at `offset` of its disk `path`.
fn expect_written(guest: &Guest, path: &str, offset: u64) -> Result<(), Failure> {
    let written = write(guest, path, offset)?;
    match written["text"] == "written" {
        true => Ok(()),
        false => Err(format!("a write to {path} at {offset}: {written}").into()),
    }
}

/// Has the guest write a block, and returns its note about it.
fn write(guest: &Guest, path: &str, offset: u64) -> Result<Value, Failure> {
    let writes = |notes: &[Value]| notes.iter().filter(|note| note["note"] == "write").count();
    let before = writes(&guest.notes());
    guest.order(&format!("write {path} {offset}"))?;
    let notes = guest.wait_for_notes("the end of a write", WORK, |all| writes(all) > before)?;
    Ok(notes.into_iter().rfind(|note| note["note"] == "write").unwrap_or_default())
}

/// The disk with this path on the host.
fn disk_of(host: &mut Host, path: &str) -> Result<DiskStatus, Failure> {
    let vms = host.status()?.vms;
    let mut disks = vms.into_iter().flat_map(|vm| vm.disks.unwrap_or_default());
    Ok(disks.find(|disk| disk.path == path).ok_or(format!("the status has no disk {path}"))?)
}
