//! What the end-to-end suites have in common: their tests run on hosts with the kernel's LUO and on hosts
//! with a pool, say why they were skipped if they were, and how long they took.
//!
//! `PERENNIAL_LUO` (`kernel` or `pool`) leaves only the tests of those hosts.

use std::cell::RefCell;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::host::Failure;
use crate::kernels::{self, Role};
use crate::plan::Luo;
use crate::qemu::{self, Qemu};
use crate::times;

/// A test: what it is called, on which hosts it runs, and what it does.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    name: &'static str,
    on: &'static [Luo],
    run: fn(Luo) -> Result<(), Failure>,
    lacks: fn() -> Option<String>,
}

impl Test {
    /// The same test, skipped with the reason that `lacks` returns, if it returns one.
    pub const fn unless(self, lacks: fn() -> Option<String>) -> Self {
        Self { lacks, ..self }
    }
}

/// For tests that need nothing beyond a host with guests: there is no reason to skip them.
const fn nothing() -> Option<String> {
    None
}

/// A test for every kind of host.
pub const fn both(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &Luo::ALL, run, lacks: nothing }
}

/// A test for hosts with the kernel's LUO: it is about that LUO, or does not depend on which LUO it is.
pub const fn kernel(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &[Luo::Kernel], run, lacks: nothing }
}

/// A test for hosts with a pool.
pub const fn pool(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &[Luo::Pool], run, lacks: nothing }
}

/// Tests that belong together: a file in `tests/tests/suites`.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// What the names of its tests begin with.
    pub name: &'static str,
    /// Its tests.
    pub tests: &'static [Test],
}

/// Runs suites, as many tests at a time as there may be machines.
pub fn run(suites: &[Suite]) -> ExitCode {
    let wanted = match env::var("PERENNIAL_LUO").as_deref() {
        Err(_) => &Luo::ALL[..],
        Ok("kernel") => &[Luo::Kernel],
        Ok("pool") => &[Luo::Pool],
        Ok(other) => {
            eprintln!("PERENNIAL_LUO is `{other}`, neither `kernel` nor `pool`");
            return ExitCode::FAILURE;
        }
    };
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(qemu::machines_at_a_time());
    let trials = suites.iter().flat_map(|suite| {
        let on = move |test: &Test| wanted.iter().filter(|luo| test.on.contains(luo)).copied();
        suite.tests.iter().flat_map(move |test| on(test).map(move |luo| trial(suite, luo, *test)))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if !arguments.list {
        times::print();
    }
    conclusion.exit_code()
}

fn trial(suite: &Suite, luo: Luo, test: Test) -> Trial {
    let suite = suite.name;
    let name = format!("{suite}::{}::{}", luo.backend(), test.name);
    let place = name.clone();
    Trial::ignorable_test(name, move || {
        let start = Instant::now();
        let result = run_one(luo, test);
        times::record(suite, &place, start.elapsed());
        result
    })
}

fn run_one(luo: Luo, test: Test) -> Result<Completion, Failed> {
    match missing(luo, Role::Guest).or_else(test.lacks) {
        None => explained(|| (test.run)(luo)),
        Some(reason) if env::var_os("CI").is_some() => {
            Err(format!("CI must not skip this: {reason}").into())
        }
        Some(reason) => {
            eprintln!("SKIPPED: {reason}");
            Ok(Completion::ignored_with(reason))
        }
    }
}

thread_local! {
    /// What is known about the failure of the test that this thread runs; `None` while it runs none.
    static EXPLANATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Says more about why the test on this thread fails. Outside a test it is printed.
pub fn explain(text: String) {
    EXPLANATION.with_borrow_mut(|explanation| match explanation {
        Some(before) => *before = format!("{before}\n{text}"),
        None => eprintln!("{text}"),
    });
}

/// Runs a test. Its failure, also that of an assertion, comes with all that is known about it.
fn explained(test: impl FnOnce() -> Result<(), Failure>) -> Result<Completion, Failed> {
    EXPLANATION.set(Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(test));
    let explanation = EXPLANATION.take().unwrap_or_default();
    let failure = match result {
        Ok(Ok(())) => return Ok(Completion::Completed),
        Ok(Err(failure)) => failure.to_string(),
        Err(panic) => match panic.downcast_ref::<String>() {
            Some(words) => words.clone(),
            None => panic.downcast_ref::<&str>().copied().unwrap_or("it panicked").to_owned(),
        },
    };
    Err(format!("{failure}\n{explanation}").trim_end().into())
}

/// What this machine lacks to boot a host with guests of this kernel, if anything.
pub fn missing(luo: Luo, guest: Role) -> Option<String> {
    if !Qemu::is_installed() {
        return Some("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)".into());
    }
    let mke2fs = Command::new("mke2fs").arg("-V").stderr(Stdio::null()).status();
    if mke2fs.is_err() {
        return Some("mke2fs is not installed (Debian: e2fsprogs)".into());
    }
    luo.hosts()
        .into_iter()
        .chain([guest])
        .find_map(|role| kernels::find(role).err().map(|error| error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_comes_with_what_was_found_out_about_it() {
        let message = |test: fn() -> Result<(), Failure>| {
            explained(test).err().and_then(|failed| failed.message().map(str::to_owned))
        };
        let failed = message(|| {
            explain("vCPU 0 spins".to_owned());
            Err("no heartbeat".into())
        });
        assert_eq!(failed.as_deref(), Some("no heartbeat\n\nvCPU 0 spins"));
        let failed = message(|| {
            explain("the host does not answer".to_owned());
            panic!("{} heartbeats", 0)
        });
        assert_eq!(failed.as_deref(), Some("0 heartbeats\n\nthe host does not answer"));
        assert_eq!(message(|| Ok(())), None);
    }
}
