//! Linux's own tests of its Live Update Orchestrator, unmodified, under the emulator.
//!
//! `resources/kernel/selftests.sh` builds the tests from the source package of the project's
//! kernels; `PERENNIAL_SELFTESTS` may name a directory with built tests instead. If there are no
//! built tests, the tests are skipped with the reason; in CI that is a failure.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use libtest_mimic::{Completion, Failed, Trial};
use tempfile::TempDir;

use crate::{Outcome, skip, supervise};

/// Tests with two stages, one before and one after the switch.
const STAGED: [&str; 4] =
    ["luo_kexec_simple", "luo_multi_session", "luo_stress_files", "luo_stress_sessions"];

pub(crate) fn trials(lacks: Option<&str>) -> Vec<Trial> {
    let trial = |name: &'static str, run: fn(&Path) -> Outcome| {
        let lacks = lacks.map(str::to_owned);
        Trial::ignorable_test(format!("Linux's selftest {name}"), move || {
            let directory = lacks.map_or_else(directory, Err);
            match directory {
                Ok(directory) => run(&directory.join(name)).map(|()| Completion::Completed),
                Err(reason) => skip(&reason),
            }
        })
    };
    let mut trials = vec![trial("liveupdate", in_one_go)];
    trials.extend(STAGED.map(|name| trial(name, in_two_stages)));
    trials
}

/// Returns the directory with the built tests, or the reason why there is none.
fn directory() -> Result<PathBuf, String> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DIRECTORY.get_or_init(find).clone()
}

fn find() -> Result<PathBuf, String> {
    if let Some(directory) = env::var_os("PERENNIAL_SELFTESTS") {
        return Ok(directory.into());
    }
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/kernel/selftests.sh");
    let output = Command::new(&recipe).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("{}: {error}", recipe.display()))?;
    if !output.status.success() {
        return Err(format!("{} could not build Linux's selftests", recipe.display()));
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    stdout
        .lines()
        .last()
        .map(PathBuf::from)
        .ok_or_else(|| "selftests.sh printed no directory".to_owned())
}

fn passed(output: &Output, words: &str) -> Outcome {
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.success() && said.contains(words) {
        return Ok(());
    }
    Err(Failed::from(supervise::text(output)))
}

fn in_one_go(test: &Path) -> Outcome {
    let output = supervise::command(None, false, test).output()?;
    passed(&output, "# PASSED: 15 / 15 tests passed.")?;
    // No test was skipped.
    passed(&output, "# Totals: pass:15 fail:0 xfail:0 xpass:0 skip:0 error:0")
}

/// The first stage leaves a daemon that holds the sessions until the switch ends it.
fn in_two_stages(test: &Path) -> Outcome {
    let directory = TempDir::new()?;
    let state = directory.path().join("state");
    let first = supervise::command(Some(&state), true, test).args(["-s", "1"]).output()?;
    passed(&first, "[STAGE 1]")?;
    let second = supervise::command(Some(&state), false, test).args(["-s", "2"]).output()?;
    passed(&second, "TEST PASSED")
}
