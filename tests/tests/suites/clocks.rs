//! Guests that measure time without kvmclock: by the TSC, by the ACPI PM timer, with a tick from the PIT.

use std::time::SystemTime;

use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, seldom_on_pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[seldom_on_pool(
    "guests_that_measure_time_without_kvmclock_go_on_with_their_clocks_right",
    each_clock,
)];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] = &[both(
    "guests_without_kvmclock_go_on_with_their_clocks_right_over_three_updates",
    three_updates,
)];

/// How far a date may be off: without an RTC it is off by years.
const ABOUT_NOW_S: u64 = 600;

/// Name, parameters of the kernel, and the clock source that the kernel must use with them. Without
/// kvmclock Linux measures the TSC's rate, which it gives up where each exit takes long, as in a nested and
/// emulated guest; it then uses the PM timer.
const GUESTS: [(&str, &str, Option<&str>); 4] = [
    ("tsc", "clocksource=tsc", Some("tsc")),
    ("pmtimer", "no-kvmclock clocksource=acpi_pm", Some("acpi_pm")),
    ("periodic", "no-kvmclock nohz=off highres=off", None),
    ("pit", "no-kvmclock nolapic_timer", None),
];

fn each_clock(luo: Luo) -> Result<(), Failure> {
    over_updates(luo, 1)
}

fn three_updates(luo: Luo) -> Result<(), Failure> {
    over_updates(luo, 3)
}

fn over_updates(luo: Luo, updates: u32) -> Result<(), Failure> {
    let guests = match luo {
        Luo::Kernel => &GUESTS[..],
        // On the distribution's kernels an emulated guest with a tick from the PIT gets too little done.
        Luo::Pool => &GUESTS[..3],
    };
    let vm = |(name, parameters, _): &(&str, &'static str, _)| VmPlan {
        parameters,
        ..VmPlan::new(name, 96, 1)
    };
    let (mut host, _) = Host::boot(&HostPlan::new(guests.iter().map(vm).collect()).on(luo))?;
    host.wait_for_guests()?;
    for (guest, (name, parameters, wish)) in host.guests().iter().zip(guests) {
        let used = guest.wait_for_note("boot", WORK)?["clocksource"].clone();
        let right = match wish {
            Some(clock) => used == *clock,
            None => used != "kvm-clock",
        };
        if !right {
            return Err(format!("{name}: with `{parameters}` it measures time by {used}").into());
        }
    }
    for number in 1..=updates {
        host.update(json!({}))?;
        let checked =
            host.check_guests().and_then(|()| host.guests().iter().try_for_each(check_date));
        checked.map_err(|error| format!("update {number}: {error}"))?;
    }
    host.power_off_and_check_disks()
}

/// Checks that the guest knows the date, which it read from its RTC at boot, and that the RTC still has it.
fn check_date(guest: &Guest) -> Result<(), Failure> {
    let dates = |notes: &[Value]| notes.iter().filter(|note| note["note"] == "date").count();
    let before = dates(&guest.notes());
    guest.order("date")?;
    guest.wait_for_notes("the date", WORK, |notes| dates(notes) > before)?;
    let note = guest.wait_for_note("date", WORK)?;
    let rtc: u64 = note["text"].as_str().unwrap_or_default().parse()?;
    let kernel = guest.last().ok_or("no heartbeat")?.realtime_us / 1_000_000;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    match [rtc, kernel].iter().all(|seconds| seconds.abs_diff(now) < ABOUT_NOW_S) {
        true => Ok(()),
        false => Err(format!("{}: it is {now}, RTC {rtc}, kernel {kernel}", guest.name()).into()),
    }
}
