//! The conformance table: how a LUO behaves, one case a row, to be run against any.
//!
//! A row is a few words of [`world`], which are made of the system calls of [`system`]. Now they run
//! against the state machine of the built-in LUO with simulated processes; a kernel's
//! `/dev/liveupdate` and other backends need an implementation of [`system::System`] and nothing
//! else. Every number of the list is told or excused: that is a test, too.

mod rows;
mod simulated;
mod system;
mod world;

use std::collections::BTreeSet;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

use rows::{Row, UNEXPRESSED};
use simulated::Simulated;
use world::World;

/// How many cases the list has.
const CASES: u16 = 190;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = rows::all().map(trial).collect();
    trials.push(Trial::test("every number is told once or excused once", every_number));
    if !arguments.list {
        for (numbers, reason) in UNEXPRESSED {
            println!("not told: {numbers:?}: {reason}");
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(row: &'static Row) -> Trial {
    let Row { number, class, what, run } = row;
    Trial::test(format!("case {number:03} {what}"), move || {
        let mut world = World::new(Box::new(Simulated::new()));
        run(&mut world).map_err(|failure| Failed::from(failure.0))
    })
    .with_kind(format!("{class:?}"))
}

fn every_number() -> Result<(), Failed> {
    let excused = UNEXPRESSED.iter().flat_map(|(numbers, _)| numbers.iter().copied());
    let mut seen = BTreeSet::new();
    for number in rows::all().map(|row| row.number).chain(excused) {
        if !seen.insert(number) {
            return Err(format!("case {number} is there twice").into());
        }
    }
    let missing: Vec<u16> = (1..=CASES).filter(|number| !seen.remove(number)).collect();
    if missing.is_empty() && seen.is_empty() {
        return Ok(());
    }
    Err(format!("missing: {missing:?}; not in the list: {seen:?}").into())
}
