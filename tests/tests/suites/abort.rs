//! Live updates that fail before the jump: every VM runs on, and the next update succeeds.

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] =
    &[both("stopped_or_refused_every_vm_runs_on_and_the_next_update_succeeds", fails)];

fn fails(luo: Luo) -> Result<(), Failure> {
    let vms = vec![VmPlan::new("web", 256, 2), VmPlan::new("db", 128, 1)];
    let (mut host, _) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;
    host.stop_before_each_step("update")?;
    refuse(&mut host, luo)?;
    // None of these failures may keep a real update from working.
    host.update(json!({}))?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// Requests updates to kernels and initramfs files that cannot be loaded, and with bad command lines.
fn refuse(host: &mut Host, luo: Luo) -> Result<(), Failure> {
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
            (
                with_cmdline(""),
                "booted with `memmap=512M!1G`, the next kernel's command line has no `memmap=`",
            ),
            (with_cmdline("memmap=512M!2G"), "the next kernel's command line has `memmap=512M!2G`"),
            (with_cmdline("memmap=512M$1G"), "the next kernel's command line has `memmap=512M$1G`"),
        ],
    };
    for (arguments, named) in files.into_iter().chain(of_the_luo) {
        host.expect_refusal("update", arguments, named)?;
    }
    host.check_guests()
}
