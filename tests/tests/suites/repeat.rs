//! Five live updates in a row, back and forth between two kernels.

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both};
use serde_json::json;

const UPDATES: u64 = 5;

pub(crate) const TESTS: &[Test] = &[both("five_updates_in_a_row_leave_two_guests_unharmed", five)];

fn five(luo: Luo) -> Result<(), Failure> {
    let vms = vec![VmPlan::new("web", 256, 2), VmPlan::new("db", 128, 1)];
    let (mut host, mut before) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;
    for number in 1..=UPDATES {
        let after = host.update(json!({}))?;
        if after.kernel == before.kernel || after.live_updates != number {
            return Err(format!("update {number}: before {before:?}, after {after:?}").into());
        }
        host.check_guests().map_err(|error| format!("after update {number}: {error}"))?;
        if !after.unfinished.is_empty() {
            return Err(format!("update {number} left unfinished: {:?}", after.unfinished).into());
        }
        before = after;
    }
    host.power_off_and_check_disks()
}
