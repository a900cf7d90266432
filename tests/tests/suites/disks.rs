//! Disks that grow, fail and hang, and what the guest and the operator see of it.

use std::fs::File;
use std::time::Instant;

use perennial_tests::control::ControlError;
use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{
    BROKEN_SECTOR, DiskKind, GuestKernel, GuestRoot, HostPlan, Luo, VmPlan,
};
use perennial_tests::report::DiskStatus;
use perennial_tests::suite::{Test, kernel, seldom_on_pool};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    seldom_on_pool(
        "disks_of_every_kind_are_in_use_at_an_update_and_those_that_grow_stay_larger",
        storage,
    ),
    kernel("a_disk_that_fails_is_full_or_hangs_harms_only_what_uses_it", broken),
];

const MIB: u64 = 1 << 20;
/// The disks of `db` on the host: with the guest's records, and with its root file system.
const RECORDS: &str = "/dev/vdb";
const ROOT: &str = "/data/db.root";
/// The broken disks of `db` on the host, with the machine's number of the first.
const BROKEN: (&str, usize) = ("/dev/vdc", 2);
const FULL: &str = "/data/db.broken2.img";

fn storage(luo: Luo) -> Result<(), Failure> {
    let disk_options = "direct=on";
    let (kernel, root) = (GuestKernel::Pvh, GuestRoot::Disk);
    let scratch_disks = true;
    let db = VmPlan { disk_options, disk_readers: 2, ..VmPlan::new("db", 128, 2) };
    let db = VmPlan { kernel, root, scratch_disks, ..db };
    let (mut host, _) = Host::boot(&HostPlan::new(vec![db]).on(luo))?;
    host.wait_for_guests()?;
    let rounds = scratch_rounds(&host, [0; 3])?;
    let disk = disk_of(&mut host, RECORDS)?;
    let told = (disk.state.as_str(), disk.direct, disk.queues, disk.bytes);
    if told != ("working", true, 2, 16 * MIB) || disk.errors != 0 {
        return Err(format!("the status says of db's disk: {disk:?}").into());
    }
    grow(&mut host)?;
    expect_discarded(&host, 22 * MIB)?;
    let rounds = scratch_rounds(&host, rounds)?;
    host.update(json!({}))?;
    host.check_guests()?;
    expect_discarded(&host, 21 * MIB)?;
    // One round more may have been under way before the update.
    scratch_rounds(&host, rounds.map(|rounds| rounds + 1))?;
    if disk_of(&mut host, RECORDS)?.bytes != 24 * MIB {
        return Err("db's disk has another size after the update".into());
    }
    host.power_off_and_check_disks()
}

/// Waits until the guest has come further on each of its scratch disks than `beyond`. Returns its rounds. Errors unless the
/// first has the host's sectors, and the last is read-only.
fn scratch_rounds(host: &Host, beyond: [u64; 3]) -> Result<[u64; 3], Failure> {
    let (guest, deadline) = (&host.guests()[0], Instant::now() + WORK);
    loop {
        let count = |notes: &[Value]| notes.iter().filter(|note| note["note"] == "scratch").count();
        let before = count(&guest.notes());
        guest.order("scratch")?;
        let notes = guest.wait_for_notes("its scratch disks", WORK, |all| count(all) > before)?;
        let note = notes.iter().rfind(|note| note["note"] == "scratch").ok_or("no note")?;
        let problems = notes.iter().find(|note| note["note"] == "problem");
        let sectors_are_right = note["sectors"] == json!(["4096", "512", "512"]);
        if problems.is_some() || !sectors_are_right || note["read_only"] != json!(["0", "0", "1"]) {
            return Err(format!("the scratch disks: {note}, {problems:?}").into());
        }
        let rounds: [u64; 3] = serde_json::from_value(note["rounds"].clone())?;
        match rounds.iter().zip(&beyond).all(|(rounds, beyond)| rounds > beyond) {
            true => return Ok(rounds),
            false if Instant::now() > deadline => {
                return Err(
                    format!("the scratch disks are at {note}, not beyond {beyond:?}").into()
                );
            }
            false => guest.wait_for_heartbeats(5, WORK)?,
        }
    }
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
    let place = format!("write {path} {offset}");
    match order(guest, &place)? {
        result if result == "written" => Ok(()),
        result => Err(format!("{place}: {result}").into()),
    }
}

