//! The emulator as its user sees it: exit statuses, signals, remaining processes, errors.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, test_kill_process};
use tempfile::TempDir;

use super::{Case, same};
use crate::supervise;

type Outside = (&'static str, fn() -> Case);

/// Returns the command that runs a shell script under the emulator.
fn shell(script: &str) -> Command {
    let mut command = supervise::command(None, false, "sh");
    command.args(["-c", script]);
    command
}

fn failed_with(output: &Output, words: &str) -> Case {
    let text = supervise::text(output);
    if output.status.code() == Some(125) && text.contains(words) {
        return Ok(());
    }
    Err(format!("the output should contain `{words}`, it is: {text}").into())
}

pub(super) const CASES: &[Outside] = &[
    ("the exit status is the program's", || {
        for status in [0, 1, 77, 255] {
            same(shell(&format!("exit {status}")).status()?.code(), Some(status))?;
        }
        same(shell("kill -9 $$").status()?.code(), Some(128 + 9))
    }),
    ("signals of other processes go on to the program", || {
        let script = "trap 'exit 7' TERM; echo ready; while true; do read line; done";
        let mut emulator = shell(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = emulator.stdout.take().ok_or("the emulator has no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        same(line.as_str(), "ready\n")?;
        kill_process(Pid::from_child(&emulator), Signal::TERM)?;
        same(emulator.wait()?.code(), Some(7))
    }),
    ("no descendant of the program survives it", || {
        // Children and grandchildren, one of them in another process session (setsid).
        let script = "(sleep 1000 & setsid sleep 1000 & echo $!; wait) & read line; exit 3";
        let mut emulator = shell(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = emulator.stdout.take().ok_or("the emulator has no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let leftover = Pid::from_raw(line.trim().parse()?).ok_or("a process has a number")?;
        // While the pidfd is open, Linux does not reuse the PID.
        let held = pidfd_open(leftover, PidfdFlags::empty())?;
        drop(emulator.stdin.take());
        same(emulator.wait()?.code(), Some(3))?;
        same(test_kill_process(leftover).is_err(), true)?;
        drop(held);
        Ok(())
    }),
    ("a missing program is named in the error", || {
        let output = supervise::command(None, false, "/no/such/program").output()?;
        failed_with(&output, "cannot run /no/such/program")
    }),
    ("an emulator in an emulator is refused in one line", || {
        let mut command = supervise::command(None, false, supervise::this());
        let output = command.args([crate::SUPERVISE, "", "", "true"]).output()?;
        failed_with(&output, "a seccomp filter with a listener is not allowed here")
    }),
    ("a directory with other files is refused and left unchanged", || {
        let directory = TempDir::new()?;
        fs::write(directory.path().join("notes"), "mine")?;
        let output = supervise::command(Some(directory.path()), true, "true").output()?;
        failed_with(&output, "is not a state directory")?;
        same(fs::read_dir(directory.path())?.count(), 1)
    }),
    ("a damaged state is refused and left unchanged", || {
        let directory = TempDir::new()?;
        let run = || supervise::command(Some(directory.path()), true, "true").output();
        same(run()?.status.code(), Some(0))?;
        let index = directory.path().join("state");
        let text = fs::read_to_string(&index)?.replace("number 1", "number 2");
        fs::write(&index, &text)?;
        failed_with(&run()?, "is damaged")?;
        same(fs::read_to_string(&index)?, text)
    }),
    ("a run that does not end in a switch leaves the directory as it was", || {
        let directory = TempDir::new()?;
        let names = || -> Result<Vec<_>, std::io::Error> {
            fs::read_dir(directory.path())?.map(|entry| Ok(entry?.file_name())).collect()
        };
        let run =
            |kexec, program| supervise::command(Some(directory.path()), kexec, program).status();
        run(true, "true")?;
        let mut before = names()?;
        run(false, "true")?;
        run(true, "false")?;
        let mut after = names()?;
        before.sort();
        after.sort();
        same(after, before)?;
        run(true, "true")?;
        same(directory.path().join("tree-2.dtb").exists(), true)
    }),
    ("a state that cannot be written fails the switch", || {
        let directory = TempDir::new()?;
        let state = directory.path().join("state");
        let mut command = supervise::command(Some(&state), true, "rm");
        let output = command.arg("-r").arg(&state).output()?;
        failed_with(&output, "cannot switch to the next kernel: its state cannot be written")
    }),
];
