//! Tests of the emulated `/dev/liveupdate` with real processes.
//!
//! This program has three roles: without arguments it runs the tests; with `--supervise` it is the
//! emulator, like `perennial luo emulate`; with `--case` it is the program under the emulator, and
//! runs one of [`cases`]. The tests are: cases that need real processes, the example client, and
//! Linux's own selftests, unmodified. The conformance cases run under the emulator too, in the
//! project's `tests`.

mod cases;
mod example;
mod selftests;
mod supervise;

use std::env;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// The first argument that selects a role of this program.
const SUPERVISE: &str = "--supervise";
const CASE: &str = "--case";

/// The result of a test.
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

/// Makes a test. If `lacks` gives a missing requirement, the test is skipped with that reason; with
/// `CI` set it fails.
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
