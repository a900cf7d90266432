//! Executes orders that arrive on the console, one on each line.

use std::fs;
use std::sync::Arc;
use std::thread;

use rustix::system::{RebootCommand, reboot};

use crate::console::{self, Console};
use crate::cpus;

/// The date of the machine's clock, in seconds since 1970.
const RTC: &str = "/sys/class/rtc/rtc0/since_epoch";

/// Whether the link of the guest's network device is up: 1 or 0.
const CARRIER: &str = "/sys/class/net/eth0/carrier";

/// Starts the thread that reads and executes orders.
pub(crate) fn start(console: &Arc<Console>) {
    let console = Arc::clone(console);
    thread::spawn(move || {
        let Some(lines) = console::lines() else { return };
        for line in lines {
            obey(line.trim(), &console);
        }
    });
}

fn obey(order: &str, console: &Console) {
    let done = match order.split_once(' ').unwrap_or((order, "")) {
        ("", _) => Ok(()),
        ("say", text) => {
            console.note("said", text);
            Ok(())
        }
        ("date", _) => fs::read_to_string(RTC)
            .map(|seconds| console.note("date", seconds.trim()))
            .map_err(|e| e.to_string()),
        ("carrier", wanted) => wait_for_carrier(wanted, console),
        (word @ ("offline" | "online"), vcpu) => cpus::set_online(vcpu, word == "online")
            .map(|online| {
                let note = serde_json::json!({"note": word, "vcpu": vcpu, "online": online});
                console.note_json(&note);
            })
            .map_err(|e| e.to_string()),
        ("poweroff", _) => reboot(RebootCommand::PowerOff).map_err(|e| e.to_string()),
        ("reboot", _) => reboot(RebootCommand::Restart).map_err(|e| e.to_string()),
        ("panic", _) => fs::write("/proc/sysrq-trigger", "c").map_err(|e| e.to_string()),
        // A kernel that panics and does not reboot (`panic=0`) spins forever.
        ("hang", _) => fs::write("/proc/sys/kernel/panic", "0")
            .and_then(|()| fs::write("/proc/sysrq-trigger", "c"))
            .map_err(|e| e.to_string()),
        _ => Err("unknown order; the orders are say TEXT, date, carrier 0|1, offline VCPU, online VCPU, \
                  poweroff, reboot, panic, hang"
            .to_owned()),
    };
    if let Err(problem) = done {
        console.note("problem", &format!("{order}: {problem}"));
    }
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
