//! A Debian guest that boots from its own disk image and is set up by cloud-init, with work that verifies itself, over
//! live updates, a reboot and a pulled plug.

use std::time::Duration;

use perennial_tests::debian::{self, IPERF3_PORT, Progress, Release};
use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::iperf3::{self, Measurement, Protocol};
use perennial_tests::plan::{GuestRoot, HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, kernel};
use perennial_tests::{kernels, network};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] =
    &[kernel("what_debian_acknowledges_is_there_after_each_of_three_updates", three_updates)
        .unless(debian::missing)];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] = &[
    both("debian_writes_its_grub_configuration_and_boots_by_it_after_an_update", reboot)
        .unless(debian::missing),
    both("what_debian_acknowledges_is_there_after_updates_and_a_power_failure", power_failure)
        .unless(debian::missing),
    both("debian_verifies_cpu_memory_and_timers_over_three_updates", stress)
        .unless(debian::missing),
    both("debian_upgrades_to_the_kernel_of_another_package_and_boots_it", new_kernel)
        .unless(package_missing),
    kernel("debian_boots_after_each_power_cut_in_an_upgrade_of_its_kernel", upgrade)
        .unless(debian::missing),
    both("debian_verifies_several_disks_over_three_updates", several_disks).unless(debian::missing),
    both("debian_13_boots_from_its_disk_and_works_on_over_three_updates", trixie)
        .unless(debian::trixie_missing),
    both("debian_serves_echoes_and_iperf3_from_outside_over_three_updates", on_the_network)
        .unless(network_missing),
];

/// How long the guest may take from its start to its work, and for a round of all of its work: systemd and cloud-init,
/// then databases, on an emulated CPU.
const BOOT: Duration = Duration::from_secs(600);

/// Work that finds again what it did before a power failure.
const DURABLE: &[&str] = &["commits", "pgbench", "redis"];
/// With it, work that only verifies what it does.
const ALL: &[&str] = &["fio", "commits", "pgbench", "redis"];
/// The same without the one that takes longest, for the run of CI.
const SHORT: &[&str] = &["fio", "commits", "redis"];

/// Pieces that come back over the connection, and datagrams, after each update of the guest on the network.
const BYTES: u64 = 64 << 10;
const DATAGRAMS: u64 = 20;

/// What the machine's tables have.
const PLATFORM: &str = "platform = \"uuid=64656269-616e-4120-a768-6f6d65206f66\"";

/// Size of the image's root file system, without the disk's growth.
const ROOT: u64 = 1536 << 20;

/// A guest with one vCPU, as in the run of CI.
fn short_plan(luo: Luo) -> HostPlan {
    let (root, line) = (GuestRoot::Debian(Release::Bookworm), PLATFORM);
    HostPlan::new(vec![VmPlan { root, line, disk_mib: 4, ..VmPlan::new("debian", 512, 1) }]).on(luo)
}

/// A guest with two.
fn plan(release: Release, luo: Luo) -> HostPlan {
    let mut plan = short_plan(luo);
    for vm in &mut plan.vms {
        (vm.root, vm.cpus) = (GuestRoot::Debian(release), 2);
    }
    plan
}

fn boot(plan: &HostPlan) -> Result<Host, Failure> {
    let (host, _) = Host::boot(plan)?;
    check_boot(&host, 1)?;
    check_setup(&host)?;
    Ok(host)
}

/// Errors unless the guest is set up as its seed says, and has grown its root file system with the disk.
fn check_setup(host: &Host) -> Result<(), Failure> {
    let described = |notes: &[Value]| notes.iter().filter(|n| n["note"] == "describe").count();
    let before = described(&guest(host)?.notes());
    guest(host)?.order(&format!("describe {}", debian::PASSWORD))?;
    let notes = wait_for(host, "what it was set up to", |notes| {
        has(notes, "describe").map(|_| described(notes) > before)
    })?;
    let note = notes.iter().rfind(|note| note["note"] == "describe").ok_or("no note")?;
    // A file system has its own tables.
    let has_grown = note["partition"].as_u64() > Some(ROOT + debian::GROWTH / 2)
        && note["root"].as_u64() > Some(ROOT);
    let uuid = note["uuid"].as_str().unwrap_or_default();
    let is_set_up = note["hostname"] == debian::HOSTNAME && note["password"] == true;
    match has_grown && is_set_up && PLATFORM.ends_with(&format!("uuid={uuid}\"")) {
        true => Ok(()),
        false => Err(format!("the guest says {note}").into()),
    }
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
    let host = work_over_updates(&short_plan(luo), SHORT)?;
    host.power_off_and_check_file_systems()
}

