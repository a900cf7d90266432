//! What every end-to-end suite has in common: it runs its tests one after another, and says why it
//! skipped them if it did.

use std::env;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::host::Failure;
use crate::kernels;
use crate::plan::Luo;
use crate::qemu::Qemu;

/// A test and its name.
pub type Test = (&'static str, fn() -> Result<(), Failure>);

/// Runs a suite: `main` of a file in `tests/tests`.
pub fn run(tests: &[Test]) -> ExitCode {
    run_on(Luo::Kernel, tests)
}

/// Runs a suite whose hosts have this LUO.
pub fn run_on(luo: Luo, tests: &[Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One machine at a time anyway, and the lines of several would be hard to tell apart.
    arguments.test_threads.get_or_insert(1);
    let trials = tests
        .iter()
        .map(|&(name, test)| Trial::ignorable_test(name, move || run_one(luo, test)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run_one(luo: Luo, test: fn() -> Result<(), Failure>) -> Result<Completion, Failed> {
    match missing(luo) {
        None => test().map(|()| Completion::Completed).map_err(|e| Failed::from(e.to_string())),
        Some(reason) if env::var_os("CI").is_some() => {
            Err(format!("CI must not skip this: {reason}").into())
        }
        Some(reason) => {
            eprintln!("SKIPPED: {reason}");
            Ok(Completion::ignored_with(reason))
        }
    }
}

/// What this machine lacks to boot a host, if anything.
pub fn missing(luo: Luo) -> Option<String> {
    if !Qemu::is_installed() {
        return Some("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)".into());
    }
    let mke2fs = Command::new("mke2fs").arg("-V").stderr(Stdio::null()).status();
    if mke2fs.is_err() {
        return Some("mke2fs is not installed (Debian: e2fsprogs)".into());
    }
    luo.hosts()
        .into_iter()
        .chain([luo.guest()])
        .find_map(|role| kernels::find(role).err().map(|error| error.to_string()))
}
