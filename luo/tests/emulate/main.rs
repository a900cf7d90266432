//! The emulated `/dev/liveupdate`, with real processes.
//!
//! This program is three: the tests; with `--supervise`, the emulator, which takes over a process
//! of its own as `perennial luo emulate` does; and what runs below it, one of [`cases`]. Two sets of tests:
//! what only real processes can show, and Linux's own selftests, unmodified. The conformance table is
//! told below the emulator, too, where it is told on all others: in the project's `tests`.

mod cases;
mod example;
mod selftests;
mod supervise;

use std::env;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// How the roles of this program are told from each other.
const SUPERVISE: &str = "--supervise";
const CASE: &str = "--case";

/// What a test comes to.
type Outcome = Result<(), Failed>;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let (role, rest) = match arguments.split_first() {
        Some((role, rest)) => (role.to_str().unwrap_or_default(), rest),
        None => ("", &[][..]),
    };
    match role {
        SUPERVISE => supervise::main(rest),
        CASE => cases::main(rest),
        _ => tests(),
    }
}

fn tests() -> ExitCode {
    let arguments = Arguments::from_args();
    let lacks = if arguments.list { None } else { supervise::missing() };
    let mut trials = Vec::new();
    trials.extend(cases::trials(lacks.as_deref()));
    trials.extend(example::trials(lacks.as_deref()));
    trials.extend(selftests::trials(lacks.as_deref()));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test that is skipped, visibly, if something is missing; in CI that is a failure.
fn trial(
    name: String,
    lacks: Option<&str>,
    run: impl FnOnce() -> Outcome + Send + 'static,
) -> Trial {
    let lacks = lacks.map(str::to_owned);
    Trial::ignorable_test(name, move || match lacks {
        None => run().map(|()| Completion::Completed),
        Some(reason) => skip(&reason),
    })
}

fn skip(reason: &str) -> Result<Completion, Failed> {
    if env::var_os("CI").is_some() {
        return Err(format!("CI must not skip this: {reason}").into());
    }
    eprintln!("SKIPPED: {reason}");
    Ok(Completion::ignored_with(reason))
}
