//! Executes orders that arrive on the console, one on each line.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::thread;

use perennial_tests::workload::disk::{BLOCK, Block};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::system::{RebootCommand, reboot};
use serde_json::{Value, json};

use crate::console::{self, Console};
use crate::scratch::{self, Scratch};
use crate::{cpus, ring};

/// The date of the machine's clock, in seconds since 1970.
const RTC: &str = "/sys/class/rtc/rtc0/since_epoch";

/// Whether the link of the guest's network device is up: 1 or 0.
const CARRIER: &str = "/sys/class/net/eth0/carrier";

/// Starts the thread that reads and executes orders.
pub(crate) fn start(console: &Arc<Console>, scratch: Arc<[Scratch]>) {
    let console = Arc::clone(console);
    thread::spawn(move || {
        let Some(lines) = console::lines() else { return };
        for line in lines {
            obey(line.trim(), &console, &scratch);
        }
    });
}

fn obey(order: &str, console: &Console, scratch: &[Scratch]) {
    let done = match order.split_once(' ').unwrap_or((order, "")) {
        ("", _) => Ok(()),
        ("say", text) => {
            console.note("said", text);
            Ok(())
        }
        ("date", _) => fs::read_to_string(RTC)
            .map(|seconds| console.note("date", seconds.trim()))
            .map_err(|e| e.to_string()),
        ("ring", entries) => set_ring(entries).map(|()| console.note("ring", entries)),
        ("carrier", wanted) => wait_for_carrier(wanted, console),
        (word @ ("offline" | "online"), vcpu) => cpus::set_online(vcpu, word == "online")
            .map(|online| {
                let note = serde_json::json!({"note": word, "vcpu": vcpu, "online": online});
                console.note_json(&note);
            })
            .map_err(|e| e.to_string()),
        ("size", path) => {
            size(path).map(|bytes| console.note_json(&json!({"note": "size", "bytes": bytes})))
        }
        ("write", place) => write(place).map(|result| console.note("write", &result)),
        ("discard", place) => discard(place).map(|result| console.note("discard", &result)),
        ("net", _) => {
            console.note_json(&net());
            Ok(())
        }
        ("zero", path) => zero(path).map(|result| console.note("zero", &result)),
        ("scratch", _) => {
            console.note_json(&Scratch::note(scratch));
            Ok(())
        }
        ("poweroff", _) => reboot(RebootCommand::PowerOff).map_err(|e| e.to_string()),
        ("reboot", _) => reboot(RebootCommand::Restart).map_err(|e| e.to_string()),
        ("panic", _) => fs::write("/proc/sysrq-trigger", "c").map_err(|e| e.to_string()),
        // A kernel that panics and does not reboot (`panic=0`) spins forever.
        ("hang", _) => fs::write("/proc/sys/kernel/panic", "0")
            .and_then(|()| fs::write("/proc/sysrq-trigger", "c"))
            .map_err(|e| e.to_string()),
        _ => Err("unknown order; the orders are say TEXT, date, carrier 0|1, ring ENTRIES, offline VCPU, online VCPU, size PATH, \
                  write PATH OFFSET, discard PATH OFFSET, net, zero PATH, scratch, poweroff, reboot, panic, hang"
            .to_owned()),
    };
    if let Err(problem) = done {
        console.note("problem", &format!("{order}: {problem}"));
    }
}

/// Sets the number of entries of each receive and each transmit queue of the network device, as `ethtool -G` does.
fn set_ring(entries: &str) -> Result<(), String> {
    let entries = entries.parse().map_err(|_| "the number of entries is not a number")?;
    ring::set("eth0", entries).map_err(|error| error.to_string())
}

/// Waits until the link of the network device is as `wanted`.
fn wait_for_carrier(wanted: &str, console: &Console) -> Result<(), String> {
    loop {
        let carrier = fs::read_to_string(CARRIER).map_err(|error| format!("{CARRIER}: {error}"))?;
        if carrier.trim() == wanted {
            console.note("carrier", wanted);
            return Ok(());
        }
        crate::pause();
    }
}

/// The size of a disk, in bytes.
fn size(path: &str) -> Result<u64, String> {
    let end = File::open(path).and_then(|mut disk| disk.seek(SeekFrom::End(0)));
    end.map_err(|error| error.to_string())
}

/// Writes one block to a disk, without the page cache. `place` is the disk's path and the offset in bytes. Returns
/// the result in words, `written` or the error.
fn write(place: &str) -> Result<String, String> {
    let (path, offset) = place.split_once(' ').ok_or("it needs a path and an offset")?;
    let offset = offset.parse().map_err(|_| "the offset is not a number")?;
    let (mut options, flags) = (File::options(), OFlags::DIRECT.bits() as i32);
    let disk = options.write(true).custom_flags(flags).open(path).map_err(|e| e.to_string())?;
    Ok(match disk.write_all_at(&Block::default().0, offset) {
        Ok(()) => "written".to_owned(),
        Err(error) => error.to_string(),
    })
}

/// Discards one block of a disk. `place` is the disk's path and the offset in bytes. Returns the result in words,
/// `discarded` or the error.
fn discard(place: &str) -> Result<String, String> {
    let (path, offset) = place.split_once(' ').ok_or("it needs a path and an offset")?;
    let offset = offset.parse().map_err(|_| "the offset is not a number")?;
    let disk = File::options().write(true).open(path).map_err(|e| e.to_string())?;
    Ok(match scratch::discard(&disk, offset, BLOCK as u64) {
        Ok(()) => "discarded".to_owned(),
        Err(error) => error.to_string(),
    })
}

/// The network device: its largest packet, the pairs of queues in use, and how often each receive queue has interrupted.
fn net() -> Value {
    let queues = fs::read_dir("/sys/class/net/eth0/queues").into_iter().flatten().flatten();
    let pairs = queues.filter(|queue| queue.file_name().as_encoded_bytes().starts_with(b"rx-"));
    let table = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let of_input = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let counts = words.iter().skip(1).map_while(|word| word.parse::<u64>().ok());
        words.last().is_some_and(|name| name.contains("-input.")).then(|| counts.sum::<u64>())
    };
    let received: Vec<u64> = table.lines().filter_map(of_input).collect();
    let mtu: u32 = crate::read("/sys/class/net/eth0/mtu").parse().unwrap_or_default();
    json!({"note": "net", "mtu": mtu, "pairs": pairs.count(), "received": received})
}

/// Has a disk write zeroes over all of itself. Returns the result in words, `zeroed` or the error.
fn zero(path: &str) -> Result<String, String> {
    let disk = File::options().write(true).open(path).map_err(|e| e.to_string())?;
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    Ok(match fallocate(&disk, flags, 0, size(path)?) {
        Ok(()) => "zeroed".to_owned(),
        Err(error) => error.to_string(),
    })
}
