//! Live updates in a row, back and forth between two kernels: four in every run, and as many as `PERENNIAL_SOAK`
//! says in `make soak`. Nothing may grow from update to update.

use std::env;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::{Report, Resources, Status};
use perennial_tests::suite::{Test, both};
use serde_json::json;

/// The fewest after which there are two usages of a host under the same kernel, without that after the update from a cold
/// boot.
const UPDATES: u64 = 4;

/// How much a state document may differ from an earlier one of the same VM, in bytes: what the serial port has not
/// sent yet, and requests in flight, are in it.
const DOCUMENT_VARIES: u64 = 8 << 10;
/// How much less memory may be available at the end than at the beginning, in bytes, apart from the RAM that guests
/// touched for the first time in between.
const MEMORY_VARIES: u64 = 24 << 20;
/// How much more memory of the host may be resident at the end of a soak than at its beginning, in bytes.
const RESIDENT_VARIES: u64 = 2 << 20;
/// How much further a guest's clock may fall behind with each update, in microseconds: ten times what was measured. That
/// the harness's clock and the machine's have other rates counts as well.
const BEHIND_PER_UPDATE_US: i64 = 10_000;
/// How much two of the least delays of a heartbeat may differ, in microseconds.
const DELAY_VARIES_US: i64 = 200_000;
/// Number of updates from one line with what the host uses to the next.
const SHOWN_EVERY: u64 = 10;
/// Size of a segment of guest RAM, in bytes.
const SEGMENT: u64 = 64 << 20;

pub(crate) const TESTS: &[Test] = &[both("updates_in_a_row_leave_two_guests_unharmed", a_few)];

/// For `make soak`.
pub(crate) const LONG_TESTS: &[Test] =
    &[both("many_updates_in_a_row_leave_four_guests_unharmed_and_nothing_grows", soak)];

fn a_few(luo: Luo) -> Result<(), Failure> {
    repeat(luo, vec![VmPlan::new("web", 256, 2), VmPlan::new("db", 128, 1)], UPDATES)
}

fn soak(luo: Luo) -> Result<(), Failure> {
    let updates = env::var("PERENNIAL_SOAK")?.parse()?;
    let vms = [("web", 256, 2), ("db", 128, 1), ("cache", 128, 1), ("mail", 128, 2)];
    repeat(luo, vms.map(|(name, mib, cpus)| VmPlan::new(name, mib, cpus)).into(), updates)
}

fn repeat(luo: Luo, vms: Vec<VmPlan>, updates: u64) -> Result<(), Failure> {
    let (mut host, mut before) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;
    let (mut usages, mut clocks_behind_us) = (Vec::new(), Vec::new());
    for number in 1..=updates {
        let after = host.update(json!({}))?;
        if after.kernel == before.kernel || after.live_updates != number {
            return Err(format!("update {number}: before {before:?}, after {after:?}").into());
        }
        host.check_guests().map_err(|error| format!("after update {number}: {error}"))?;
        if !after.unfinished.is_empty() {
            return Err(format!("update {number} left unfinished: {:?}", after.unfinished).into());
        }
        usages.push(Usage::of(&host.status()?, &host.report()?));
        let clocks = host.guests().iter().map(|guest| guest.clock_behind_us());
        clocks_behind_us.push(clocks.collect::<Vec<_>>());
        // What a run that fails later has shown until then.
        if number.is_multiple_of(SHOWN_EVERY) {
            eprintln!("{}: after update {number}: {:?}", luo.backend(), usages.last());
        }
        before = after;
    }
    for (index, guest) in host.guests().iter().enumerate() {
        let behind: Vec<_> = clocks_behind_us.iter().filter_map(|clocks| clocks[index]).collect();
        let (luo, name) = (luo.backend(), guest.name());
        eprintln!("{luo}: {name}: clock behind after each update, in us: {behind:?}");
        if updates > UPDATES {
            check_drift(&behind).map_err(|error| format!("{luo}: {name}: {error}"))?;
        }
    }
    // The first update comes from a cold boot, and each kernel has its own usage.
    for side in 0..2 {
        let of_side: Vec<&Usage> = usages[1..].iter().skip(side).step_by(2).collect();
        if let [first, .., last] = of_side[..] {
            last.check_against(first)?;
            if updates > UPDATES {
                last.check_soaked(first)?;
            }
            eprintln!("{}: from {first:?} to {last:?}", luo.backend());
        }
    }
    host.power_off_and_check_disks()
}

/// Errors if a clock that was so far behind after each update, in microseconds, falls behind or ahead with them.
fn check_drift(behind: &[i64]) -> Result<(), String> {
    let (first, last) = behind.split_at(behind.len() / 2);
    let (Some(first), Some(last)) = (first.iter().min(), last.iter().min()) else { return Ok(()) };
    let most = BEHIND_PER_UPDATE_US * behind.len() as i64 / 2 + DELAY_VARIES_US;
    match (last - first).abs() > most {
        true => Err(format!(
            "its clock moved by {} us from the first half of the updates to the second, more than {most}",
            last - first
        )),
        false => Ok(()),
    }
}

/// What a host used after an update.
#[derive(Debug)]
struct Usage {
    resources: Resources,
    /// Sizes of the state documents, by VM.
    documents: Vec<u64>,
    preserved: u64,
}

impl Usage {
    fn of(status: &Status, report: &Report) -> Self {
        Self {
            resources: status.resources,
            documents: report.vms.iter().map(|vm| vm.state_bytes).collect(),
            preserved: report.vms.iter().map(|vm| vm.segments.preserved).sum(),
        }
    }

    /// Errors if the host, or what it preserves, has grown since guests have worked for some updates.
    fn check_soaked(&self, first: &Self) -> Result<(), String> {
        let (now, then) = (self.resources.resident_bytes, first.resources.resident_bytes);
        match self.preserved > first.preserved || now > then + RESIDENT_VARIES {
            true => Err(format!(
                "the host, or what it preserves, has grown: from {first:?} to {self:?}"
            )),
            false => Ok(()),
        }
    }

    fn check_against(&self, first: &Self) -> Result<(), String> {
        let (now, then) = (self.resources, first.resources);
        let touched = self.preserved.saturating_sub(first.preserved) * SEGMENT;
        let documents = self.documents.iter().zip(&first.documents);
        let grown = documents.clone().find(|(now, then)| **now > **then + DOCUMENT_VARIES);
        let lost = then.available_bytes.saturating_sub(now.available_bytes);
        match grown {
            Some(_) => Err(format!("a state document has grown: from {first:?} to {self:?}")),
            None if now.open_files != then.open_files => {
                Err(format!("the open files are others: from {first:?} to {self:?}"))
            }
            None if lost > MEMORY_VARIES + touched => Err(format!(
                "{lost} bytes of memory are gone, {touched} of them to guests: from {first:?} to {self:?}"
            )),
            None => Ok(()),
        }
    }
}
