//! Guests that are made silent on purpose: the harness's diagnosis must say what each hangs on.

use std::time::Duration;

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::paths;
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, kernel};
use serde_json::json;

/// Time in which a working guest sends many heartbeats.
const SILENCE: Duration = Duration::from_secs(10);

/// Most heartbeats that may still arrive from a guest that was stopped.
const MOST_LATE: usize = 50;

pub(crate) const TESTS: &[Test] = &[kernel("what_a_silent_guest_hangs_on_is_told_by_name", told)];

fn told(luo: Luo) -> Result<(), Failure> {
    let vms = vec![VmPlan::new("web", 128, 1), VmPlan::new("db", 128, 1)];
    let (mut host, _) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;

    // One guest spins in its kernel's panic, the other is paused, so both are silent.
    host.guests()[0].order("hang")?;
    host.request(json!({"do": "pause", "vm": "db"}))?;
    for guest in host.guests() {
        // Heartbeats from before may still arrive.
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
    // The diagnosis must name the calls that led to the panic.
    if !spins || !web.contains("panic+0x") || !told.contains("sysrq_handle_crash+0x") {
        return Err(format!("`{web}` does not name the panic").into());
    }
    if db != "guest db: the host says that it is paused" {
        return Err(format!("`{db}` does not say that it is paused").into());
    }
    // The diagnosis must not have stopped the paused guest for good.
    host.request(json!({"do": "resume", "vm": "db"}))?;
    host.guests()[1].wait_for_heartbeats(10, WORK)?;

    // The diagnosis must distinguish a silent host from a host with silent guests.
    host.freeze()?;
    let told = host.diagnosis();
    let last = told.lines().last().unwrap_or_default();
    if !last.starts_with("the host does not answer (") || !last.contains("CPU 0 ") {
        return Err(format!("`{last}` does not say that the host is silent").into());
    }
    host.done();
    Ok(())
}
