//! Runs the end-to-end suites: each test on hosts with the kernel's LUO, on hosts with a pool, or on
//! both. Reports the reason of each skip, and how long the tests took.
//!
//! `PERENNIAL_LUO` (`kernel` or `pool`) selects the tests on one kind of host.

use std::cell::RefCell;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::host::Failure;
use crate::kernels::{self, Role};
use crate::plan::Luo;
use crate::qemu::{self, Accelerator, Qemu};
use crate::times;

/// A test: its name, the kinds of host it runs on, its function, and what may be a reason to skip it.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    name: &'static str,
    /// Where it runs every time, and where only in `make test-guests`.
    on: &'static [Luo],
    seldom_on: &'static [Luo],
    run: fn(Luo) -> Result<(), Failure>,
    lacks: fn() -> Option<String>,
}

impl Test {
    /// The same test, which is skipped if `lacks` returns a reason.
    pub const fn unless(self, lacks: fn() -> Option<String>) -> Self {
        Self { lacks, ..self }
    }
}

/// For tests that need nothing beyond a host with guests: returns no reason to skip.
const fn nothing() -> Option<String> {
    None
}

/// A test for every kind of host.
pub const fn both(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &Luo::ALL, seldom_on: &[], run, lacks: nothing }
}

/// A test for every kind of host that takes too long to run on both each time: with a pool it runs in `make test-guests`.
pub const fn seldom_on_pool(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &[Luo::Kernel], seldom_on: &[Luo::Pool], run, lacks: nothing }
}

/// A test for hosts with the kernel's LUO: it tests that LUO, or does not depend on the backend.
pub const fn kernel(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &[Luo::Kernel], seldom_on: &[], run, lacks: nothing }
}

/// A test for hosts with a pool.
pub const fn pool(name: &'static str, run: fn(Luo) -> Result<(), Failure>) -> Test {
    Test { name, on: &[Luo::Pool], seldom_on: &[], run, lacks: nothing }
}

/// Tests that belong together: a file in `tests/tests/suites`.
#[derive(Debug, Clone, Copy)]
pub struct Suite {
    /// What the names of its tests begin with.
    pub name: &'static str,
    /// Its tests.
    pub tests: &'static [Test],
}

/// The suite of what takes too long for every run.
pub const GUESTS: &str = "guests";

/// Runs suites, with as many tests in parallel as machines may run ([`qemu::machines_at_a_time`]). `all` runs the tests also
/// where they run seldom, as a part of the suite [`GUESTS`].
pub fn run(suites: &[Suite], all: bool) -> ExitCode {
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
    let trials = |suite: &'static str, test: Test, on: &'static [Luo]| {
        let on = on.iter().filter(|luo| wanted.contains(luo));
        on.map(move |luo| trial(suite, *luo, test))
    };
    let tests =
        || suites.iter().flat_map(|suite| suite.tests.iter().map(|test| (suite.name, *test)));
    let seldom = tests().filter(|_| all).flat_map(|(_, test)| trials(GUESTS, test, test.seldom_on));
    let always = tests().flat_map(|(suite, test)| trials(suite, test, test.on));
    let conclusion = libtest_mimic::run(&arguments, always.chain(seldom).collect());
    if !arguments.list {
        times::print();
    }
    conclusion.exit_code()
}

fn trial(suite: &'static str, luo: Luo, test: Test) -> Trial {
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
        None => explained(|| (test.run)(luo)).or_else(|failed| {
            let message = failed.message().unwrap_or_default();
            match qemu::accelerator() == Accelerator::Tcg && shows_doubled_interrupt(message) {
                true => {
                    eprintln!(
                        "REPEATED: QEMU delivered an interrupt twice (docs/emulation.md): {message}"
                    );
                    explained(|| (test.run)(luo))
                }
                false => Err(failed),
            }
        }),
        Some(reason) if env::var_os("CI").is_some() => {
            Err(format!("CI must not skip this: {reason}").into())
        }
        Some(reason) => {
            eprintln!("SKIPPED: {reason}");
            Ok(Completion::ignored_with(reason))
        }
    }
}

/// Whether a diagnosis shows the fault of QEMU's emulation by which a guest gets one interrupt twice: it spins with
/// interrupts off on a lock that it holds itself, with two frames of the timer's interrupt on its stack.
fn shows_doubled_interrupt(message: &str) -> bool {
    message.split("--- guest ").skip(1).any(|guest| {
        let interrupts = guest.lines().filter(|line| line.trim().starts_with("hrtimer_interrupt+"));
        let spins = |line: &str| {
            line.contains("native_queued_spin_lock_slowpath+") && line.contains("interrupts off")
        };
        interrupts.count() >= 2 && guest.lines().any(spins)
    })
}

thread_local! {
    /// Explanations of a failure of the test on this thread; `None` while no test runs on it.
    static EXPLANATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Adds an explanation to the failure of the test on this thread. Without a test, prints it.
pub fn explain(text: String) {
    EXPLANATION.with_borrow_mut(|explanation| match explanation {
        Some(before) => *before = format!("{before}\n{text}"),
        None => eprintln!("{text}"),
    });
}

/// Runs a test. Its failure, by an error or a panic, includes the texts given to [`explain`].
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

/// What this computer lacks to boot a host with guests of this kernel. `None` if nothing is missing.
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
    fn only_a_lock_under_two_frames_of_the_timers_interrupt_is_taken_for_the_emulators_fault() {
        let frames = |frames: &[&str], end: &str| {
            let frames: String = frames.iter().map(|frame| format!("    {frame}\n")).collect();
            shows_doubled_interrupt(&format!(
                "no progress\n--- guest web; the test waited:\nvCPU 0:\n{frames}guest web: vCPU 0 {end}"
            ))
        };
        let timer = "hrtimer_interrupt+0x58";
        let lock = "spins with interrupts off at native_queued_spin_lock_slowpath+0x5b";
        assert!(frames(&[timer, "rb_erase+0x1bf", timer], lock));
        let at =
            "then: runnable, native_queued_spin_lock_slowpath+0x5b, RFLAGS 0x2 (interrupts off)";
        assert!(frames(&[timer, timer], at));
        assert!(!frames(&[timer, "rb_erase+0x1bf"], lock));
        assert!(!frames(&[timer, timer], "spins with interrupts on at delay_tsc+0x30"));
        assert!(!shows_doubled_interrupt("guest web: the host says that it is failed"));
    }

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
