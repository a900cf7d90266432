//! The conformance suite: runs a table of cases against every implementation of LUO.
//!
//! A case (`rows`) uses the operations of `world`, which are built from the calls of `system`. A system
//! is the state machine of the built-in LUO with simulated files (`simulated`); one of its backends,
//! keeper and pool, with real files (`backed`); real processes that use the emulator or Linux
//! (`processes`); or one of these in a QEMU machine, whose switch is a kexec (`machine`). `profile` lists
//! what each system lacks and where it deviates. The results are the table in `docs/conformance.md`
//! (`table`).

mod backed;
mod fds;
mod file;
mod handover;
mod machine;
mod memory;
mod processes;
mod profile;
mod request;
mod rows;
mod run;
mod simulated;
mod subject;
mod system;
mod table;
mod world;

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::times;
use rows::Row;
use run::Verdict;
use subject::{SUBJECTS, Subject};

/// The suite: `main` of `tests/tests/conformance.rs`.
pub fn suite() -> ExitCode {
    let arguments = Arguments::from_args();
    raise_fd_limit();
    let of_subject = |subject: &'static Subject| rows::all().map(move |row| trial(subject, row));
    // The first trial boots the machine with Linux, while other threads run the other subjects.
    let mut trials = vec![Trial::ignorable_test(
        "Linux: what it hands over is read by `perennial luo show`",
        || verdict_of(subject::handover()),
    )];
    trials.extend(SUBJECTS.iter().flat_map(of_subject));
    let start = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        times::record("conformance", "conformance, all cases", start.elapsed());
    }
    if arguments.list || arguments.filter.is_some() || conclusion.has_failed() {
        return conclusion.exit_code();
    }
    table::check().map_or_else(
        |problem| {
            eprintln!("{problem}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// The program in a machine or under an emulator: `main` of `conformance-agent`.
pub fn inside() -> ExitCode {
    raise_fd_limit();
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    match &arguments[..] {
        [role, socket] if role == processes::agent::ROLE => match processes::agent::main(socket) {
            Ok(()) => ExitCode::SUCCESS,
            Err(errno) => {
                eprintln!("agent: {errno}");
                ExitCode::FAILURE
            }
        },
        _ => machine::init::main(),
    }
}

fn trial(subject: &'static Subject, row: &'static Row) -> Trial {
    let Row { number, class, what, .. } = row;
    let name = format!("{}: case {number:03} {what}", subject.name);
    Trial::ignorable_test(name, move || verdict_of(subject.verdict(row)))
        .with_kind(format!("{class:?}"))
}

/// The result of a trial. `Err`: what this computer lacks to run the case.
fn verdict_of(verdict: Result<Verdict, String>) -> Result<Completion, Failed> {
    match verdict {
        Ok(Verdict::Passed | Verdict::Deviates(_)) => Ok(Completion::Completed),
        Ok(Verdict::Lacks(reason)) => Ok(Completion::ignored_with(reason)),
        Ok(Verdict::Failed(failure)) => Err(failure.into()),
        Err(missing) if env::var_os("CI").is_some() => {
            Err(format!("CI must not skip this: {missing}").into())
        }
        Err(missing) => {
            eprintln!("SKIPPED: {missing}");
            Ok(Completion::ignored_with(missing))
        }
    }
}

/// Raises the limit of fds: some cases have thousands of sessions, each with two real fds.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const ENOUGH: u64 = 1 << 16;
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|maximum| maximum.max(ENOUGH));
    // A process that may not raise the hard limit raises the soft limit to it.
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}