fn power_failure(luo: Luo) -> Result<(), Failure> {
    let plan = plan(Release::Bookworm, luo);
    let host = work_over_updates(&plan, DURABLE)?;
    let acknowledged = Progress::acknowledged(&guest(&host)?.notes())?;
    let (host, _) = host.pull_plug_and_boot(&plan)?;
    check_boot(&host, 2)?;
    start(&host, DURABLE)?;
    let found = wait_for(&host, "what work finds", |notes| {
        Ok(Progress::found(notes)?.is_beyond(&Progress::default(), DURABLE, 0))
    })?;
    let found = Progress::found(&found)?;
    if !found.is_beyond(&acknowledged, DURABLE, 0) {
        return Err(format!("acknowledged was {acknowledged:?}, the guest finds {found:?}").into());
    }
    progress_beyond(&host, &found, DURABLE, 2)?;
    host.power_off_and_check_file_systems()
}

/// Boots, starts these kinds of work and checks them over three updates.
fn work_over_updates(plan: &HostPlan, works: &[&str]) -> Result<Host, Failure> {
    let mut host = boot(plan)?;
    start(&host, works)?;
    progress_beyond(&host, &Progress::default(), works, 1)?;
    for _ in 0..3 {
        let before = Progress::acknowledged(&guest(&host)?.notes())?;
        host.update(json!({}))?;
        // The number that is one higher may have been under way before the update.
        progress_beyond(&host, &before, works, 2)?;
    }
    Ok(host)
}

fn stress(luo: Luo) -> Result<(), Failure> {
    let host = work_over_updates(&plan(Release::Bookworm, luo), &["stress", "fio"])?;
    host.power_off_and_check_file_systems()
}

/// Its disks are a block device and a file of the host, and a block device with sectors of 4 KiB.
fn several_disks(luo: Luo) -> Result<(), Failure> {
    let mut plan = plan(Release::Bookworm, luo);
    plan.vms.iter_mut().for_each(|vm| vm.scratch_disks = true);
    let host = work_over_updates(&plan, &["disks"])?;
    let notes = guest(&host)?.notes();
    let written = notes.iter().rfind(|note| note["work"] == "disks").map(|note| &note["disks"]);
    if written != Some(&json!(["vdb", "vdc", "vdd"])) {
        return Err(format!("it wrote the disks {written:?}").into());
    }
    host.power_off_and_check_file_systems()
}

fn trixie(luo: Luo) -> Result<(), Failure> {
    let host = work_over_updates(&plan(Release::Trixie, luo), ALL)?;
    host.power_off_and_check_file_systems()
}

fn guest(host: &Host) -> Result<&Guest, Failure> {
    host.guests().first().ok_or("there is no guest".into())
}

/// Has the guest start these kinds of work.
fn start(host: &Host, works: &[&str]) -> Result<(), Failure> {
    works.iter().try_for_each(|work| Ok(guest(host)?.order(&format!("work {work}"))?))
}

/// Waits until each kind of work has come this much further. Errors if one failed.
fn progress_beyond(host: &Host, before: &Progress, works: &[&str], by: u64) -> Result<(), Failure> {
    wait_for(host, &format!("{works:?} by {by} beyond {before:?}"), |notes| {
        Ok(Progress::acknowledged(notes)?.is_beyond(before, works, by))
    })?;
    Ok(())
}

/// Waits until the guest's notes are enough, and returns them. Errors as soon as a kind of work failed.
fn wait_for(
    host: &Host,
    what: &str,
    are_enough: impl Fn(&[Value]) -> Result<bool, String>,
) -> Result<Vec<Value>, Failure> {
    let guest = guest(host)?;
    let waited = guest.wait_for_notes(what, BOOT, |notes| are_enough(notes).unwrap_or(true));
    let notes = waited.map_err(|error| {
        format!("{error}\nits work: {:?}", Progress::acknowledged(&guest.notes()))
    })?;
    are_enough(&notes)?;
    Ok(notes)
}

/// The guest's own `update-grub` looks at the disks that it has; the host reads what it wrote.
fn reboot(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(&plan(Release::Bookworm, luo))?;
    host.update(json!({}))?;
    guest(&host)?.order("reboot")?;
    guest(&host)?.wait_for_note("reboot", BOOT)?;
    check_boot(&host, 2)?;
    check_setup(&host)?;
    start(&host, &["fio"])?;
    progress_beyond(&host, &Progress::default(), &["fio"], 1)?;
    host.power_off_and_check_file_systems()
}

