//! PID 1 of the machine: runs the guest in each VMM in turn, and measures.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};

use super::guest::Said;
use super::{Contender, DISK_MIB, GUEST_MIB, Measured, Settings, names, network, process, silence};
use crate::tap;

pub(super) type Problem = Box<dyn std::error::Error>;

/// The disk's directory and file. In memory, so that only the VMMs differ.
const DISK_DIRECTORY: &str = "/data";
pub(super) const DISK: &str = "/data/disk.img";

/// Longest time to the guest's next line, without that of the load.
const LINE_WITHIN: Duration = Duration::from_secs(120);
/// From the guest's last line, or from the pause, until CPU time is counted.
const SETTLING: Duration = Duration::from_millis(500);
/// How far the guest's time of all loads may be from the host's: a share of it, and seconds for the way of the
/// lines, which takes long on a busy computer.
const CLOCKS_WITHIN: f64 = 0.25;
const LINES_WITHIN: f64 = 1.0;

/// Longest time of all rounds.
pub(super) fn longest(settings: Settings) -> Duration {
    let vms = (settings.rounds * Contender::ALL.len()) as u32;
    let each = settings.load * names::ALL.len() as u32 + settings.idle * 2 + LINE_WITHIN;
    LINE_WITHIN * 3 + each * vms
}

/// Runs all rounds, and passes on the results of each VM.
pub(super) fn run(
    settings: Settings,
    report: impl Fn(&Measured) -> Result<(), Problem>,
) -> Result<(), Problem> {
    prepare()?;
    // The first start of a program reads it from the initramfs for the first time, and so on.
    let warm = Settings { load: Duration::from_millis(50), idle: Duration::ZERO, ..settings };
    for contender in Contender::ALL {
        measure(contender, &warm).map_err(|error| format!("{contender:?}: {error}"))?;
    }
    for round in 0..settings.rounds {
        let mut order = Contender::ALL;
        order.rotate_left(round % Contender::ALL.len());
        for contender in order {
            let values = measure(contender, &settings)
                .map_err(|error| format!("{contender:?}, round {round}: {error}"))?;
            report(&Measured { round, contender, values })?;
        }
    }
    Ok(())
}

/// Mounts what is missing, and makes the disk and the tap.
fn prepare() -> Result<(), Problem> {
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
    mount("tmpfs", DISK_DIRECTORY, "tmpfs", MountFlags::empty(), c"size=50%")?;
    fs::write("/proc/sys/kernel/printk", "1")?;
    let mut disk = File::create(DISK)?;
    // Not zeroes, and no holes: every page of the disk exists.
    let piece = vec![0xa5; 1 << 20];
    for _ in 0..DISK_MIB {
        disk.write_all(&piece)?;
    }
    tap::keep(&tap::open(network::TAP)?)?;
    tap::set_address(network::TAP, network::HOST, network::MASK)?;
    Ok(network::serve()?)
}

/// Runs the guest once.
fn measure(contender: Contender, settings: &Settings) -> Result<BTreeMap<String, f64>, Problem> {
    let started = Instant::now();
    let mut child = contender.command(settings).spawn()?;
    let said = listen(child.stdout.take().ok_or("no output")?);
    let measured = follow(contender, settings, started, &child, &said);
    // Both VMMs end at once at this signal.
    let ended = kill_process(Pid::from_child(&child), Signal::TERM).map_err(Problem::from);
    let ended = ended.and_then(|()| Ok(wait(&mut child)?));
    let measured = measured?;
    ended?;
    Ok(measured)
}

fn wait(child: &mut Child) -> Result<(), std::io::Error> {
    child.wait().map(drop)
}

/// What the guest says, with the time. Lines of others are passed on to the machine's console.
fn listen(output: ChildStdout) -> Receiver<(Instant, Said)> {
    let (sender, said) = channel();
    thread::spawn(move || {
        // Firmware may send bytes that are no text.
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            match Said::parse(&line) {
                Some(said) => {
                    if sender.send((Instant::now(), said)).is_err() {
                        return;
                    }
                }
                None => println!("guest: {}", line.trim_end()),
            }
        }
    });
    said
}

