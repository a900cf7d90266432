//! What the guest does: one load after the other, each for the same time, and then nothing.
//!
//! The guest says each step on its console, in lines that begin with [`SAYS`]. The host takes the time of
//! these lines as well, so that a guest whose clock is wrong is noticed.

use std::fmt;
use std::fs;
use std::io;
use std::thread;

use super::disk::{Access, Load};
use super::network::Exchange;
use super::{Settings, disk, names, network};

/// The start of the lines of the guest.
const SAYS: &str = "side: ";

/// The device file of the guest's disk.
const DISK: &str = "/dev/vda";

/// What the guest says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    /// PID 1 runs.
    Init,
    /// This load begins.
    Begin(String),
    /// The load has ended: its name, how much of it was done, and in how many seconds.
    End(String, f64, f64),
    /// The guest has nothing more to do.
    Idle,
    /// The guest cannot go on.
    Problem(String),
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Init => write!(f, "{SAYS}init"),
            Self::Begin(name) => write!(f, "{SAYS}begin {name}"),
            Self::End(name, done, seconds) => write!(f, "{SAYS}end {name} {done} {seconds}"),
            Self::Idle => write!(f, "{SAYS}idle"),
            Self::Problem(problem) => write!(f, "{SAYS}problem {problem}"),
        }
    }
}

impl Said {
    /// `None` if the guest's PID 1 did not write the line.
    pub(super) fn parse(line: &str) -> Option<Self> {
        // A firmware may have left the cursor where it was.
        let line = &line[line.find(SAYS)? + SAYS.len()..];
        let (first, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        match first {
            "init" => Some(Self::Init),
            "begin" => Some(Self::Begin(rest.to_owned())),
            "end" => {
                let mut words = rest.split(' ');
                let name = words.next()?.to_owned();
                Some(Self::End(name, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
            }
            "idle" => Some(Self::Idle),
            "problem" => Some(Self::Problem(rest.to_owned())),
            _ => None,
        }
    }
}

/// The loads of the disk: name, and what each of them is.
const DISK_LOADS: [(&str, Load); 6] = [
    (names::RANDOM_READ, Load::random(Access::Read, 1)),
    (names::RANDOM_WRITE, Load::random(Access::Write, 1)),
    (names::RANDOM_READ_32, Load::random(Access::Read, 32)),
    (names::RANDOM_WRITE_32, Load::random(Access::Write, 32)),
    (names::READ, Load::sequential(Access::Read)),
    (names::WRITE, Load::sequential(Access::Write)),
];

const NETWORK_LOADS: [(&str, Exchange); 3] = [
    (names::STREAM_OUT, Exchange::Out),
    (names::STREAM_IN, Exchange::In),
    (names::REQUESTS, Exchange::Requests),
];

/// Does all loads, and then sleeps until the VM ends.
pub(super) fn run(settings: Settings) -> ! {
    println!("{}", Said::Init);
    // Only emergency messages go to the console.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    let last = match work(settings) {
        Ok(()) => Said::Idle,
        Err(error) => Said::Problem(error.to_string()),
    };
    println!("{last}");
    loop {
        thread::park();
    }
}

fn work(settings: Settings) -> io::Result<()> {
    for (name, load) in DISK_LOADS {
        step(name, || disk::load(DISK, &load, settings.load))?;
    }
    for (name, exchange) in NETWORK_LOADS {
        // Before the load begins: the first connection of a guest waits for more than the VMM.
        let stream = network::connect()?;
        step(name, || network::exchange(stream, exchange, settings.load))?;
    }
    Ok(())
}

fn step(name: &str, load: impl FnOnce() -> io::Result<Done>) -> io::Result<()> {
    println!("{}", Said::Begin(name.to_owned()));
    let Done { amount, seconds } =
        load().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
    println!("{}", Said::End(name.to_owned(), amount, seconds));
    Ok(())
}

/// How much of a load was done, in requests or bytes, and in what time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) amount: f64,
    pub(super) seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_understood_behind_what_a_firmware_leaves_on_the_line() {
        for said in [
            Said::Init,
            Said::Begin("read".into()),
            Said::End("read".into(), 12345.0, 1.5),
            Said::Idle,
            Said::Problem("read: no such device".into()),
        ] {
            assert_eq!(Said::parse(&format!("\x1b[2J{said}\r")), Some(said));
        }
        assert_eq!(Said::parse("Linux version 7.3"), None);
        assert_eq!(Said::parse("side: end read 1"), None);
    }
}
