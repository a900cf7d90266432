//! Answers of programs that the host runs to ask them something: whether a program succeeds, and the start of its
//! output. Output that no honest program has is cut off in the kernel, so that it takes no memory from the VMs.
//!
//! How a program is run is up to the caller: a next host as it is, because this process becomes that program, and a
//! program that may be anything where it can do no harm ([`crate::confine::trial`]).

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::Timespec;

use crate::signals;

/// Most bytes of the output that are returned, and how many more for each file that the program is asked about.
const MOST_SAID: u64 = 4096;
const SAID_OF_A_FILE: u64 = 256;
/// Most bytes that a program can write. More than any answer has, so that only its start matters.
const MOST_WRITTEN: u64 = 1 << 20;

/// What a program answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether it ended with success.
    pub is_good: bool,
    /// The start of its output.
    pub said: String,
}

/// The output of a program. It is a memfd and not a pipe, so that the program never waits for a reader.
#[derive(Debug)]
pub struct Output(File);

impl Output {
    /// Creates an empty output.
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("said", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        // Of a file that cannot grow, each write beyond the end is an error.
        ftruncate(&file, MOST_WRITTEN)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self(file.into()))
    }

    /// Returns the file for the program to write to.
    pub fn writer(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// Runs `command`, which writes to this output, and returns its answer about so many `files`. `None` if it has not ended
    /// `within` this time: then it is killed.
    pub fn answer_of(
        self,
        command: &mut Command,
        within: Duration,
        files: usize,
    ) -> io::Result<Option<Answer>> {
        signals::unblock_in(command);
        let mut child = command.spawn()?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let ended = pidfd.map_err(io::Error::from).and_then(|pidfd| ends_within(pidfd, within));
        if !matches!(ended, Ok(true)) {
            let _ = child.kill();
            reap(child);
            return ended.map(|_| None);
        }
        let status = child.wait()?;
        let said = self.said(files)?.trim().to_owned();
        Ok(Some(Answer { is_good: status.success(), said }))
    }

    /// Returns the start of what a program wrote that was asked about so many `files`.
    pub fn said(mut self, files: usize) -> io::Result<String> {
        // All descriptors of the file share the position behind the last byte that was written.
        let written = self.0.stream_position()?;
        self.0.rewind()?;
        let mut text = Vec::new();
        let most = MOST_SAID + SAID_OF_A_FILE * files as u64;
        self.0.take(written.min(most)).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Waits for the end of a process. Returns whether it ended `within` this time.
pub fn ends_within(pidfd: impl AsFd, within: Duration) -> io::Result<bool> {
    let within = Timespec::try_from(within).map_err(io::Error::other)?;
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut ended, Some(&within)))? > 0)
}

/// Returns the text with a name in place of each path.
pub fn named<P: AsRef<str>>(text: &str, mut files: Vec<(P, &str)>) -> String {
    // The path of fd 12 begins with that of fd 1.
    files.sort_by_key(|(path, _)| std::cmp::Reverse(path.as_ref().len()));
    files.iter().fold(text.to_owned(), |text, (path, name)| text.replace(path.as_ref(), name))
}

/// Waits beside the caller until a process that was killed has ended. It may be stuck in the kernel, for as long as the server
/// of its file is gone.
fn reap(mut child: Child) {
    let wait = move || {
        signals::leave_to_main_thread();
        let _ = child.wait();
    };
    if let Err(error) = thread::Builder::new().name("reap".to_owned()).spawn(wait) {
        tracing::warn!("a program that was killed is not waited for: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    /// Runs a script. Returns whether it succeeded, and its output.
    fn said_by(script: &str, files: usize) -> (bool, String) {
        let output = Output::new().unwrap();
        let writer = || Stdio::from(output.writer().unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(writer()).stderr(writer());
        let status = command.status().unwrap();
        (status.success(), output.said(files).unwrap())
    }

    #[test]
    fn output_and_errors_are_in_the_order_in_which_they_were_written() {
        let script = "echo; echo one; echo two >&2; echo three; exit 3";
        assert_eq!(said_by(script, 0), (false, "\none\ntwo\nthree\n".to_owned()));
        assert_eq!(said_by(":", 0), (true, String::new()));
    }

    #[test]
    fn only_the_start_of_a_long_output_is_returned() {
        let (_, said) = said_by("yes 123456789 | head -c 100000", 0);
        assert_eq!(said.len() as u64, MOST_SAID);
        let (_, said) = said_by("yes 123456789 | head -c 100000", 3);
        assert_eq!(said.len() as u64, MOST_SAID + 3 * SAID_OF_A_FILE);
    }

    #[test]
    fn a_program_that_writes_without_end_fails_soon() {
        let (good, said) = said_by("yes", 0);
        assert!(!good && said.starts_with("y\ny\n"), "{said}");
    }

    #[test]
    fn the_end_of_a_process_is_waited_for() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        assert!(!ends_within(&pidfd, Duration::ZERO).unwrap());
        child.kill().unwrap();
        assert!(ends_within(&pidfd, Duration::from_secs(1000)).unwrap());
        child.wait().unwrap();
    }

    #[test]
    fn a_path_that_begins_with_another_one_keeps_its_own_name() {
        let files = vec![("/fd/1".to_owned(), "first"), ("/fd/12".to_owned(), "second")];
        assert_eq!(named("/fd/12: bad, /fd/1: good", files), "second: bad, first: good");
    }
}
