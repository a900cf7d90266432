//! The conformance suite: how a LUO behaves, one case a row, told on every one that there is.
//!
//! A case (`rows`) is a few words of `world`, which are made of the calls of `system`. A system is
//! the state machine of the built-in LUO with files that are simulated (`simulated`); one of its
//! backends, keeper and pool, with real ones (`backed`); real processes that ask the emulator or
//! Linux (`processes`); or one of these in a machine of its own, whose switch is a kexec
//! (`machine`). What a system lacks or does otherwise is written down in `profile`. The results are
//! the table in `docs/conformance.md` (`table`).

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
    // First what boots the machine with Linux: the other subjects have their turn meanwhile.
    let mut trials = vec![Trial::ignorable_test(
        "Linux: what it hands over is read by `perennial luo show`",
        || verdict_of(subject::handover()),
    )];
    trials.extend(SUBJECTS.iter().flat_map(of_subject));
    let start = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        times::record("conformance", "conformance, all of it", start.elapsed());
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

/// What runs in a machine or below an emulator: `main` of `conformance-agent`.
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

/// `Err`: there is none, for want of something on this computer.
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

/// Some cases have thousands of sessions, each of which is two fds where they are real.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const ENOUGH: u64 = 1 << 16;
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|maximum| maximum.max(ENOUGH));
    // Who may not have more has as many as allowed.
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}
