//! A host that is a service of systemd: its VMs outlive the service, and the kernel.

use std::thread;
use std::time::{Duration, Instant};

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{Backing, HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, kernel};
use perennial_tests::systemd;
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    kernel("a_guest_goes_on_over_a_kexec_that_systemd_does", kexec).unless(systemd::missing),
    kernel("a_guest_goes_on_and_stays_attached_over_a_restart_of_the_service", restart)
        .unless(systemd::missing),
    kernel("a_guest_that_cannot_be_restored_waits_over_restarts_and_a_kexec", preserved)
        .unless(systemd::missing),
];

fn boot(vm: VmPlan) -> Result<(Host, Status), Failure> {
    let console = vm.console.then(|| format!("systemctl start console@{}", vm.name));
    let (host, status) = Host::boot(&HostPlan::new(vec![vm]).under_systemd())?;
    console.map_or(Ok(()), |start| host.order(&start))?;
    if status.luo != "systemd" {
        return Err(format!("the LUO is `{}`", status.luo).into());
    }
    host.wait_for_guests()?;
    Ok((host, status))
}

fn kexec(_: Luo) -> Result<(), Failure> {
    let (mut host, before) = boot(VmPlan::new("web", 256, 1))?;
    // This update puts everything into the fd store, stops before the jump, and takes it out again.
    host.try_update(json!({"stop_before": "jump"}))?;
    match host.try_update(json!({"verify_frames": true})) {
        Err(error) if error.outcome() == Some("running") => {}
        answer => return Err(format!("`verify_frames` was not refused: {answer:?}").into()),
    }
    // It is stopped before the host, and then loads a kernel over the one that the host has checked.
    host.order("systemctl start load-over@b")?;
    says(&host, "load-over is active")?;
    let after = host.update(json!({}))?;
    says(&host, "another kernel is loaded over it")?;
    says(&host, "is loaded again, in case another program has loaded one over it")?;
    if before.kernel == after.kernel || after.luo != "systemd" || after.live_updates != 1 {
        return Err(format!("before: {before:?}; after: {after:?}").into());
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn restart(_: Luo) -> Result<(), Failure> {
    // All that the guest and the harness tell each other goes through one `perennial console`.
    let (mut host, before) = boot(VmPlan { console: true, ..VmPlan::new("web", 256, 1) })?;
    for time in ["first", "second"] {
        let after = host.restart_service("systemctl restart perennial")?;
        if before.kernel != after.kernel || after.boot != "live-update" {
            return Err(format!("before: {before:?}; after: {after:?}").into());
        }
        host.check_guests()?;
        let guest = &host.guests()[0];
        guest.order(&format!("say {time}"))?;
        let said = |notes: &[Value]| notes.iter().any(|note| note["text"] == time);
        guest.wait_for_notes("the answer to an order", WORK, said)?;
    }
    host.power_off_and_check_disks()
}

/// Waits until the host's console has this text.
fn says(host: &Host, text: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + WORK;
    while !host.console().contains(text) {
        if Instant::now() >= deadline {
            return Err(format!("the console does not say `{text}`").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The VM cannot be restored while its disk has another size.
fn preserved(_: Luo) -> Result<(), Failure> {
    let (mut host, _) = boot(VmPlan { backing: Backing::File, ..VmPlan::new("log", 256, 1) })?;
    let state = |status: &Status| status.vms.first().map(|vm| vm.state.clone());
    host.order("mount --bind /etc/perennial.toml /data/log.img")?;
    for _ in 0..2 {
        let status = host.restart_service("systemctl restart perennial")?;
        if state(&status).as_deref() != Some("preserved") {
            return Err(format!("after a restart: {status:?}").into());
        }
    }
    // Under the next kernel nothing is mounted over the disk, so the VM is restored.
    let status = host.update(json!({}))?;
    if state(&status).as_deref() != Some("running") || status.live_updates != 3 {
        return Err(format!("after the kexec: {status:?}").into());
    }
    host.check_guests()?;
    host.done();
    Ok(())
}
