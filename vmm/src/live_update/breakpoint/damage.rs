//! Damage that a host does itself, because it is PID 1 of a machine and the kernel's command line says so:
//!
//! ```text
//!   perennial.fault=take/one:no-memory,save:killed=/dev/vdb
//! ```
//!
//! At each of these steps, once, and only for this VM if one is named. The path is that of the VM's disk, or of a
//! directory to fill. The damage lasts until [`repair`].

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Mutex;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getpid, getrlimit, kill_process, pidfd_open,
    setrlimit,
};

use crate::mutex::lock;

/// What begins the word of the command line.
const PARAMETER: &str = "perennial.fault=";
/// How much more than now the host can map without memory: less than a thread's stack.
const LEFT: u64 = 1 << 20;

/// What was done.
static DONE: Mutex<Vec<Done>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Done {
    /// The word of the command line.
    word: String,
    /// What undoes it, unless that has happened.
    repair: Option<Repair>,
}

#[derive(Debug)]
enum Repair {
    Rename { from: String, to: String },
    Limit(Resource, Rlimit),
    Continue(Pid),
    Free(File),
}

/// Does the damage that the command line names for this step, if it has not been done.
pub(super) fn reach(step: &str, vm: Option<&str>) {
    if getpid().as_raw_pid() != 1 {
        return;
    }
    let text = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for word in faults(&text) {
        let Some(fault) = fault_of(word, step, vm) else { continue };
        let mut done = lock(&DONE);
        if done.iter().all(|done| done.word != word) {
            tracing::warn!("{PARAMETER}{word}");
            let repair = strike(fault).unwrap_or_else(|why| {
                tracing::error!("{PARAMETER}{word}: {why}");
                None
            });
            done.push(Done { word: word.to_owned(), repair });
        }
    }
}

/// Undoes all damage that can be undone.
pub(super) fn repair() {
    for done in lock(&DONE).iter_mut() {
        match done.repair.take() {
            None => {}
            Some(Repair::Rename { from, to }) => drop(fs::rename(from, to)),
            Some(Repair::Limit(resource, limit)) => drop(setrlimit(resource, limit)),
            // It may have been ended meanwhile.
            Some(Repair::Continue(process)) => drop(kill_process(process, Signal::CONT)),
            Some(Repair::Free(filler)) => drop(filler),
        }
    }
}

/// The words of the parameter.
fn faults(cmdline: &str) -> impl Iterator<Item = &str> {
    let values = cmdline.split_whitespace().filter_map(|word| word.strip_prefix(PARAMETER));
    values.flat_map(|value| value.split(','))
}

/// Returns the fault of a word, if the word is for this step and VM.
fn fault_of<'a>(word: &'a str, step: &str, vm: Option<&str>) -> Option<&'a str> {
    let (place, fault) = word.split_once(':')?;
    let is_meant = match place.split_once('/') {
        None => place == step,
        Some((named, only)) => named == step && vm == Some(only),
    };
    is_meant.then_some(fault)
}

/// Does damage. Returns what undoes it, unless nothing can.
fn strike(fault: &str) -> io::Result<Option<Repair>> {
    let (fault, path) = fault.split_once('=').unwrap_or((fault, ""));
    Ok(match fault {
        "hidden" => {
            let (from, to) = (path.to_owned(), format!("{path}.hidden"));
            fs::rename(&from, &to)?;
            Some(Repair::Rename { from: to, to: from })
        }
        "killed" => {
            let process = process_with(Path::new(path))?;
            let pidfd = pidfd_open(process, PidfdFlags::empty())?;
            kill_process(process, Signal::KILL)?;
            // Before it has ended it may still read what the host sends.
            let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut ended, None))?;
            None
        }
        "hangs" => {
            let process = process_with(Path::new(path))?;
            kill_process(process, Signal::STOP)?;
            Some(Repair::Continue(process))
        }
        "no-space" => Some(Repair::Free(fill(Path::new(path))?)),
        "no-memory" => Some(limit(Resource::As, mapped() + LEFT, None)?),
        "no-files" => Some(limit(Resource::Nofile, free_number(), None)?),
        // Leaving, the host has a reserve: half of the files that it may open.
        "few-files" => Some(limit(Resource::Nofile, free_number(), Some(2 * free_number()))?),
        _ => return Err(io::Error::other("there is no such fault")),
    })
}

fn limit(resource: Resource, soft: u64, hard: Option<u64>) -> io::Result<Repair> {
    let before = getrlimit(resource);
    let limit = Rlimit { current: Some(soft), maximum: hard.or(before.maximum) };
    setrlimit(resource, limit)?;
    Ok(Repair::Limit(resource, before))
}

/// Fills the file system of a directory with a file that has no name.
fn fill(directory: &Path) -> io::Result<File> {
    let filler = rustix::fs::open(directory, OFlags::TMPFILE | OFlags::WRONLY, Mode::RUSR)?;
    let (mut end, mut piece) = (0, 1 << 30);
    while piece >= 4096 {
        match fallocate(&filler, FallocateFlags::empty(), end, piece) {
            Ok(()) => end += piece,
            Err(_) => piece /= 2,
        }
    }
    Ok(filler.into())
}

/// Returns the process of the VM whose disk is at `path`: the one that has it open, or else the eldest that has none
/// yet, because the most urgent VM arrives first.
fn process_with(path: &Path) -> io::Result<Pid> {
    let numbers = fs::read_dir("/proc")?.flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_vms = |number: &i32| {
        let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"vmm")
    };
    let mut numbers: Vec<_> = numbers.filter(is_vms).collect();
    numbers.sort_unstable();
    let has = |number: &i32, has: &dyn Fn(&Path) -> bool| {
        let files = fs::read_dir(format!("/proc/{number}/fd")).into_iter().flatten().flatten();
        files.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| has(&target))
    };
    let found = numbers.iter().find(|number| has(number, &|target| target == path));
    let is_disk = |target: &Path| target.to_str().is_some_and(|path| path.starts_with("/dev/vd"));
    let found = found.or_else(|| numbers.iter().find(|number| !has(number, &is_disk)));
    let process = found.and_then(|number| Pid::from_raw(*number));
    process.ok_or_else(|| io::Error::other("the VM has no process"))
}

/// The bytes that this process has mapped.
fn mapped() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size = text.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap_or_default();
    let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

/// The lowest number that no open file has.
fn free_number() -> u64 {
    let fds = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = fds.filter_map(|fd| fd.file_name().to_str()?.parse::<u64>().ok());
    let numbers: BTreeSet<_> = numbers.collect();
    (0..).find(|number| !numbers.contains(number)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_for_one_step_and_for_one_vm_if_it_names_one() {
        let text = "console=ttyS0 perennial.fault=take/one:hidden=/dev/vdb,save:few-files quiet";
        let words: Vec<_> = faults(text).collect();
        assert_eq!(words, ["take/one:hidden=/dev/vdb", "save:few-files"]);
        assert_eq!(fault_of(words[0], "take", Some("one")), Some("hidden=/dev/vdb"));
        assert_eq!(fault_of(words[0], "take", Some("two")), None);
        assert_eq!(fault_of(words[0], "resume", Some("one")), None);
        assert_eq!(fault_of(words[1], "save", None), Some("few-files"));
        assert_eq!(faults("quiet").count(), 0);
    }
}
