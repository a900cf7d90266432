//! What makes a host hard to kill: the kernel's order of victims when memory runs out, and a reboot after a panic.

use std::fs;
use std::io;
use std::path::Path;

use super::init;
use super::watchdog::{self, Watchdog};
use crate::causes::chain;
use crate::config::HostSection;
use crate::live_update::next_kernel::PANIC_SECONDS;

/// The host's `oom_score_adj`: the kernel kills everything else first. Without the host, all its VMs would end.
const HOST_SCORE: i32 = -1000;

/// Asks the kernel to spare the host, and, as PID 1, to reboot after a panic instead of standing still. Only warns
/// if the kernel refuses.
pub(super) fn prepare(root: &Path) {
    // Without the privilege, the score of a process cannot be lowered. It is as good as it was then.
    if let Err(error) = set_score(root, HOST_SCORE) {
        tracing::debug!("the kernel may kill the host when memory runs out: {error}");
    }
    if init::is_pid_1()
        && let Err(error) = reboot_after_panic(root)
    {
        tracing::warn!("the kernel stands still after a panic: {error}");
    }
}

/// Starts the hardware watchdog of the configuration. Only logs an error: a host without one still runs its VMs.
pub(super) fn watchdog(section: &HostSection) -> Option<Watchdog> {
    let device = section.watchdog.as_ref()?;
    let started = Watchdog::start(device, section.watchdog_timeout_s());
    let device = device.display();
    started.inspect_err(|error| tracing::error!("{device}: cannot feed the watchdog: {error}")).ok()
}

/// Stops the hardware watchdog of the last host, given its configuration, if this one's names another one or none: nobody
/// would feed it, and it would reset the machine under the guests.
pub(super) fn stop_watchdog_of_old_host(section: &HostSection, old: Option<&str>) {
    let Some(device) = old.and_then(|old| HostSection::salvage(old).watchdog) else { return };
    if section.watchdog.as_ref() == Some(&device) {
        return;
    }
    let name = device.display();
    match watchdog::stop(&device) {
        Ok(()) => {
            tracing::info!("{name}, which the last host fed, is stopped: `[host]` does not name it")
        }
        Err(error) => tracing::error!(
            "the last host fed {name}, which may reset this machine now: {}",
            chain(&error).join(": ")
        ),
    }
}

/// Lowers the score of this process, unless an operator has lowered it further.
fn set_score(root: &Path, score: i32) -> io::Result<()> {
    let path = root.join("proc/self/oom_score_adj");
    let now: i32 = fs::read_to_string(&path)?.trim().parse().map_err(io::Error::other)?;
    match now <= score {
        true => Ok(()),
        false => fs::write(path, score.to_string()),
    }
}

/// Sets the time from a panic to the reboot, unless the operator did (`panic=` on the command line).
fn reboot_after_panic(root: &Path) -> io::Result<()> {
    let path = root.join("proc/sys/kernel/panic");
    match fs::read_to_string(&path)?.trim() {
        "0" => fs::write(path, PANIC_SECONDS.to_string()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_has_set_stays() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        for (before, after) in [("0\n", "10"), ("30\n", "30\n"), ("-1\n", "-1\n")] {
            write("proc/sys/kernel/panic", before);
            reboot_after_panic(root.path()).unwrap();
            assert_eq!(read("proc/sys/kernel/panic"), after);
        }
        for (before, after) in [("0\n", "-900"), ("-1000\n", "-1000\n"), ("200\n", "-900")] {
            write("proc/self/oom_score_adj", before);
            set_score(root.path(), -900).unwrap();
            assert_eq!(read("proc/self/oom_score_adj"), after);
        }
        set_score(Path::new("/nowhere"), 0).unwrap_err();
    }
}
