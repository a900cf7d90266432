//! A process of this program that confines itself: another subcommand of the same executable, which the host
//! starts as the first process of a PID namespace, and which ends with its [`Process`].

#![expect(
    unsafe_code,
    reason = "rustix counts unshare as unsafe; a test looks between fork and exec"
)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

use crate::answer::ends_within;
use crate::mutex::lock;
use crate::signals;

/// The environment variable by which tests of debug builds have a pool on any file system.
const POOL_WITHOUT_DAX: &str = "PERENNIAL_POOL_WITHOUT_DAX";

/// Whether a pool must be on a file system with DAX, in this process and in those of VMs.
pub fn pools_have_dax() -> bool {
    !cfg!(debug_assertions) || std::env::var_os(POOL_WITHOUT_DAX).is_none()
}

/// How long the host waits for a killed process to end. Only a process that is stuck in the kernel, for
/// example on a disk that does not answer, takes longer.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// How long the thread that has started a process may take to end.
const THREAD_WITHIN: Duration = Duration::from_secs(10);

/// The name under which such processes run: the first of their arguments.
const NAME: &str = "perennial";
/// The running program.
const OWN: &str = "/proc/self/exe";

/// The processes that were killed, and have not ended in time.
static UNENDED: Mutex<Vec<Unended>> = Mutex::new(Vec::new());

/// A process that was killed and has not ended in time.
struct Unended {
    pid: Pid,
    pidfd: OwnedFd,
    holds: &'static str,
}

/// Returns what is to be said of each process that was killed, was waited for in vain, and has not ended since. Each
/// continues the words "this host is still".
pub fn unended() -> Vec<String> {
    let mut unended = lock(&UNENDED);
    unended.retain(|process| !matches!(ends_within(&process.pidfd, Duration::ZERO), Ok(true)));
    let waits = |Unended { pid, holds, .. }: &Unended| {
        format!("waiting for the end of process {pid}, which was killed and keeps {holds} busy")
    };
    unended.iter().map(waits).collect()
}

/// A running process. Dropping this kills the process and waits for its end, so that its files are closed.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    /// Refers to the process even after it was reaped and its pid given to another process.
    pidfd: OwnedFd,
    /// What the process has, for a message.
    holds: &'static str,
}

impl Process {
    /// Starts `perennial COMMAND ARGUMENTS...` with these files, without an environment, and with the log
    /// level of this process as `--log`. The process must end by itself when the other end of `stdin` or
    /// `stdout` closes. `holds` says what the process has, for a message.
    pub fn spawn(
        command: &str,
        arguments: &[String],
        stdin: OwnedFd,
        stdout: Option<OwnedFd>,
        holds: &'static str,
    ) -> io::Result<Self> {
        Self::spawn_from(OWN, command, arguments, stdin, stdout, holds)
    }

    /// The same, from the program at `executable`.
    pub fn spawn_from(
        executable: &str,
        command: &str,
        arguments: &[String],
        stdin: OwnedFd,
        stdout: Option<OwnedFd>,
        holds: &'static str,
    ) -> io::Result<Self> {
        let level = tracing::level_filters::LevelFilter::current().to_string();
        let mut program = Command::new(executable);
        program.arg0(NAME).args([command, "--log", &level]).args(arguments);
        program.stdin(Stdio::from(stdin));
        if let Some(stdout) = stdout {
            program.stdout(Stdio::from(stdout));
        }
        // The environment is for the host only: systemd's sockets, and what the last host left.
        program.env_clear();
        if !pools_have_dax() {
            program.env(POOL_WITHOUT_DAX, "1");
        }
        let pid = Pid::from_child(&spawn_in_pid_namespace(program)?);
        // If this fails, the process need not be killed: it has nothing yet, and ends when its files close.
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        // The kernel spares the host when memory runs out, and a child inherits that.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_pid()), "0");
        Ok(Self { pid, pidfd, holds })
    }

