//! A guest that falls silent on purpose: the harness has to say what it hangs on.

use std::time::Duration;

use perennial_tests::host::{Failure, Host};
use perennial_tests::paths;
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both};
use serde_json::json;

/// Long enough for a guest that lives to be heard of, many times over.
const SILENCE: Duration = Duration::from_secs(10);

/// Most heartbeats of a guest that are on their way.
const MOST_LATE: usize = 50;

pub(crate) const TESTS: &[Test] = &[both("what_a_silent_guest_hangs_on_is_told_by_name", told)];

fn told(luo: Luo) -> Result<(), Failure> {
    let vms = vec![VmPlan::new("web", 128, 1), VmPlan::new("db", 128, 1)];
    let (mut host, _) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;

    // One spins in its kernel's panic, the other is paused: both are silent, each for its own reason.
    host.guests()[0].order("hang")?;
    host.request(json!({"do": "pause", "vm": "db"}))?;
    for guest in host.guests() {
        // What it had sent before may still be on its way.
        let mut late = (0..MOST_LATE).map(|_| guest.wait_for_heartbeats(1, SILENCE));
        if late.all(|heard| heard.is_ok()) {
            return Err(format!("guest {} is not silent", guest.name()).into());
        }
    }
    let told = host.diagnosis();
    if paths::verbose() {
        eprintln!("{told}");
    }
    let mut last = told.lines().rev();
    let (db, web) = (last.next().unwrap_or_default(), last.next().unwrap_or_default());
    let spins = web.starts_with("guest web: vCPU 0 spins with interrupts ");
    // The call that led there is told by its name.
    if !spins || !web.contains("panic+0x") || !told.contains("sysrq_handle_crash+0x") {
        return Err(format!("`{web}` does not name the panic").into());
    }
    if db != "guest db: the host says that it is paused" {
        return Err(format!("`{db}` does not say that it is paused").into());
    }
    // Nobody is told to hang by being looked at.
    host.request(json!({"do": "resume", "vm": "db"}))?;
    host.guests()[1].wait_for_heartbeats(10, SILENCE)?;

    // A host that answers nothing is told from one whose guests are silent.
    host.freeze()?;
    let told = host.diagnosis();
    let last = told.lines().last().unwrap_or_default();
    if !last.starts_with("the host does not answer (") || !last.contains("CPU 0 ") {
        return Err(format!("`{last}` does not say that the host is silent").into());
    }
    host.done();
    Ok(())
}
