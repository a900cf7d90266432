//! What can be said about a VM whose guest has fallen silent: what each thread of the VMM does, and whether the guest
//! goes on after a pause.

use std::fs;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use super::Contender;
use super::guest::Said;
use super::process;

/// From the first look at the threads to the second.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// For the guest's next line after the pause.
const AFTER_A_PAUSE: Duration = Duration::from_secs(30);

/// Prints what the threads of the VMM with this `pid` do, and returns what is said about the silence after `last`.
pub(super) fn explain(
    contender: Contender,
    pid: u32,
    last: Option<&Said>,
    said: &Receiver<(Instant, Said)>,
) -> String {
    let last = last.map_or("nothing".to_owned(), ToString::to_string);
    let pids = process::with_descendants(pid).unwrap_or_default();
    let before = threads(&pids);
    thread::sleep(BETWEEN_LOOKS);
    for (now, then) in threads(&pids).iter().zip(&before) {
        let Thread { name, state, ticks, waits } = now;
        println!(
            "silence: {name}: {state}, {} ticks in 1 s, {waits}",
            ticks - then.ticks.min(*ticks)
        );
    }
    let status = contender.status().unwrap_or_else(|error| error.to_string());
    println!("silence: {}", status.replace(['\r', '\n'], " "));
    let paused = contender.pause().and_then(|()| contender.resume());
    let then = match (paused, said.recv_timeout(AFTER_A_PAUSE)) {
        (Err(error), _) => format!("it cannot be paused: {error}"),
        (Ok(()), Ok((_, line))) => format!("after a pause it says: {line}"),
        (Ok(()), Err(_)) => "it is silent after a pause, too".to_owned(),
    };
    format!("the guest says nothing more after: {last}; {then}")
}

/// A thread, as proc(5) describes it.
struct Thread {
    name: String,
    /// One letter, such as `S` for one that sleeps.
    state: String,
    /// CPU time used, in ticks of the clock.
    ticks: u64,
    /// The function of the kernel in which it waits, and the system call with its arguments.
    waits: String,
}

fn threads(pids: &[u32]) -> Vec<Thread> {
    let tasks = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
    tasks.flatten().flatten().filter_map(|task| thread(&task.path())).collect()
}

fn thread(task: &Path) -> Option<Thread> {
    let read = |file| fs::read_to_string(task.join(file));
    let stat = read("stat").ok()?;
    // proc(5): the id, the name in parentheses, and from the third on the fields without parentheses.
    let (name, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let waits = ["wchan", "syscall"].map(|file| read(file).unwrap_or_default().trim().to_owned());
    Some(Thread {
        name: format!("{name})"),
        state: fields.first()?.to_string(),
        ticks: number(14)? + number(15)?,
        waits: waits.join(" "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_described_by_its_name_state_and_time() {
        let threads = threads(&[std::process::id()]);
        let this = std::thread::current();
        let name: String = this.name().unwrap().chars().take(15).collect();
        let this = threads.iter().find(|thread| thread.name.contains(&name)).unwrap();
        assert_eq!(this.state, "R");
    }
}
