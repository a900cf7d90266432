//! A Debian guest that boots from its own disk image and is set up by cloud-init, with work that verifies itself, over
//! live updates, a reboot and a pulled plug.

use perennial_tests::debian;
use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{GuestRoot, HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, kernel};
use serde_json::{Value, json};
use std::time::Duration;

pub(crate) const TESTS: &[Test] =
    &[kernel("debian_boots_from_its_disk_and_works_on_over_three_updates", three_updates)
        .unless(debian::missing)];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] =
    &[both("debian_writes_its_grub_configuration_and_boots_by_it_after_an_update", reboot)
        .unless(debian::missing)];

/// How long the guest may take from its start to its work: systemd and cloud-init on an emulated CPU.
const BOOT: Duration = Duration::from_secs(600);

fn boot(luo: Luo) -> Result<Host, Failure> {
    let root = GuestRoot::Debian;
    let vm = VmPlan { root, disk_mib: 4, ..VmPlan::new("debian", 512, 1) };
    let (host, _) = Host::boot(&HostPlan::new(vec![vm]).on(luo))?;
    check_boot(&host, 1)?;
    Ok(host)
}

/// Waits for the guest's boot with this number. Its command line must be that of the disk, and behind it that of
/// the configuration.
fn check_boot(host: &Host, number: u64) -> Result<(), Failure> {
    let is_boot = |note: &Value| note["boots"] == number;
    let notes = guest(host)?
        .wait_for_notes(&format!("boot {number}"), BOOT, |notes| notes.iter().any(is_boot))?;
    let cmdline =
        notes.iter().rfind(|note| is_boot(note)).and_then(|note| note["cmdline"].as_str());
    let cmdline = cmdline.unwrap_or_default();
    match cmdline.starts_with("BOOT_IMAGE=/boot/vmlinuz-") && cmdline.ends_with(debian::CMDLINE) {
        true => Ok(()),
        false => Err(format!("the command line is `{cmdline}`").into()),
    }
}

fn three_updates(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(luo)?;
    let mut rounds = rounds_after(&host, 0)?;
    for _ in 0..3 {
        host.update(json!({}))?;
        // One round may have been under way before the update.
        rounds = rounds_after(&host, rounds + 1)?;
    }
    host.power_off_and_check_file_systems()
}

fn guest(host: &Host) -> Result<&Guest, Failure> {
    host.guests().first().ok_or("there is no guest".into())
}

/// Waits until the work has done more than `rounds` rounds. Returns how many. Errors if the work failed.
fn rounds_after(host: &Host, rounds: u64) -> Result<u64, Failure> {
    let number = |note: &Value| note["round"].as_u64().unwrap_or(0);
    let notes = guest(host)?.wait_for_notes("more rounds of work", WORK, |notes| {
        notes.iter().any(|note| number(note) > rounds || note["note"] == "failed")
    })?;
    match notes.iter().find(|note| note["note"] == "failed") {
        Some(failed) => Err(format!("the work failed: {failed}").into()),
        None => Ok(notes.iter().map(number).max().unwrap_or(0)),
    }
}

/// The guest's own `update-grub` looks at the disks that it has; the host reads what it wrote.
fn reboot(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(luo)?;
    host.update(json!({}))?;
    guest(&host)?.order("reboot")?;
    guest(&host)?.wait_for_note("reboot", BOOT)?;
    check_boot(&host, 2)?;
    rounds_after(&host, 0)?;
    host.power_off_and_check_file_systems()
}
