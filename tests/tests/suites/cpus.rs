//! Guests whose vCPUs come and go, and guests that are still booting, at the moment of a live update.

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, seldom_on_pool};
use serde_json::json;

pub(crate) const TESTS: &[Test] = &[
    seldom_on_pool(
        "vcpus_that_are_offline_or_never_started_at_an_update_are_used_after_it",
        offline,
    ),
    seldom_on_pool("a_guest_of_sixteen_vcpus_with_memory_above_4_gib_goes_on", big),
];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] = &[
    both("guests_that_are_booting_at_the_update_boot_on", early_boot),
    both("vcpus_go_offline_and_come_back_over_three_updates", offline_over_three),
];

/// `KVM_MP_STATE_UNINITIALIZED` of a vCPU that nobody has started (Linux `include/uapi/linux/kvm.h`).
const WAITS_FOR_INIT: u32 = 1;

/// Guests, their vCPUs, and the lines of their kernels after which their VMs are paused. The first guest is paused
/// when its kernel is still being unpacked and has said nothing.
const MOMENTS: [(&str, u32, &str); 4] = [
    ("unpacking", 1, ""),
    ("memory", 2, "Linux version"),
    ("secondaries", 4, "smp: Bringing up secondary CPUs"),
    ("initramfs", 1, "Unpacking initramfs"),
];

/// RAM of the big guest in MiB: half a GiB of it lies above 4 GiB.
const BIG_MIB: u64 = 3584;
/// Memory that it verifies, in bytes.
const VERIFIED: u64 = 64 << 20;

/// A guest with little to do: all vCPUs share one emulated CPU with the host.
fn vm(name: &str, cpus: u32, parameters: &'static str) -> VmPlan {
    VmPlan { parameters, busy: 2, disk_mib: 1, ..VmPlan::new(name, 96, cpus) }
}

fn offline(luo: Luo) -> Result<(), Failure> {
    offline_over(luo, 1)
}

fn offline_over_three(luo: Luo) -> Result<(), Failure> {
    offline_over(luo, 3)
}

/// At the first update one of four vCPUs is offline and two have never been started. At a later one three are offline.
fn offline_over(luo: Luo, updates: u32) -> Result<(), Failure> {
    let plan = HostPlan::new(vec![vm("web", 4, "maxcpus=2")]).on(luo);
    let (mut host, _) = Host::boot(&plan)?;
    host.guests().iter().try_for_each(|guest| guest.wait_until_settled(WORK))?;
    set_online(&host, "offline", &["1"], "0")?;
    let states = host.run_states("web")?;
    if states[2..] != [WAITS_FOR_INIT; 2] {
        return Err(
            format!("the vCPUs that were never started are in the states {states:?}").into()
        );
    }
    update_and_bring_back(&mut host)?;
    for number in 2..=updates {
        set_online(&host, "offline", &["2", "1", "3"], "0")?;
        update_and_bring_back(&mut host).map_err(|error| format!("update {number}: {error}"))?;
    }
    host.power_off_and_check_disks()
}

/// Updates, and brings back all vCPUs that are offline.
fn update_and_bring_back(host: &mut Host) -> Result<(), Failure> {
    host.update(json!({}))?;
    set_online(host, "online", &["3", "1", "2"], "0-3")?;
    host.check_guests()
}

/// Has the guest take vCPUs offline or bring them back, one after another. Those of `online` are online then.
fn set_online(host: &Host, order: &str, vcpus: &[&str], online: &str) -> Result<(), Failure> {
    let guest = host.guests().first().ok_or("there is no guest")?;
    let before = guest.notes().len();
    for vcpu in vcpus {
        guest.order(&format!("{order} {vcpu}"))?;
    }
    let notes = guest.wait_for_notes(&format!("{order} {vcpus:?}"), WORK, |notes| {
        let new = notes.iter().skip(before);
        let done = new.clone().filter(|note| note["note"] == order).count();
        done == vcpus.len() || new.clone().any(|note| note["note"] == "problem")
    })?;
    match notes.iter().skip(before).rfind(|note| note["note"] == order) {
        Some(note) if note["online"] == online => Ok(()),
        _ => Err(format!("{}: {order} {vcpus:?}: {:?}", guest.name(), &notes[before..]).into()),
    }
}

/// Guests are paused at different moments of their boot, carried over, and resumed.
fn early_boot(luo: Luo) -> Result<(), Failure> {
    // In this order: the early console shows what was said before it only if the level is ignored by then.
    let verbose = "ignore_loglevel earlyprintk=ttyS0";
    let vms = MOMENTS.iter().map(|(name, cpus, _)| vm(name, *cpus, verbose));
    let (mut host, _) = Host::boot(&HostPlan::new(vms.collect()).on(luo))?;
    // They boot one after another, so that each is paused in time.
    for (name, ..) in MOMENTS {
        host.request(json!({"do": "stop", "vm": name, "now": true}))?;
    }
    for (index, (name, _, line)) in MOMENTS.into_iter().enumerate() {
        host.guests()[index].look_out_for(line);
        let boot = host.send(json!({"do": "boot", "vm": name}))?;
        if !line.is_empty() {
            host.reply(boot.clone())?;
            host.guests()[index].wait_for_line(WORK)?;
        }
        let pause = host.send(json!({"do": "pause", "vm": name}))?;
        if line.is_empty() {
            host.reply(boot)?;
        }
        host.reply(pause)?;
        if host.guests()[index].notes().iter().any(|note| note["note"] == "boot") {
            return Err(format!("{name}: it had booted when it was paused").into());
        }
    }
    host.update(json!({}))?;
    for (name, ..) in MOMENTS {
        host.request(json!({"do": "resume", "vm": name}))?;
    }
    host.wait_for_guests()?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// Linux takes the highest memory first, so what the guest verifies lies above 4 GiB.
fn big(luo: Luo) -> Result<(), Failure> {
    // Sixteen vCPUs share one emulated CPU with the host.
    let checksummed = (VERIFIED >> 20).to_string();
    let vm = VmPlan { checksummed, busy: 1, ..VmPlan::new("big", BIG_MIB, 16) };
    let (mut host, _) = Host::boot(&HostPlan::new(vec![vm]).on(luo))?;
    host.wait_for_guests()?;
    let guest = host.guests().first().ok_or("no guest")?;
    let memory = guest.wait_for_note("memory", WORK)?;
    if memory["above_4gib"].as_u64().unwrap_or(0) < VERIFIED / 2 {
        return Err(format!("too little of the memory is above 4 GiB: {memory}").into());
    }
    host.update(json!({"verify_frames": true}))?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}
