//! The example client under the emulator: it does what its documentation says.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Output};

use libtest_mimic::{Failed, Trial};
use tempfile::TempDir;

use crate::{Outcome, supervise, trial};

pub(crate) fn trials(lacks: Option<&str>) -> Vec<Trial> {
    vec![
        trial("the example client finds its text after the switch".into(), lacks, both_stages),
        trial("the example client reports a missing session".into(), lacks, no_session),
    ]
}

/// Builds the client and returns its path. `cargo test` builds examples too, but not if the command
/// names the tests to build.
fn client() -> Result<PathBuf, Failed> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--package", "luo", "--example", "client"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()?;
    let deps = supervise::this();
    let profile = deps.parent().and_then(|deps| deps.parent());
    match (built.success(), profile) {
        (true, Some(profile)) => Ok(profile.join("examples/client")),
        _ => Err("cargo cannot build the example".into()),
    }
}

fn says(output: &Output, words: &str) -> Outcome {
    let text = supervise::text(output);
    match text.contains(words) {
        true => Ok(()),
        false => Err(Failed::from(format!("the output does not contain {words:?}: {text}"))),
    }
}

fn both_stages() -> Outcome {
    let client = client()?;
    let mut run = supervise::command(None, false, &client);
    let run = run.args(["save", "--switch", "a text"]).output()?;
    says(&run, "preserved 6 bytes")?;
    says(&run, "retrieved: a text")?;
    // The same in two runs, with a state directory: the first run ends with the switch.
    let directory = TempDir::new()?;
    let state = directory.path().join("state");
    let command = || supervise::command(Some(&state), false, &client);
    says(&command().args(["save", "--switch", "another text"]).output()?, "preserved 12 bytes")?;
    says(&command().arg("load").output()?, "retrieved: another text")
}

fn no_session() -> Outcome {
    let run = supervise::command(None, false, client()?).arg("load").output()?;
    says(&run, "no session was handed over")?;
    match run.status.success() {
        true => Err("the client exits with 0".into()),
        false => Ok(()),
    }
}
