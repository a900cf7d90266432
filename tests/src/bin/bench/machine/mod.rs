//! Measures the machine that a guest gets from `perennial run`, with Debian's QEMU beside it, and the
//! blackout of a VM with many devices. The method is described in docs/performance.md.

mod devices;
mod table;

use std::env;
use std::path::PathBuf;
use std::time::Instant;

use perennial_tests::host::Failure;
use perennial_tests::kernels::{self, Role};
use perennial_tests::plan::Luo;
use perennial_tests::side_by_side::{self, Settings};
use perennial_tests::{qemu, recipe, suite};
use serde_json::{Value, json};

/// Shortens everything: the numbers then mean nothing.
const QUICK: &str = "PERENNIAL_BENCH_QUICK";
/// How often each VMM runs the guest, and number of updates.
const ROUNDS: &str = "PERENNIAL_BENCH_ROUNDS";
/// A directory that resources/qemu/image.sh printed before.
const QEMU: &str = "PERENNIAL_QEMU";

pub(crate) fn bench() -> Result<Value, Failure> {
    if let Some(reason) = suite::missing(Luo::Kernel, Role::Guest) {
        return Err(reason.into());
    }
    let start = Instant::now();
    let quick = env::var_os(QUICK).is_some_and(|value| value != "0");
    let rounds = match env::var(ROUNDS) {
        Ok(text) => Some(text.parse().map_err(|_| format!("{ROUNDS} is `{text}`, not a number"))?),
        Err(_) => None,
    };
    let defaults = if quick { Settings::QUICK } else { Settings::FULL };
    let settings = Settings { rounds: rounds.unwrap_or(defaults.rounds), ..defaults };
    let updates = rounds.unwrap_or(if quick { 1 } else { 5 });
    let qemu_tree = qemu_tree()?;
    let version = std::fs::read_to_string(qemu_tree.join("version"))?.trim().to_owned();
    let accelerator = qemu::accelerator();
    let kernel = kernels::find(Role::HostA)?;
    println!("Host: {accelerator}, Linux {}; beside it QEMU {version}", kernel.release);
    let measured = side_by_side::run(settings, &qemu_tree.join("root"))?;
    println!("{} VMs in {:.0} s", measured.len(), start.elapsed().as_secs_f64());
    let mut rows = table::rows(&measured);
    let (cases, blackout) = devices::measure(updates)?;
    rows.push(blackout);
    println!("all in {:.0} s\n", start.elapsed().as_secs_f64());
    table::print(&rows);
    if quick {
        println!("\n{QUICK} is set: too short to mean anything");
    }
    Ok(json!({
        "accelerator": accelerator.to_string(),
        "host_kernel": kernel.release,
        "qemu": version,
        "settings": settings,
        "quick": quick,
        "rows": rows,
        "measured": measured,
        "devices": cases,
    }))
}

/// The directory into which the recipe unpacked QEMU.
fn qemu_tree() -> Result<PathBuf, Failure> {
    if let Some(directory) = env::var_os(QEMU) {
        return Ok(directory.into());
    }
    Ok(recipe::run("resources/qemu/image.sh", &[])?)
}
