//! Runs a program that may be anything, to see what it answers, where it can do no harm: as the second process of a
//! PID namespace, as a user that nothing else runs as, without network, capabilities and new privileges, in a mount
//! namespace of its own, and only for a while. It is not the first process there, because a host's program would take
//! itself for the first process of a machine.
//!
//! ```text
//!   this process ── `perennial try` (first process of the namespace) ── the program
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};

use super::process::Process;
use super::{Record, namespaces, privileges, was_started_as};
use crate::answer::{Answer, Output, named};

/// The subcommand of the process around the program.
const COMMAND: &str = "try";
/// The option with the number of files.
const FILES: &str = "--files=";
/// A user that owns no file and runs nothing else here.
const NOBODY: u32 = 65534;
/// Exit status of the process around the program if it could not start the program.
const NOT_TRIED: i32 = 125;

/// A program gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrialError {
    /// The program cannot be confined or started: nothing is known about it.
    #[error("it cannot be tried here: {0}")]
    NotTried(String),
    /// The program ran for too long.
    #[error("it did not answer within {} s", .0.as_secs())]
    Silent(Duration),
}

impl From<io::Error> for TrialError {
    fn from(error: io::Error) -> Self {
        Self::NotTried(error.to_string())
    }
}

/// Runs `program` with `arguments` and then the paths of `files`, which have these names in its answer. Kills it after
/// `within`. Needs root.
pub fn run(
    program: BorrowedFd<'_>,
    arguments: &[&str],
    files: &[(&str, BorrowedFd<'_>)],
    within: Duration,
) -> Result<Answer, TrialError> {
    let own = std::process::id();
    let path = |fd: &BorrowedFd<'_>| format!("/proc/{own}/fd/{}", fd.as_raw_fd());
    let mut words = vec![format!("{FILES}{}", files.len()), path(&program)];
    words.extend(files.iter().map(|(_, fd)| path(fd)));
    words.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let (nothing, output) = (File::open("/dev/null")?, Output::new()?);
    let holds = "nothing that matters";
    let process = Process::spawn(COMMAND, &words, nothing.into(), Some(output.writer()?), holds)?;
    let status = process.wait_for(within)?.ok_or(TrialError::Silent(within))?;
    drop(process);
    let text = output.said(files.len())?;
    // The process around the program has written the paths before it started the program.
    let (paths, said) = text.split_once('\n').unwrap_or((&text, ""));
    match status {
        Some(NOT_TRIED) => Err(TrialError::NotTried(text.trim().to_owned())),
        status => {
            let names = files.iter().map(|(name, _)| *name);
            let files: Vec<_> = paths.split(' ').map(str::to_owned).zip(names).collect();
            Ok(Answer { is_good: status == Some(0), said: named(said.trim(), files) })
        }
    }
}

/// Whether this process is the one around the program.
pub fn is_trial() -> bool {
    was_started_as(COMMAND)
}

/// The process around the program: confines itself and runs the program. `words` are the arguments of this process
/// after its command. Returns the exit status.
pub fn surround(words: impl IntoIterator<Item = OsString>) -> u8 {
    match confine_and_run(&words.into_iter().collect::<Vec<_>>()) {
        Ok(status) => status,
        Err(why) => {
            println!("{why}");
            NOT_TRIED as u8
        }
    }
}

fn confine_and_run(words: &[OsString]) -> Result<u8, String> {
    let [_log, _level, count, program, words @ ..] = words else {
        return Err("`try` is started by the host".to_owned());
    };
    let count = count.to_str().and_then(|count| count.strip_prefix(FILES)?.parse().ok());
    let count = count.filter(|count| *count <= words.len());
    let Some(count) = count else { return Err("`try` is started by the host".to_owned()) };
    let (files, words) = words.split_at(count);
    let open = |path: &OsString| {
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        fcntl_setfd(&file, FdFlags::empty()).map_err(|errno| errno.to_string())?;
        Ok::<File, String>(file)
    };
    let program = open(program)?;
    let files = files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let mut record = Record::default();
    privileges::limit_resources(&mut record);
    namespaces::enter_all_but_user_with_root(&mut record);
    privileges::change_user(NOBODY, &mut record);
    privileges::drop_capabilities(&mut record);
    if let Some(missing) = record.0.first() {
        return Err(missing.to_string());
    }
    let path = |file: &File| format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    println!("{}", files.iter().map(path).collect::<Vec<_>>().join(" "));
    let output = || io::stdout().as_fd().try_clone_to_owned().map(Stdio::from);
    let status = (|| {
        Command::new(path(&program))
            .args(words)
            .args(files.iter().map(path))
            .stdin(Stdio::null())
            .stdout(output()?)
            .stderr(output()?)
            .status()
    })();
    match status {
        Ok(status) => Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            println!("it cannot be executed: {error}");
            Ok(1)
        }
    }
}
