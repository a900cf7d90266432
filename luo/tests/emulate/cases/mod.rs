//! Cases that need real processes.
//!
//! An inside case is a function that runs under the emulator. A crossing case is an inside case
//! that makes switches; it runs once in every generation, and [`kernel_number`] tells the
//! generations apart. An outside case runs the emulator and checks its result.

mod calls;
mod device;
mod files;
mod outside;
mod threads;

use std::ffi::OsString;
use std::process::ExitCode;

use libtest_mimic::{Failed, Trial};
use luo::Errno;
use tempfile::TempDir;

use crate::supervise;

/// The reason why a case failed.
type Failure = Box<dyn std::error::Error>;
/// The result of a case.
type Case = Result<(), Failure>;

/// A case that runs under the emulator.
struct Inside {
    what: &'static str,
    run: fn() -> Case,
}

const fn inside(what: &'static str, run: fn() -> Case) -> Inside {
    Inside { what, run }
}

fn all_inside() -> impl Iterator<Item = &'static Inside> {
    device::CASES.iter()
}

/// Cases that make one or more switches.
fn all_crossing() -> impl Iterator<Item = &'static Inside> {
    [files::CROSSING, threads::CROSSING].into_iter().flatten()
}

pub(crate) fn trials(lacks: Option<&str>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for case in all_inside() {
        trials.push(crate::trial(format!("inside: {}", case.what), lacks, || run_inside(case)));
    }
    for case in all_crossing() {
        let name = format!("crossing: {}", case.what);
        trials.push(crate::trial(name, lacks, || run_inside(case)));
        let name = format!("crossing by a directory: {}", case.what);
        trials.push(crate::trial(name, lacks, || run_by_directory(case)));
    }
    for (what, run) in outside::CASES {
        let run = || run().map_err(|failure| Failed::from(failure.to_string()));
        trials.push(crate::trial(format!("outside: {what}"), lacks, run));
    }
    trials
}

fn program(state: Option<&std::path::Path>, case: &Inside) -> std::process::Command {
    let mut command = supervise::command(state, false, supervise::this());
    command.args([crate::CASE, case.what]);
    command
}

fn succeed(command: &mut std::process::Command) -> crate::Outcome {
    let output = command.output()?;
    if output.status.success() { Ok(()) } else { Err(supervise::text(&output).into()) }
}

fn run_inside(case: &Inside) -> crate::Outcome {
    succeed(&mut program(None, case))
}

/// Runs each generation in a separate run with a state directory. Cases with two generations run
/// the second one twice: it makes no switch, so the state in the directory stays the same.
fn run_by_directory(case: &Inside) -> crate::Outcome {
    let directory = TempDir::new()?;
    let state = directory.path().join("state");
    (0..3).try_for_each(|_| succeed(&mut program(Some(&state), case)))
}

/// `--case WHAT`: runs an inside case. Called under the emulator.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let what = arguments.first().and_then(|what| what.to_str()).unwrap_or_default();
    let Some(case) = all_inside().chain(all_crossing()).find(|case| case.what == what) else {
        eprintln!("there is no case `{what}`");
        return ExitCode::from(2);
    };
    end((case.run)())
}

fn end(case: Case) -> ExitCode {
    match case {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// The number of live updates that led to this kernel.
fn kernel_number() -> u64 {
    std::env::var(luo::emulate::NUMBER_VARIABLE).ok().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Errors if the values differ.
#[track_caller]
fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Case {
    let line = std::panic::Location::caller();
    if found == expected {
        return Ok(());
    }
    Err(format!("{line}: found {found:?}, expected {expected:?}").into())
}

/// Errors unless the call failed with this errno.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Errno>, errno: Errno) -> Case {
    let line = std::panic::Location::caller();
    match answer {
        Err(found) if found == errno => Ok(()),
        answer => Err(format!("{line}: the answer is {answer:?}, expected {errno:?}").into()),
    }
}