/// Errors unless a block of the guest's disk `/dev/vdb` is gone from the image of the machine's disk when the guest discards it.
/// The machine's disk can discard and cannot write zeroes.
fn expect_discarded(host: &Host, offset: u64) -> Result<(), Failure> {
    let image = File::open(host.disk_image(DiskKind::Records)?)?;
    let has_data = || -> Result<bool, Failure> {
        match rustix::fs::seek(&image, SeekFrom::Data(offset)) {
            Ok(data) => Ok(data < offset + 4096),
            Err(Errno::NXIO) => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    let before = has_data()?;
    expect_written(&host.guests()[0], "/dev/vdb", offset)?;
    let written = has_data()?;
    let result = order(&host.guests()[0], &format!("discard /dev/vdb {offset}"))?;
    match (before, written, result.as_str(), has_data()?) {
        (false, true, "discarded", false) => Ok(()),
        other => Err(format!(
            "whether the image has data before a write, after it, the end of the discard, and data then: {other:?}"
        )
        .into()),
    }
}

/// Errors unless the guest's disk `/dev/vdb` is one that cannot discard, as the machine's.
fn expect_no_discards(host: &Host) -> Result<(), Failure> {
    match order(&host.guests()[0], "discard /dev/vdb 0")? {
        result if result.contains("os error 95") => Ok(()),
        result => Err(format!("a discard on storage without discards: {result}").into()),
    }
}

/// Gives the guest an order whose first word is that of the note about its end. Returns the result in words.
fn order(guest: &Guest, order: &str) -> Result<String, Failure> {
    let word = order.split(' ').next().unwrap_or_default();
    let before = results(guest, word).len();
    guest.order(order)?;
    next_result(guest, word, before)
}

/// Waits for the result of an order `word` after the first `before` ones.
fn next_result(guest: &Guest, word: &str, before: usize) -> Result<String, Failure> {
    let count = |notes: &[Value]| notes.iter().filter(|note| note["note"] == word).count();
    guest.wait_for_notes(&format!("the end of `{word}`"), WORK, |all| count(all) > before)?;
    Ok(results(guest, word).pop().unwrap_or_default())
}

fn results(guest: &Guest, word: &str) -> Vec<String> {
    let notes = guest.notes().into_iter().filter(|note| note["note"] == word);
    notes.filter_map(|note| Some(note["text"].as_str()?.to_owned())).collect()
}

fn broken(luo: Luo) -> Result<(), Failure> {
    let db = VmPlan { broken_disks: true, ..VmPlan::new("db", 128, 1) };
    let (mut host, _) = Host::boot(&HostPlan::new(vec![db, VmPlan::new("web", 128, 1)]).on(luo))?;
    host.wait_for_guests()?;
    expect_no_discards(&host)?;
    fail(&mut host)?;
    fill(&mut host)?;
    let written = hang(&mut host)?;
    host.hang_disk(BROKEN.1, false)?;
    match next_result(&host.guests()[0], "write", written)? {
        result if result == "written" => {}
        result => return Err(format!("the write that hung: {result}").into()),
    }
    wait_for_disk(&mut host, BROKEN.0, |disk| disk.stalled == 0)?;
    // Disks that have failed do not prevent an update.
    host.update(json!({}))?;
    host.check_guests()?;
    expect_written(&host.guests()[0], "/dev/vdb", 0)?;
    expect_no_discards(&host)?;
    host.power_off_and_check_disks()
}

/// The first broken disk of `db` fails to write a sector.
fn fail(host: &mut Host) -> Result<(), Failure> {
    let at = BROKEN_SECTOR * 512;
    expect_written(&host.guests()[0], "/dev/vdb", at + 4096)?;
    let written = order(&host.guests()[0], &format!("write /dev/vdb {at}"))?;
    let disk = disk_of(host, BROKEN.0)?;
    let last = disk.last_error.as_ref().map(|last| (last.operation.as_str(), &last.error));
    let told = last.is_some_and(|(operation, error)| {
        operation == "write" && error.contains("Input/output error")
    });
    if !written.contains("os error 5") || disk.state != "failing" || disk.errors == 0 || !told {
        return Err(format!("a write that fails: {written}; the status: {disk:?}").into());
    }
    expect_written(&host.guests()[0], "/dev/vdb", at + 4096)
}

/// The second one becomes larger than the file system that it is on, and fills that.
fn fill(host: &mut Host) -> Result<(), Failure> {
    let bytes = 8u64 << 30;
    expect_growth(host, FULL, Some(bytes), ("/dev/vdc", bytes))?;
    let zeroed = order(&host.guests()[0], "zero /dev/vdc")?;
    let written = order(&host.guests()[0], &format!("write /dev/vdc {}", bytes - 4096))?;
    let disk = disk_of(host, FULL)?;
    let error = disk.last_error.as_ref().map(|last| last.error.clone()).unwrap_or_default();
    if ![&zeroed, &written].iter().all(|result| result.contains("os error 5"))
        || disk.state != "failing"
        || !error.contains("free space on its file system")
    {
        let said = format!("zeroing: {zeroed}; a write: {written}");
        return Err(format!("a disk on a full file system: {said}; the status: {disk:?}").into());
    }
    Ok(())
}

/// The first one hangs: all else goes on, and no VM is paused for an update that cannot take place. Returns the
/// number of results of writes until then.
fn hang(host: &mut Host) -> Result<usize, Failure> {
    host.hang_disk(BROKEN.1, true)?;
    // It still does the first request.
    expect_written(&host.guests()[0], "/dev/vdb", 0)?;
    let written = results(&host.guests()[0], "write").len();
    host.guests()[0].order("write /dev/vdb 0")?;
    // At once, when the request may still be a slow one, and again when it certainly is not.
    wait_for_disk(host, BROKEN.0, |disk| disk.in_flight == 1)?;
    host.expect_refusal("update", json!({}), BROKEN.0)?;
    wait_for_disk(host, BROKEN.0, |disk| disk.state == "stalled" && disk.stalled == 1)?;
    host.expect_refusal("update", json!({}), "`disk-stalled`")?;
    host.expect_refusal("handover", json!({}), BROKEN.0)?;
    let left_out = json!({"without": ["db"], "stop_before": "pause"});
    let reply = host.try_update(left_out)?;
    if reply["stopped_before"] != "pause" {
        return Err(format!("an update without db: {reply}").into());
    }
    host.check_guests()?;
    match host.request(json!({"do": "pause", "vm": "db"})) {
        Err(ControlError::Refused { errors, .. }) if errors.join(": ").contains(BROKEN.0) => {}
        other => return Err(format!("a pause of a VM whose disk hangs: {other:?}").into()),
    }
    if results(&host.guests()[0], "write").len() != written {
        return Err("the write did not hang".into());
    }
    Ok(written)
}

/// Waits until the status says of a disk what is waited for.
fn wait_for_disk(
    host: &mut Host,
    path: &str,
    condition: impl Fn(&DiskStatus) -> bool,
) -> Result<(), Failure> {
    let deadline = Instant::now() + WORK;
    loop {
        match disk_of(host, path)? {
            disk if condition(&disk) => return Ok(()),
            disk if Instant::now() > deadline => {
                return Err(format!("the status still says: {disk:?}").into());
            }
            _ => host.guests()[1].wait_for_heartbeats(5, WORK)?,
        }
    }
}

/// The disk with this path on the host.
fn disk_of(host: &mut Host, path: &str) -> Result<DiskStatus, Failure> {
    let vms = host.status()?.vms;
    let mut disks = vms.into_iter().flat_map(|vm| vm.disks.unwrap_or_default());
    Ok(disks.find(|disk| disk.path == path).ok_or(format!("the status has no disk {path}"))?)
}
