//! Starts the emulator as a separate process.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use luo::emulate::{self, Exit, Options, Program};

/// The exit status of `--supervise` if the program could not be run.
const FAILED: u8 = 125;

/// `--supervise STATE KEXEC PROGRAM ...`. An empty `STATE` means no state directory.
pub(crate) fn main(arguments: &[OsString]) -> ExitCode {
    let [state, kexec, path, rest @ ..] = arguments else { return ExitCode::from(2) };
    let state = (!state.is_empty()).then(|| state.into());
    let options = Options { state, kexec: kexec == "kexec" };
    let program = Program { path: path.clone(), arguments: rest.to_vec() };
    match emulate::run(&program, &options) {
        Ok(Exit::Status(status)) => ExitCode::from(status as u8),
        Ok(Exit::Signal(signal)) => ExitCode::from(128 + signal as u8),
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("{error}");
                cause = error.source();
            }
            ExitCode::from(FAILED)
        }
    }
}

/// Returns the command that runs a program under the emulator.
pub(crate) fn command(state: Option<&Path>, kexec: bool, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(this());
    command.arg(crate::SUPERVISE).arg(state.unwrap_or(Path::new("")));
    command.arg(if kexec { "kexec" } else { "" }).arg(program);
    command
}

/// The path of this program.
pub(crate) fn this() -> std::path::PathBuf {
    env::current_exe().expect("the test was started from a file")
}

/// Returns the reason why programs cannot run under the emulator here, if there is one.
pub(crate) fn missing() -> Option<String> {
    let output = command(None, false, "true").output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(text(&output)),
        Err(error) => Some(error.to_string()),
    }
}

/// The exit status and the output of a program, as text.
pub(crate) fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\n{out}{err}", output.status)
}
