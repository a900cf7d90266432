//! PID 1 of the guests: mounts file systems, runs the workload, and reports on the console.
//!
//! It is the only program in a guest. It never stops at an error: errors become numbers in the
//! heartbeat, or notes on the console. The kernel's command line has its [`settings`], [`workers`] has
//! the workload, and lines that arrive on the console are [`orders`].

mod button;
mod clocks;
mod console;
mod cpus;
mod echo;
mod orders;
mod ring;
mod scratch;
mod settings;
mod workers;

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use console::Console;
use perennial_tests::workload::Heartbeat;
use rustix::mount::{MountFlags, mount};
use scratch::Scratch;
use settings::Settings;
use workers::Progress;

fn main() {
    let mut problems = mount_all();
    problems.extend(perennial_tests::modules::load_all());
    // Only emergency messages go to the console, so that others cannot interrupt a heartbeat.
    let _ = fs::write("/proc/sys/kernel/printk", "1");
    let _ = fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "always");

    let console = Arc::new(Console::open());
    for problem in problems {
        console.note("problem", &problem);
    }
    let settings = match Settings::parse(&read("/proc/cmdline")) {
        Ok(settings) => settings,
        Err(problem) => {
            console.note("problem", &problem);
            Settings::default()
        }
    };
    let boot_id = read("/proc/sys/kernel/random/boot_id");
    let boot: String = boot_id.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let vcpus = thread::available_parallelism().map_or(1, usize::from);
    console.note_json(&serde_json::json!({
        "note": "boot",
        "boot_id": boot_id,
        "release": read("/proc/sys/kernel/osrelease"),
        "vcpus": vcpus,
        "memory_total_kib": settings::meminfo("MemTotal"),
        // Empty if the kernel has no DMI.
        "uuid": read("/sys/class/dmi/id/product_uuid"),
        "serial": read("/sys/class/dmi/id/product_serial"),
        // Empty if the machine has no network device.
        "mac": read("/sys/class/net/eth0/address"),
        "clocksource": read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
    }));

    let progress = Arc::new(Progress::new(vcpus));
    workers::start(&settings, &boot, &progress, &console);
    if let Some(port) = settings.echo {
        echo::start(port, &console);
    }
    if settings.obeys_button {
        button::start(&console);
    }
    let scratch = Scratch::start(&settings.scratch, &progress, &console);
    orders::start(&console, scratch);
    beat(&settings, &boot, &progress, &console)
}

/// Sends heartbeats without end.
fn beat(settings: &Settings, boot: &str, progress: &Progress, console: &Console) -> ! {
    for seq in 1.. {
        console.write(&heartbeat(seq, boot, progress).to_line());
        thread::sleep(settings.interval);
    }
    unreachable!("2^64 heartbeats")
}

fn heartbeat(seq: u64, boot: &str, progress: &Progress) -> Heartbeat {
    let (monotonic_us, realtime_us) = clocks::now();
    Heartbeat {
        boot: boot.to_owned(),
        seq,
        counters: progress.counters(),
        cpu_errors: progress.cpu_errors.get(),
        memory_passes: progress.memory_passes.get(),
        memory_errors: progress.memory_errors.get(),
        disk_seq: progress.disk_seq.get(),
        disk_errors: progress.disk_errors.get(),
        entropy_draws: progress.entropy_draws.get(),
        monotonic_us,
        realtime_us,
        clock_backward: progress.clock_backward.get(),
        kernel_warnings: progress.kernel_warnings.get(),
    }
}

/// Mounts the kernel's file systems and returns the errors. In a guest that booted from a disk, `/dev`
/// is mounted already.
fn mount_all() -> Vec<String> {
    [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")]
        .into_iter()
        .filter_map(|(kind, target)| {
            let _ = fs::create_dir(target);
            match mount(kind, target, kind, MountFlags::empty(), None) {
                Ok(()) | Err(rustix::io::Errno::BUSY) => None,
                Err(error) => Some(format!("cannot mount {kind} at {target}: {error}")),
            }
        })
        .collect()
}

/// Reads a small file, without its last newline. Empty if the file cannot be read.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
}

/// Sleeps for a moment between two actions of a worker.
fn pause() {
    thread::sleep(Duration::from_millis(50));
}
