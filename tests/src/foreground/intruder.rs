//! A guest that has taken over the process of its VM: a thread of the process makes system calls as the guest's
//! code would. Each must end the process and no other, and be named in the VM's state.

#![expect(unsafe_code, reason = "ptrace(2) has no safe form")]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, pid_t, user_regs_struct};
use serde_json::Value;

use super::init::Problem;

/// The VM that is taken over, and its neighbour.
const VM: &str = "web";
const NEIGHBOUR: &str = "db";
/// Longest time for the host to notice the end of a process.
const WITHIN: Duration = Duration::from_secs(60);

/// An argument of a system call.
enum Argument {
    Number(u64),
    Text(&'static CStr),
    /// The process of the other VM.
    Neighbour,
}
use Argument::{Neighbour, Number, Text};

/// A system call: its thread, its name, its number and its first arguments.
type Attempt = (&'static str, &'static str, c_long, &'static [Argument]);

const HERE: Argument = Number(libc::AT_FDCWD as u64);
const ATTEMPTS: &[Attempt] = &[
    ("main", "openat", libc::SYS_openat, &[HERE, Text(c"/dev/liveupdate"), Number(2)]),
    ("main", "openat", libc::SYS_openat, &[HERE, Text(c"/proc/1/environ"), Number(0)]),
    ("main", "openat", libc::SYS_openat, &[HERE, Text(c"/config.toml"), Number(0)]),
    ("main", "openat", libc::SYS_openat, &[HERE, Text(c"/dev/vda"), Number(1)]),
    ("vcpu0", "openat", libc::SYS_openat, &[HERE, Text(c"/dev/kvm"), Number(2)]),
    ("main", "socket", libc::SYS_socket, &[Number(libc::AF_INET as u64), Number(1), Number(0)]),
    ("main", "connect", libc::SYS_connect, &[Number(0), Text(c"a path"), Number(7)]),
    ("main", "kill", libc::SYS_kill, &[Neighbour, Number(libc::SIGKILL as u64)]),
    ("vcpu0", "tgkill", libc::SYS_tgkill, &[Neighbour, Neighbour, Number(libc::SIGKILL as u64)]),
    ("main", "ptrace", libc::SYS_ptrace, &[Number(libc::PTRACE_ATTACH as u64), Neighbour]),
    ("main", "process_vm_readv", libc::SYS_process_vm_readv, &[Neighbour]),
    ("main", "init_module", libc::SYS_init_module, &[Text(c"module"), Number(6), Text(c"")]),
    ("main", "mount", libc::SYS_mount, &[Text(c"proc"), Text(c"/"), Text(c"proc")]),
    ("main", "execve", libc::SYS_execve, &[Text(c"/perennial")]),
    ("vcpu0", "recvmsg", libc::SYS_recvmsg, &[Number(0)]),
];

/// Makes all attempts. `ctl` runs a command of `perennial ctl` and returns its output.
pub(super) fn try_all(ctl: impl Fn(&[&str]) -> Result<String, Problem>) -> Result<(), Problem> {
    let status = || -> Result<Value, Problem> { Ok(serde_json::from_str(&ctl(&["status"])?)?) };
    let neighbour = process_of(&vm(&status()?, NEIGHBOUR)?)?;
    for (thread, name, number, arguments) in ATTEMPTS {
        let error = |problem: Problem| format!("{name} by {thread}: {problem}");
        let process = process_of(&vm(&status()?, VM)?).map_err(error)?;
        let stopped = Taken::take(thread_of(process, thread)?)
            .and_then(|taken| taken.call(*number, arguments, neighbour));
        stopped.map_err(error)?;
        let deadline = Instant::now() + WITHIN;
        let found = loop {
            let found = status()?;
            if vm(&found, VM)?["state"] != "running" || Instant::now() >= deadline {
                break found;
            }
            thread::sleep(Duration::from_millis(10));
        };
        let why = format!("its thread `{thread}` made the system call {name} ");
        let failed = vm(&found, VM)?;
        if failed["state"] != "failed" || !failed["error"].to_string().contains(&why) {
            return Err(error(format!("the VM is {failed}").into()).into());
        }
        if process_of(&vm(&found, NEIGHBOUR)?).map_err(error)? != neighbour {
            return Err(error("the neighbour has another process".into()).into());
        }
        ctl(&["boot", VM])?;
    }
    Ok(())
}

/// What `status` says of a VM.
fn vm(status: &Value, name: &str) -> Result<Value, Problem> {
    let mut vms = status["vms"].as_array().into_iter().flatten();
    let vm = vms.find(|vm| vm["name"] == name).ok_or("a VM is missing")?;
    match vm["unconfined"].as_array() {
        Some(missing) if !missing.is_empty() => Err(format!("parts are missing: {vm}").into()),
        _ => Ok(vm.clone()),
    }
}

fn process_of(vm: &Value) -> Result<pid_t, Problem> {
    let pid = vm["pid"].as_i64().filter(|_| vm["state"] == "running");
    Ok(pid.ok_or_else(|| format!("it does not run: {vm}"))?.try_into()?)
}

/// The thread of a process that has this name.
fn thread_of(process: pid_t, name: &str) -> Result<pid_t, Problem> {
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("comm"))?.trim_end() == name {
            return Ok(entry.file_name().to_string_lossy().parse()?);
        }
    }
    Err(format!("process {process} has no thread `{name}`").into())
}

