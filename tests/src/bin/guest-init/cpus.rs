//! Takes vCPUs offline and brings them back.

use std::fs;
use std::io;

use perennial_tests::workload::counter::Counter;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

const CPUS: &str = "/sys/devices/system/cpu";

/// Steps of the counter that a vCPU takes when it is back.
const STEPS: u64 = 100_000;

/// Takes a vCPU offline or brings it back. One that is back must run a thread. Returns Linux's list of the vCPUs that
/// are online.
pub(crate) fn set_online(vcpu: &str, online: bool) -> io::Result<String> {
    let number: usize = vcpu.parse().map_err(|_| io::Error::other("not a number"))?;
    fs::write(format!("{CPUS}/cpu{number}/online"), if online { "1" } else { "0" })?;
    if online {
        use_it(number)?;
    }
    Ok(fs::read_to_string(format!("{CPUS}/online"))?.trim_end().to_owned())
}

/// Moves this thread to the vCPU, counts there, and moves back.
fn use_it(number: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(number);
    let before = rustix::thread::sched_getaffinity(None)?;
    sched_setaffinity(None, &only)?;
    let mut counter = Counter::default();
    counter.run(STEPS);
    let ran_on = sched_getcpu();
    sched_setaffinity(None, &before)?;
    match ran_on == number && counter.is_consistent() {
        true => Ok(()),
        false => Err(io::Error::other(format!("vCPU {ran_on} counted to {counter:?}"))),
    }
}
