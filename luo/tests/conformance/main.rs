//! The conformance table: how a LUO behaves, one case a row, to be run against any.
//!
//! A row is a few words of [`world`], which are made of the system calls of [`system`]. They run
//! against the state machine of the built-in LUO with files that are simulated, and against its
//! backends, keeper and pool, with real ones; a kernel's `/dev/liveupdate` needs an implementation of
//! [`system::System`] and nothing else. Every number of the list is told or excused: that is a test,
//! too. At the end there is a table of what each passed.

mod backed;
mod memory;
mod rows;
mod simulated;
mod system;
mod world;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use libtest_mimic::{Arguments, Failed, Trial};

use backed::{Backed, KeeperBackend, PoolBackend};
use rows::{Class, Row, UNEXPRESSED};
use simulated::Simulated;
use system::System;
use world::World;

/// How many cases the list has.
const CASES: u16 = 190;

/// What the cases run against, and how many of each class passed and failed.
struct Subject {
    name: &'static str,
    system: fn() -> Box<dyn System>,
    /// Class U, class G.
    passed: [AtomicUsize; 2],
    failed: [AtomicUsize; 2],
}

impl Subject {
    const fn new(name: &'static str, system: fn() -> Box<dyn System>) -> Self {
        let passed = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let failed = [AtomicUsize::new(0), AtomicUsize::new(0)];
        Self { name, system, passed, failed }
    }

    fn count(&self, class: Class, passed: bool) {
        let counts = if passed { &self.passed } else { &self.failed };
        counts[class as usize].fetch_add(1, Ordering::Relaxed);
    }
}

static SUBJECTS: [Subject; 3] = [
    Subject::new("machine", || Box::new(Simulated::new())),
    Subject::new("keeper", || Box::new(Backed::new(KeeperBackend::new()))),
    Subject::new("pool", || Box::new(Backed::new(PoolBackend::new()))),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let subjects = SUBJECTS.iter();
    let mut trials: Vec<Trial> =
        subjects.flat_map(|subject| rows::all().map(|row| trial(subject, row))).collect();
    trials.push(Trial::test("every number is told once or excused once", every_number));
    if !arguments.list {
        for (numbers, reason) in UNEXPRESSED {
            println!("not told: {numbers:?}: {reason}");
        }
        raise_fd_limit();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        print_table();
    }
    conclusion.exit_code()
}

fn trial(subject: &'static Subject, row: &'static Row) -> Trial {
    let Row { number, class, what, run } = row;
    Trial::test(format!("{}: case {number:03} {what}", subject.name), move || {
        let outcome = std::panic::catch_unwind(|| run(&mut World::new((subject.system)())));
        subject.count(*class, matches!(outcome, Ok(Ok(()))));
        match outcome {
            Ok(outcome) => outcome.map_err(|failure| Failed::from(failure.0)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
    .with_kind(format!("{class:?}"))
}

fn print_table() {
    println!("backend    U passed  failed    G passed  failed");
    for Subject { name, passed, failed, .. } in &SUBJECTS {
        let [u, g] = passed.each_ref().map(|count| count.load(Ordering::Relaxed));
        let [not_u, not_g] = failed.each_ref().map(|count| count.load(Ordering::Relaxed));
        println!("{name:<9} {u:>9} {not_u:>7}   {g:>9} {not_g:>7}");
    }
    println!();
}

/// Some cases have thousands of sessions, each of which is two fds where they are real.
fn raise_fd_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    if setrlimit(Resource::Nofile, raised).is_err() {
        println!("the limit of open files stays at {:?}", limit.current);
    }
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