/// A thread of a VM's process, stopped behind a `syscall` instruction.
struct Taken(pid_t);

impl Taken {
    fn take(thread: pid_t) -> Result<Self, Problem> {
        let deadline = Instant::now() + WITHIN;
        loop {
            let taken = Self(thread);
            taken.request(libc::PTRACE_ATTACH, 0, 0)?;
            taken.wait_for_stop(libc::SIGSTOP)?;
            // In its long waits it is in a system call.
            let at = taken.registers()?.rip - 2;
            if taken.word(at)?.to_le_bytes()[..2] == [0x0f, 0x05] {
                return Ok(taken);
            }
            taken.request(libc::PTRACE_DETACH, 0, 0)?;
            if Instant::now() >= deadline {
                return Err("it makes no system call".into());
            }
        }
    }

    /// Makes a system call. Errors unless the filter forbids it and ends the process.
    fn call(self, number: c_long, arguments: &[Argument], neighbour: pid_t) -> Result<(), Problem> {
        let mut registers = self.registers()?;
        // Free memory below the stack and its red zone.
        let mut free = (registers.rsp & !15) - 2048;
        let mut words = [0; 6];
        for (word, argument) in words.iter_mut().zip(arguments) {
            *word = match argument {
                Number(number) => *number,
                Neighbour => neighbour as u64,
                Text(text) => {
                    let (at, bytes) = (free, text.to_bytes_with_nul());
                    for piece in bytes.chunks(8) {
                        let mut word = [0; 8];
                        word[..piece.len()].copy_from_slice(piece);
                        self.request(libc::PTRACE_POKEDATA, free, u64::from_le_bytes(word))?;
                        free += 8;
                    }
                    at
                }
            };
        }
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] =
            words;
        registers.rip -= 2;
        registers.rax = number as u64;
        // The system call in which it was stopped is not begun again.
        registers.orig_rax = u64::MAX;
        self.request(libc::PTRACE_SETREGS, 0, (&raw const registers) as u64)?;
        // The step ends with SIGTRAP, in front of the filter's SIGSYS or behind it.
        for _ in 0..2 {
            self.request(libc::PTRACE_SINGLESTEP, 0, 0)?;
            match self.wait()? {
                Stop::By(libc::SIGSYS) => return self.end(),
                Stop::By(libc::SIGTRAP) => {}
                other => return Err(format!("it stopped with {other:?}").into()),
            }
        }
        let result = self.registers()?.rax as i64;
        Err(format!("the filter allows it; the result is {result}").into())
    }

    /// Lets the process handle its SIGSYS, which ends it.
    fn end(self) -> Result<(), Problem> {
        let mut signal = libc::SIGSYS;
        loop {
            self.request(libc::PTRACE_CONT, 0, signal as u64)?;
            match self.wait()? {
                // The host kills it as soon as it has the report.
                Stop::Ended(159) | Stop::Killed => return Ok(()),
                // Of the step.
                Stop::By(libc::SIGTRAP) if signal != 0 => signal = 0,
                other => return Err(format!("it did not end: {other:?}").into()),
            }
        }
    }

    fn registers(&self) -> Result<user_regs_struct, Problem> {
        let mut registers = MaybeUninit::uninit();
        self.request(libc::PTRACE_GETREGS, 0, registers.as_mut_ptr() as u64)?;
        // SAFETY: the request has succeeded, so it has filled the registers.
        Ok(unsafe { registers.assume_init() })
    }

    fn word(&self, address: u64) -> Result<u64, Problem> {
        let mut word = 0u64;
        // The system call, unlike its function in libc, writes the word to the address in `data`.
        self.request(libc::PTRACE_PEEKTEXT, address, (&raw mut word) as u64)?;
        Ok(word)
    }

    fn request(&self, request: u32, address: u64, data: u64) -> Result<(), Problem> {
        // SAFETY: `data` is a number, or the address of a value of the type that the request reads or writes.
        let result =
            unsafe { libc::syscall(libc::SYS_ptrace, u64::from(request), self.0, address, data) };
        match result {
            -1 => Err(io::Error::last_os_error().into()),
            _ => Ok(()),
        }
    }

    fn wait_for_stop(&self, signal: c_int) -> Result<(), Problem> {
        match self.wait()? {
            Stop::By(found) if found == signal => Ok(()),
            other => Err(format!("it stopped with {other:?}, not signal {signal}").into()),
        }
    }

    fn wait(&self) -> Result<Stop, Problem> {
        let mut status = 0;
        // SAFETY: writes the status, and does not touch `null`.
        let result = unsafe { libc::wait4(self.0, &raw mut status, libc::__WALL, ptr::null_mut()) };
        match result {
            -1 => Err(io::Error::last_os_error().into()),
            _ if libc::WIFSTOPPED(status) => Ok(Stop::By(libc::WSTOPSIG(status))),
            _ if libc::WIFEXITED(status) => Ok(Stop::Ended(libc::WEXITSTATUS(status))),
            _ => Ok(Stop::Killed),
        }
    }
}

/// What a wait for a thread reports: that a signal has stopped it, or its end.
#[derive(Debug)]
enum Stop {
    By(c_int),
    Ended(c_int),
    Killed,
}
