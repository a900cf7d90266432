//! Live updates that fail before the jump: every VM runs on, and the next update succeeds.

use std::process::ExitCode;

use perennial_tests::control::ControlError;
use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{self, both};
use serde_json::{Value, json};

/// The steps of a live update, in order.
const STEPS: [&str; 7] =
    ["load", "preserve-ram", "pause", "save", "preserve-state", "sync", "jump"];

fn main() -> ExitCode {
    suite::run(&[
        both("stopped_before_each_step_every_vm_runs_on_and_the_next_update_succeeds", each_step),
        both("what_cannot_be_loaded_is_refused_and_every_vm_runs_on", refused),
    ])
}

fn boot(luo: Luo) -> Result<Host, Failure> {
    let vms = vec![VmPlan::new("web", 256, 2), VmPlan::new("db", 128, 1)];
    let (host, _) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;
    Ok(host)
}

/// After whatever happened, a real update must still work.
fn update_at_last(mut host: Host) -> Result<(), Failure> {
    host.update(json!({}))?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn each_step(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(luo)?;
    for step in STEPS {
        let reply = host.try_update(json!({"stop_before": step}))?;
        if reply["outcome"] != "running" || reply["stopped_before"] != step {
            return Err(format!("stopped before {step}, the host says {reply}").into());
        }
        host.check_guests().map_err(|error| format!("stopped before {step}: {error}"))?;
    }
    update_at_last(host)
}

fn refused(luo: Luo) -> Result<(), Failure> {
    let mut host = boot(luo)?;
    let with_cmdline = |words: &str| json!({"cmdline": format!("console=ttyS0 {words}")});
    let files: [(Value, &str); 7] = [
        (json!({"kernel": "/data/nowhere/bzImage"}), "/data/nowhere/bzImage"),
        (json!({"kernel": "/data/bad/empty"}), "/data/bad/empty"),
        (json!({"kernel": "/data/bad/header-only"}), "/data/bad/header-only"),
        (json!({"kernel": "/data/bad/truncated-bzImage"}), "/data/bad/truncated-bzImage"),
        (json!({"kernel": "/data/bad/no-kernel"}), "/data/bad/no-kernel"),
        (json!({"initramfs": "/data/nowhere/initramfs"}), "/data/nowhere/initramfs"),
        (json!({"initramfs": "/data/bad/no-initramfs"}), "/data/bad/no-initramfs"),
    ];
    let of_the_luo = match luo {
        Luo::Kernel => [
            (json!({"initramfs": "/data/bad/huge-initramfs"}), "scratch"),
            (with_cmdline("liveupdate=off"), "liveupdate=off"),
            (with_cmdline("kho=off"), "kho=off"),
        ],
        Luo::Pool => [
            (with_cmdline(""), "booted with `memmap=512M!1G`, its command line has no `memmap=`"),
            (with_cmdline("memmap=512M!2G"), "its command line has `memmap=512M!2G`"),
            (with_cmdline("memmap=512M$1G"), "its command line has `memmap=512M$1G`"),
        ],
    };
    for (arguments, named) in files.into_iter().chain(of_the_luo) {
        match host.try_update(arguments.clone()) {
            Err(ControlError::Refused { errors, outcome }) => {
                if outcome.as_deref() != Some("running") || !errors.join(": ").contains(named) {
                    let said = format!("{errors:?}, outcome {outcome:?}");
                    return Err(format!("{arguments}: `{named}` is not named: {said}").into());
                }
            }
            Err(error) => return Err(format!("{arguments}: {error}").into()),
            Ok(reply) => return Err(format!("{arguments} was not refused: {reply}").into()),
        }
    }
    host.check_guests()?;
    update_at_last(host)
}