    /// A process that does nothing, for tests.
    #[cfg(test)]
    pub(crate) fn idle() -> Self {
        let pid = Pid::from_child(&Command::new("sleep").arg("600").spawn().unwrap());
        Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap(), holds: "nothing" }
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Kills the process. Dropping this waits for its end.
    pub fn kill(&self) {
        // Errors if the process has ended already. The host's main loop may even have reaped it.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Returns an fd that is readable when the process has ended, also after this value is dropped.
    pub fn end(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Waits for the end of the process. Returns its exit status, `Some(None)` if a signal ended it, and `None` if
    /// it runs on after `within`.
    pub fn wait_for(&self, within: Duration) -> io::Result<Option<Option<i32>>> {
        if !ends_within(&self.pidfd, within)? {
            return Ok(None);
        }
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        Ok(Some(status.and_then(|status| status.exit_status())))
    }
}

/// Starts `command` as the first process of a PID namespace, or in the host's namespace if the host may not make
/// one; the process itself reports that as missing. Its parent is then the main thread of this process.
fn spawn_in_pid_namespace(mut command: Command) -> io::Result<Child> {
    // On a thread of its own, because the namespace becomes that of all later children of the thread, and
    // dies with the first one.
    let spawn = move || {
        // It has blocked what the calling thread has, which waits for it.
        signals::unblock_in(&mut command);
        // SAFETY: only UnshareFlags::FILES is unsafe, and it is not used.
        let _ = unsafe { unshare_unsafe(UnshareFlags::NEWPID) };
        command.spawn().map(|child| (gettid(), child))
    };
    let thread = thread::Builder::new().name("spawn".to_owned()).spawn(spawn)?;
    let panicked = |_| io::Error::other("the thread that starts it panicked");
    let (thread, mut child) = thread.join().map_err(panicked)??;
    if let Err(error) = wait_for_end_of(thread) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}

/// Waits until the kernel has given the children of a thread that was joined to the main thread. A process that
/// asks to be killed with its parent ([`super::end_with_host`]) would otherwise be killed at once.
fn wait_for_end_of(thread: Pid) -> io::Result<()> {
    let path = format!("/proc/self/task/{}", thread.as_raw_pid());
    let deadline = Instant::now() + THREAD_WITHIN;
    while Path::new(&path).exists() {
        if Instant::now() >= deadline {
            return Err(io::Error::other("the thread that starts it does not end"));
        }
        thread::yield_now();
    }
    Ok(())
}

/// Whether this process was started by [`Process::spawn`] with this command. It is then not the host even
/// with the ID 1, which it has in its own namespace.
pub fn was_started_as(command: &str) -> bool {
    // It may have options after the command.
    std::env::args_os().take(2).eq([NAME, command])
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        match ends_within(&self.pidfd, GONE_WITHIN) {
            Ok(false) => {
                let Self { pid, holds, .. } = *self;
                tracing::error!(
                    "process {pid} was killed and does not end: it may keep {holds} busy"
                );
                if let Ok(pidfd) = self.pidfd.try_clone() {
                    lock(&UNENDED).push(Unended { pid, pidfd, holds });
                }
            }
            _ => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_starts_a_process_from_another_thread_takes_no_signal_of_the_main_thread() {
        let thread = thread::spawn(|| {
            signals::leave_to_main_thread();
            let mut command = Command::new("cat");
            command.arg("/proc/self/status").stdout(Stdio::piped());
            // The new process begins with what is blocked in the thread that starts it.
            let look = || match signals::are_blocked() {
                true => Ok(()),
                false => Err(io::ErrorKind::PermissionDenied.into()),
            };
            // SAFETY: this only asks for the mask, which is safe in a signal handler, and allocates nothing.
            unsafe { command.pre_exec(look) };
            let output = spawn_in_pid_namespace(command).unwrap().wait_with_output().unwrap();
            let status = String::from_utf8(output.stdout).unwrap();
            assert!(!signals::are_blocked_in(&status), "{status}");
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_killed_process_is_named_until_it_has_ended() {
        let process = Process::idle();
        let is_named =
            || unended().iter().any(|said| said.contains(&format!("process {},", process.pid())));
        let pidfd = process.pidfd.try_clone().unwrap();
        lock(&UNENDED).push(Unended { pid: process.pid, pidfd, holds: "a VM's memory" });
        assert!(is_named());
        process.kill();
        assert!(ends_within(&process.pidfd, Duration::from_secs(600)).unwrap());
        assert!(!is_named());
    }
}