fn follow(
    contender: Contender,
    settings: &Settings,
    started: Instant,
    child: &Child,
    said: &Receiver<(Instant, Said)>,
) -> Result<BTreeMap<String, f64>, Problem> {
    let mut values = BTreeMap::new();
    let mut begun = started;
    let (mut by_guest, mut by_host) = (0.0, 0.0);
    let mut last = None;
    loop {
        let (at, line) = said
            .recv_timeout(LINE_WITHIN + settings.load)
            .map_err(|_| silence::explain(contender, child.id(), last.as_ref(), said))?;
        last = Some(line.clone());
        match line {
            Said::Init => {
                let boot = at.duration_since(started).as_secs_f64();
                values.insert(names::BOOT.to_owned(), boot);
            }
            Said::Begin(_) => begun = at,
            Said::End(name, amount, seconds) => {
                by_guest += seconds;
                by_host += at.duration_since(begun).as_secs_f64();
                values.insert(name, amount / seconds);
            }
            Said::Idle => break,
            Said::Problem(problem) => return Err(problem.into()),
        }
    }
    check_clock(by_guest, by_host)?;
    let pids = process::with_descendants(child.id())?;
    thread::sleep(SETTLING);
    values.insert(names::IDLE.to_owned(), cpu_share(&pids, settings.idle)?);
    measure_memory(&pids, &mut values)?;
    contender.pause()?;
    thread::sleep(SETTLING);
    values.insert(names::PAUSED.to_owned(), cpu_share(&pids, settings.idle)?);
    match names::ALL.iter().find(|name| !values.contains_key(**name)) {
        None => Ok(values),
        Some(missing) => Err(format!("the guest did not measure {missing}").into()),
    }
}

/// Errors if the guest's clock runs at another speed than the host's. Takes the seconds of all loads by each.
fn check_clock(guest: f64, host: f64) -> Result<(), Problem> {
    match (guest - host).abs() <= LINES_WITHIN + host * CLOCKS_WITHIN {
        true => Ok(()),
        false => {
            Err(format!("the loads took {guest:.3} s for the guest, {host:.3} s for the host")
                .into())
        }
    }
}

fn measure_memory(pids: &[u32], values: &mut BTreeMap<String, f64>) -> Result<(), Problem> {
    let resident = pids.iter().map(|pid| process::resident(*pid)).collect::<Result<Vec<_>, _>>()?;
    let guests: Vec<_> = resident.iter().filter(|process| process.guest > 0).collect();
    let [vm] = guests[..] else {
        return Err(format!("not one process has the guest's RAM: {resident:?}").into());
    };
    if vm.guest != GUEST_MIB << 20 {
        return Err(
            format!("the mappings taken for the guest's RAM have {} bytes", vm.guest).into()
        );
    }
    values.insert(names::MEMORY.to_owned(), vm.bytes as f64);
    let all: u64 = resident.iter().map(|process| process.bytes).sum();
    values.insert(names::MEMORY_ALL.to_owned(), all as f64);
    Ok(())
}

/// The share of a CPU that these processes use in this time.
fn cpu_share(pids: &[u32], during: Duration) -> Result<f64, Problem> {
    if during.is_zero() {
        return Ok(0.0);
    }
    let (start, before) = (Instant::now(), process::cpu_time(pids)?);
    thread::sleep(during);
    let used = process::cpu_time(pids)?.saturating_sub(before);
    Ok(used.as_secs_f64() / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_with_a_slow_or_a_fast_clock_is_an_error() {
        assert!(check_clock(13.5, 14.5).is_ok());
        for guest in [7.0, 27.0] {
            assert!(check_clock(guest, 13.5).unwrap_err().to_string().contains("13.500 s"));
        }
    }
}
