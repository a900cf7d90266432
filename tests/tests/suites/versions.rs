//! Updates and handovers from earlier programs to this one, and back.

use perennial_tests::binaries;
use perennial_tests::earlier::{self, Earlier};
use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{EARLIER, HostPlan, Luo, THIS, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, both, kernel, pool};
use serde_json::json;

pub(crate) const TESTS: &[Test] = &[
    kernel("a_guest_goes_to_this_program_and_back_by_handover_and_kexec", to_and_fro)
        .unless(earlier::missing),
    kernel("a_guest_of_the_oldest_program_goes_on_in_this_one_which_it_cannot_leave", from_oldest)
        .unless(earlier::missing),
];

/// `make test-guests` runs them.
pub(crate) const LONG_TESTS: &[Test] = &[
    pool("a_guest_goes_to_this_program_and_back_by_handover_and_kexec_in_a_pool", to_and_fro)
        .unless(earlier::missing),
    both("a_guest_of_the_oldest_program_goes_on_by_a_handover", oldest_hands_over)
        .unless(earlier::missing),
];

/// A host whose first program is an earlier one, and whose second is this one.
fn plan(earlier: Earlier, luo: Luo) -> Result<HostPlan, Failure> {
    let earlier_a = Some(earlier.program()?);
    Ok(HostPlan { earlier_a, ..HostPlan::new(vec![VmPlan::new("web", 128, 1)]).on(luo) })
}

fn boot(plan: &HostPlan) -> Result<Host, Failure> {
    let (host, _) = Host::boot(plan)?;
    host.wait_for_guests()?;
    Ok(host)
}

/// CRC-32 of a file, as the host's status has that of a program.
fn digest(path: &std::path::Path) -> Result<String, Failure> {
    Ok(format!("{:08x}", crc32fast::hash(&std::fs::read(path)?)))
}

/// Errors unless the host holds the program that its guests have just left, and no other. One that is the same as the
/// host's own is not held.
fn expect_left(status: &Status, left: &str, own: &str) -> Result<(), Failure> {
    let expected: &[&str] = if left == own { &[] } else { &[left] };
    let held: Vec<&str> = status.programs.iter().map(|program| &*program.digest).collect();
    match held == expected {
        true => Ok(()),
        false => Err(format!("the host should hold the programs {expected:?}: {status:?}").into()),
    }
}

fn to_and_fro(luo: Luo) -> Result<(), Failure> {
    let plan = plan(Earlier::Previous, luo)?;
    let programs = [Earlier::Previous.program()?, binaries::build()?.perennial()];
    let [previous, this] = [digest(&programs[0])?, digest(&programs[1])?];
    let mut host = boot(&plan)?;
    for (program, left, own) in [(THIS, &previous, &this), (EARLIER, &this, &previous)] {
        let status = host.hand_over(json!({"program": program}))?;
        expect_left(&status, left, own)?;
        host.check_guests()?;
    }
    for (updates, left, own) in [(1, &previous, &this), (2, &this, &previous)] {
        let status = host.update(json!({}))?;
        expect_left(&status, left, own)?;
        if status.live_updates != updates {
            return Err(format!("this should be update {updates}: {status:?}").into());
        }
        host.check_guests()?;
    }
    host.power_off_and_check_disks()
}

/// The configuration for the oldest program, which does not know some keys.
fn for_oldest(config: String) -> String {
    let is_known = |line: &&str| !line.starts_with("confine = ") && !line.starts_with("cpu = ");
    config.lines().filter(is_known).map(|line| format!("{line}\n")).collect()
}

fn oldest(luo: Luo) -> Result<HostPlan, Failure> {
    Ok(HostPlan { edit_a: Some(for_oldest), ..plan(Earlier::Oldest, luo)? })
}

fn from_oldest(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(&oldest(luo)?)?;
    host.update(json!({}))?;
    host.check_guests()?;
    cannot_go_back(&mut host)?;
    // The guest has all of its life behind it in one boot.
    host.power_off_and_check_disks()
}

/// Nothing is paused for what is refused: both refusals come from the step before anything is preserved.
fn cannot_go_back(host: &mut Host) -> Result<(), Failure> {
    let remedy = "`perennial` that is not older than this one";
    let refused = ["initramfs-older", "perennial 0.1.0", remedy];
    host.expect_refusal_of_all("update", json!({}), &refused)?;
    let refused = ["cannot take over from perennial", EARLIER, remedy];
    host.expect_refusal_of_all("handover", json!({"program": EARLIER}), &refused)?;
    host.check_guests()
}

fn oldest_hands_over(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(&oldest(luo)?)?;
    host.hand_over(json!({"program": THIS}))?;
    host.check_guests()?;
    cannot_go_back(&mut host)?;
    host.power_off_and_check_disks()
}