/// The guest installs another kernel from a package, and boots it after a live update.
fn new_kernel(luo: Luo) -> Result<(), Failure> {
    let (package, release) = kernels::package()?;
    let bytes = package.metadata()?.len();
    let mut plan = plan(Release::Bookworm, luo);
    for vm in &mut plan.vms {
        (vm.disk_mib, vm.disk_contents) = (64, Some(package.clone()));
    }
    let mut host = boot(&plan)?;
    let first = booted_release(&host)?;
    if first == release {
        return Err(format!("the image has the kernel of {} already", package.display()).into());
    }
    guest(&host)?.order(&format!("install-kernel {bytes}"))?;
    wait_for(&host, "another kernel", |notes| has(notes, "installed"))?;
    host.update(json!({}))?;
    guest(&host)?.order("reboot")?;
    check_boot(&host, 2)?;
    match booted_release(&host)? {
        found if found == release => {}
        found => return Err(format!("it boots {found} after {first}, not {release}").into()),
    }
    host.update(json!({}))?;
    start(&host, &["fio"])?;
    progress_beyond(&host, &Progress::default(), &["fio"], 1)?;
    host.power_off_and_check_file_systems()
}

/// The release of the kernel that the guest booted last.
fn booted_release(host: &Host) -> Result<String, Failure> {
    let notes = guest(host)?.notes();
    let boot = notes.iter().rfind(|note| note["note"] == "boot").ok_or("no boot")?;
    Ok(boot["release"].as_str().unwrap_or_default().to_owned())
}

fn package_missing() -> Option<String> {
    debian::missing().or_else(|| kernels::package().err())
}

/// Numbers of writes to its disk after which the guest is cut off in an upgrade of its kernel.
const CUTS: [u64; 8] = [100, 500, 1000, 1500, 2000, 2500, 3000, 6000];

/// The upgrade replaces the only kernel of the guest, and its initramfs. The guest begins it again after each power cut.
fn upgrade(luo: Luo) -> Result<(), Failure> {
    let host = boot(&plan(Release::Bookworm, luo))?;
    guest(&host)?.order("pack-kernel")?;
    wait_for(&host, "a package of its kernel", |notes| has(notes, "packed"))?;
    let mut boots = 1;
    for cut in CUTS.into_iter().chain([u64::MAX]) {
        guest(&host)?.order(&format!("upgrade {cut}"))?;
        let next = boots + 1;
        let what = format!("the end of an upgrade, or boot {next} after {cut} writes");
        let has_booted = |notes: &[Value]| notes.iter().any(|note| note["boots"] == next);
        let notes =
            wait_for(&host, &what, |notes| Ok(has(notes, "upgraded")? || has_booted(notes)))?;
        if has(&notes, "upgraded")? {
            break;
        }
        check_boot(&host, next)?;
        boots = next;
    }
    let notes = guest(&host)?.notes();
    let done = notes.iter().rfind(|note| note["note"] == "upgraded").ok_or("no upgrade")?;
    let installed = done["installed"].as_str().unwrap_or_default();
    if boots < 4 || !(installed.starts_with("installed ") && installed.ends_with("+next")) {
        return Err(format!("after {boots} boots: {done}").into());
    }
    println!("{} power cuts; the last attempt: {done}", boots - 1);
    guest(&host)?.order("reboot")?;
    check_boot(&host, boots + 1)?;
    host.power_off_and_check_file_systems()
}

/// Whether there is a note of this kind. Errors if an order failed.
fn has(notes: &[Value], kind: &str) -> Result<bool, String> {
    Progress::acknowledged(notes)?;
    Ok(notes.iter().any(|note| note["note"] == kind))
}

fn network_missing() -> Option<String> {
    iperf3::missing().or_else(debian::missing)
}

/// A connection and datagrams from outside, and a measurement of iperf3 during each update.
fn on_the_network(luo: Luo) -> Result<(), Failure> {
    let mut plan = plan(Release::Bookworm, luo);
    plan.vms.iter_mut().for_each(|vm| vm.network = true);
    let name = plan.vms.first().map(|vm| vm.name.clone()).unwrap_or_default();
    let mut host = boot(&plan)?;
    let address = network::address(0);
    // The seed has set it up.
    guest(&host)?.order(&format!("network {address}"))?;
    guest(&host)?.wait_for_note("network", BOOT)?;
    start(&host, &["echo", "iperf3"])?;
    let (connection, datagrams) = (host.connect(&name)?, host.send_datagrams(&name)?);
    guest(&host)?.wait_for_note("iperf3", BOOT)?;
    let port = host.port(&name, IPERF3_PORT)?;
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Tcp] {
        connection.wait_for(BYTES, WORK)?;
        datagrams.wait_for(DATAGRAMS, WORK)?;
        let measurement = Measurement::start(protocol, port)?;
        host.update(json!({}))?;
        measurement.finish()?;
    }
    connection.wait_for(BYTES, WORK)?;
    datagrams.wait_for(DATAGRAMS, WORK)?;
    connection.finish(WORK)?;
    datagrams.finish()?;
    wait_for(&host, "no failure", |_| Ok(true))?;
    host.power_off_and_check_file_systems()
}
