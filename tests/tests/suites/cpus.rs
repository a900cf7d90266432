//! A guest whose vCPUs are not all online at the moment of a live update.

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, kernel};
use serde_json::json;

pub(crate) const TESTS: &[Test] =
    &[kernel("vcpus_that_are_offline_or_never_started_at_an_update_are_used_after_it", offline)];

/// `KVM_MP_STATE_UNINITIALIZED` of a vCPU that nobody has started (Linux `include/uapi/linux/kvm.h`).
const WAITS_FOR_INIT: u32 = 1;

/// At the update one of four vCPUs is offline and two have never been started.
fn offline(luo: Luo) -> Result<(), Failure> {
    // It has little to do: all vCPUs share one emulated CPU with the host.
    let vm = VmPlan { parameters: "maxcpus=2", busy: 2, disk_mib: 1, ..VmPlan::new("web", 96, 4) };
    let (mut host, _) = Host::boot(&HostPlan::new(vec![vm]).on(luo))?;
    host.guests().iter().try_for_each(|guest| guest.wait_until_settled(WORK))?;
    set_online(&host, "offline", &["1"], "0")?;
    let states = host.run_states("web")?;
    if states[2..] != [WAITS_FOR_INIT; 2] {
        return Err(
            format!("the vCPUs that were never started are in the states {states:?}").into()
        );
    }
    host.update(json!({}))?;
    set_online(&host, "online", &["3", "1", "2"], "0-3")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
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
