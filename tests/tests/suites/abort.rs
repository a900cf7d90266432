//! Live updates that fail before the jump: every VM runs on, and the next update succeeds.

use std::collections::BTreeSet;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, seldom_on_pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] =
    &[seldom_on_pool("stopped_or_refused_every_vm_runs_on_and_the_next_update_succeeds", fails)];

/// The VMs.
const NAMES: [&str; 2] = ["web", "db"];

fn fails(luo: Luo) -> Result<(), Failure> {
    let [web, db] = NAMES;
    let vms = vec![VmPlan::new(web, 256, 2), VmPlan::new(db, 128, 1)];
    let (mut host, _) = Host::boot(&HostPlan::new(vms).on(luo))?;
    host.wait_for_guests()?;
    host.stop_before_each_step("update")?;
    // Guests at work would leave a preflight a fifth of the emulated CPU.
    for vm in NAMES {
        host.request(json!({"do": "pause", "vm": vm}))?;
    }
    refuse(&mut host, luo)?;
    find_everything_at_once(&mut host, luo)?;
    for vm in NAMES {
        host.request(json!({"do": "resume", "vm": vm}))?;
    }
    host.check_guests()?;
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
    Ok(())
}

/// Asks for the findings about a good update and about one with which everything is wrong.
fn find_everything_at_once(host: &mut Host, luo: Luo) -> Result<(), Failure> {
    let found = host.request(json!({"do": "preflight"}))?;
    let findings = found["findings"].as_array().into_iter().flatten();
    let more =
        findings.filter(|finding| finding["severity"] != "note").map(|finding| &finding["name"]);
    // The machine's disks have no serial numbers.
    if found["refused"] != false || !more.eq(["disk-unidentified"; 2]) {
        return Err(format!("a good update has other findings: {found:#}").into());
    }
    let arguments = json!({
        // Guests run this kernel, which has no LUO and no KVM.
        "kernel": "/data/guest/bzImage",
        "initramfs": "/data/bad/stranger",
        "cmdline": "console=ttyS0 memmap=512M!2G",
    });
    let expected: &[&str] = match luo {
        Luo::Kernel => &["driver", "initramfs-modules", "initramfs-program", "kernel-luo"],
        Luo::Pool => &[
            "command-line-memmap",
            "driver",
            "initramfs-modules",
            "initramfs-program",
            // Its configuration names none.
            "pool-hidden",
        ],
    };
    let mut request = arguments.clone();
    request["do"] = json!("preflight");
    let found = host.request(request)?;
    let refusals = found["findings"].as_array().into_iter().flatten();
    let refusals = refusals.filter(|finding| finding["severity"] == "refusal");
    let refusals: BTreeSet<_> = refusals.filter_map(|finding| finding["name"].as_str()).collect();
    if found["refused"] != true || !refusals.iter().eq(expected) {
        return Err(format!("expected {expected:?}: {found:#}").into());
    }
    let named: Vec<String> = expected.iter().map(|name| format!("`{name}`")).collect();
    host.expect_refusal_of_all("update", arguments, &named)?;
    let no_init = json!({"initramfs": "/data/bad/no-init"});
    host.expect_refusal("update", no_init, "has no `/init`")
}
