//! What a host does with systemd's fd store beside the cells of the tables.

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::json;

use super::Backend;
use super::service::{Evidence, PATIENCE, Service, VMS, disk, hidden};
use crate::errands::Client;
use crate::guests::stop_next_vm_process;

/// Starts a host under systemd. `update` are lines of `[update]`. `None` without KVM.
pub(super) fn start(update: &str) -> Option<Service> {
    let start = || Service::start(Backend::Systemd, tempfile::tempdir().unwrap(), update);
    super::has_kvm().then(start)
}

/// Stops the host, and starts the next one with another configuration.
pub(super) fn restart_with(service: &mut Service, edit: impl FnOnce(String) -> String) {
    let config = service.path().join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, edit(text)).unwrap();
    service.signal(Signal::TERM);
    service.start_again();
}

/// Waits until the guest of the first VM was asked to shut down.
fn wait_until_stopping(service: &Service) {
    let deadline = Instant::now() + PATIENCE;
    while service.state(VMS[0]) != "stopping" {
        assert!(Instant::now() < deadline, "it does not begin to stop\n{}", service.logs());
    }
}

/// Asserts that a guest goes on under the next host as it was, and runs once.
fn assert_goes_on(service: &Service, name: &str, before: Evidence) {
    let now = service.counts_on(name);
    assert_eq!(now.boot, before.boot, "{name} was booted again\n{}", service.logs());
    assert!(now.count >= before.count, "{name} went back: {before:?} {now:?}");
    assert_eq!(service.runners(name).len(), 1);
}

pub(super) fn assert_all_go_on(service: &Service, before: [Evidence; 2]) {
    VMS.into_iter().zip(before).for_each(|(name, before)| assert_goes_on(service, name, before));
}

/// Restarts the host, and asserts that it boots no VM over the store, for a reason with these words. Twice: the host without
/// the store leaves it as it is.
fn assert_restarts_withhold_all(service: &mut Service, why: &str) {
    for _ in 0..2 {
        service.signal(Signal::TERM);
        service.start_again();
        for name in VMS {
            let vm = service.vm(name);
            assert_eq!(vm["state"], "withheld", "{vm}");
            assert!(vm["error"].to_string().contains(why), "{vm}");
            assert!(service.runners(name).is_empty() && service.is_still_kept(name), "{name}");
        }
    }
}

#[test]
fn a_host_that_cannot_find_out_systemds_version_boots_no_vm_over_the_store() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    let systemctl = service.path().join("systemctl");
    let tells_its_version = fs::read(&systemctl).unwrap();
    fs::write(&systemctl, "#!/bin/sh\nexit 1\n").unwrap();
    assert_restarts_withhold_all(&mut service, "an unknown version");
    fs::write(&systemctl, tells_its_version).unwrap();
    service.signal(Signal::TERM);
    assert_all_come_back(&mut service, before);
}

#[test]
fn a_service_whose_unit_has_lost_its_store_boots_no_vm_over_what_systemd_holds() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    service.manager().set_store(false);
    assert_restarts_withhold_all(&mut service, "FileDescriptorStoreMax=");
    service.manager().set_store(true);
    service.signal(Signal::TERM);
    assert_all_come_back(&mut service, before);
}

#[test]
fn a_service_that_is_stopped_leaves_no_watchdog_behind_and_a_machine_that_ends_does() {
    let Some(mut service) = start("") else { return };
    // A terminal is a character device, and shows what is written to it.
    let watchdog = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&watchdog).unwrap();
    unlockpt(&watchdog).unwrap();
    let path = ptsname(&watchdog, Vec::new()).unwrap().into_string().unwrap();
    let _terminal = fs::File::options().write(true).open(&path).unwrap();
    fcntl_setfl(&watchdog, OFlags::NONBLOCK).unwrap();
    let with_watchdog =
        |text: String| text.replace("[host]", &format!("[host]\nwatchdog = {path:?}"));
    restart_with(&mut service, with_watchdog);
    let systemctl = service.path().join("systemctl");
    let script = fs::read_to_string(&systemctl).unwrap();
    for (state, last) in [("running", b'V'), ("stopping", 0)] {
        let tells = format!("case $1 in is-system-running) echo {state};;");
        fs::write(&systemctl, script.replace("case $1 in", &tells)).unwrap();
        service.signal(Signal::TERM);
        service.wait_for_its_end();
        let mut fed = [0xff; 256];
        let count = rustix::io::read(&watchdog, &mut fed).unwrap();
        assert_eq!(fed[count - 1], last, "{state}: {:?}\n{}", &fed[..count], service.logs());
        service.start_again();
    }
}

#[test]
fn a_vm_that_was_given_up_and_boots_again_goes_along_from_then_on() {
    let Some(mut service) = start("") else { return };
    let [before, other] = VMS.map(|name| service.counts_on(name));
    let systemctl = service.path().join("systemctl");
    let works = fs::read(&systemctl).unwrap();
    fs::write(&systemctl, "#!/bin/sh\nexit 1\n").unwrap();
    service.signal(Signal::TERM);
    service.start_again();
    assert!(service.ctl(&["stop", VMS[0]]).status.success());
    fs::write(&systemctl, works).unwrap();
    service.signal(Signal::TERM);
    service.start_again();
    assert_eq!(service.state(VMS[0]), "stopped", "its old state is gone\n{}", service.logs());
    assert!(service.ctl(&["boot", VMS[0]]).status.success());
    let booted = service.counts_on(VMS[0]);
    assert_ne!(booted.boot, before.boot);
    service.signal(Signal::TERM);
    service.start_again();
    assert_eq!(service.counts_on(VMS[0]).boot, booted.boot, "{}", service.logs());
    assert_eq!(service.counts_on(VMS[1]).boot, other.boot);
}

#[test]
fn a_vm_that_is_stopping_ends_before_a_stop_by_systemd_and_stays_stopped() {
    let Some(mut service) = start("") else { return };
    let before = service.counts_on(VMS[1]);
    let one = format!("name = \"{}\"\n", VMS[0]);
    restart_with(&mut service, |text| {
        text.replace(&one, &(one.clone() + "restart = \"always\"\n"))
    });
    let stop = service.begin(&["stop", VMS[0], "--within", "1000"]);
    wait_until_stopping(&service);
    // Its guest ignores the button. The configuration allows it a second.
    service.signal(Signal::TERM);
    let said = stop.wait_with_output().unwrap();
    assert!(said.status.success(), "{said:?}\n{}", service.logs());
    service.start_again();
    assert_eq!(service.state(VMS[0]), "stopped", "{}", service.logs());
    assert!(service.runners(VMS[0]).is_empty());
    assert_eq!(service.counts_on(VMS[1]).boot, before.boot);
}

#[test]
fn a_host_that_leaves_to_systemd_is_not_replaced_by_another_before() {
    let Some(mut service) = start("") else { return };
    let before = service.counts_on(VMS[1]);
    restart_with(&mut service, |text| text.replace("stop-within-s = 1", "stop-within-s = 1000"));
    // Its guest ignores the button.
    let stop = service.begin(&["stop", VMS[0]]);
    wait_until_stopping(&service);
    service.signal(Signal::TERM);
    let told = |service: &Service| service.logs().matches("got SIGTERM").count();
    let deadline = Instant::now() + PATIENCE;
    while told(&service) < 2 {
        assert!(Instant::now() < deadline, "the signal does not come\n{}", service.logs());
    }
    // Without the VM that is stopping nothing else is in the way.
    let without: [&[&str]; 4] = [
        &["handover", "--without", VMS[0]],
        &["update", "--without", VMS[0]],
        &["recover"],
        &["boot", VMS[1]],
    ];
    for command in without {
        let said = String::from_utf8(service.ctl(command).stderr).unwrap();
        assert!(said.contains("was told to end"), "{command:?}: {said}");
    }
    assert!(service.ctl(&["stop", VMS[0], "--now"]).status.success());
    assert!(stop.wait_with_output().unwrap().status.success());
    service.start_again();
    assert_eq!(service.state(VMS[0]), "stopped", "{}", service.logs());
    assert_eq!(service.counts_on(VMS[1]).boot, before.boot);
}

#[test]
fn a_stop_by_systemd_does_not_cut_a_power_off_short() {
    let Some(mut service) = start("") else { return };
    restart_with(&mut service, |text| text.replace("stop-within-s = 1", "stop-within-s = 4"));
    let client = service.begin(&["power-off"]);
    wait_until_stopping(&service);
    service.signal(Signal::TERM);
    let said = client.wait_with_output().unwrap();
    assert!(said.status.success(), "{said:?}\n{}", service.logs());
    service.wait_for_its_end();
    let logs = service.logs();
    assert_eq!(logs.matches("its guest did not shut down in time").count(), 2, "{logs}");
    assert_eq!(service.manager().files().len(), 0, "nothing is left of VMs that have ended");
}

#[test]
fn vms_that_hang_at_a_stop_end_together_and_the_others_are_kept() {
    let Some(mut service) = start("budget = 5") else { return };
    let before = service.counts_on(VMS[1]);
    let kernel = service.path().join("one.elf");
    let more = ["three", "four"].map(|name| {
        format!("[[vm]]\nname = \"{name}\"\nmemory = \"size=1G\"\nkernel = {kernel:?}\nserial = \"off\"\n")
    });
    restart_with(&mut service, |text| text + &more.concat());
    let hanging = [VMS[0], "three", "four"];
    hanging[1..].iter().for_each(|name| assert!(service.ctl(&["boot", name]).status.success()));
    let pids = hanging.map(|name| service.vm(name)["pid"].as_i64().unwrap() as i32);
    service.set_breakpoint("pause");
    service.signal(Signal::TERM);
    service.wait_for_breakpoint();
    for pid in pids {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    }
    service.signal(Signal::CONT);
    service.start_again();
    let logs = service.logs();
    assert!(logs.contains("step `pause`: VMs `one`, `three`, `four`: "), "{logs}");
    assert_eq!(logs.matches("step `pause`: VM").count(), 1, "one round ends them all\n{logs}");
    hanging.iter().for_each(|name| assert!(logs.contains(&format!("VM `{name}` is ended"))));
    assert_eq!(service.counts_on(VMS[1]).boot, before.boot);
}

/// Stops a host, makes `documents` of it unreadable, and starts the host twice over that. Returns the service, whose last
/// host has ended again, and what the guests' memory said before. Nothing in the store has changed, and the documents can
/// be read again.
fn unreadable_twice(documents: &[&str], state: &str) -> Option<(Service, [Evidence; 2])> {
    let mut service = start("")?;
    let before = VMS.map(|name| service.counts_on(name));
    service.signal(Signal::TERM);
    service.wait_for_its_end();
    let left = service.manager().files();
    documents.iter().for_each(|document| service.manager().flip(document));
    for _ in 0..2 {
        service.start_again();
        for name in VMS {
            assert_eq!(service.state(name), state, "{}", service.logs());
            assert!(service.runners(name).is_empty());
        }
        let report = service.ctl(&["report"]).stdout;
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        let vms = report["vms"].as_array().unwrap();
        assert_eq!(vms.len(), VMS.len(), "{report}");
        for vm in vms {
            assert_eq!(vm["outcome"], "preserved", "{report}");
            assert!(vm["remedy"].is_string() && !vm["error"][0].is_null(), "{report}");
        }
        service.signal(Signal::TERM);
        service.wait_for_its_end();
        let now = service.manager().files();
        // A host that could read the index writes its own documents.
        let stays =
            |(name, _): &(&String, &u64)| state == "withheld" || name.starts_with("perennial-vm-");
        assert!(left.iter().filter(stays).eq(now.iter().filter(stays)), "{left:?} {now:?}");
    }
    Some((service, before))
}

/// Starts the host once more, and asserts that the guests go on.
fn assert_all_come_back(service: &mut Service, before: [Evidence; 2]) {
    service.start_again();
    assert_all_go_on(service, before);
}

#[test]
fn what_nobody_can_read_stays_in_the_store_until_a_host_can() {
    let documents = ["perennial-host/0", "perennial-host/1"];
    let Some((mut service, before)) = unreadable_twice(&documents, "withheld") else { return };
    documents.iter().for_each(|document| service.manager().flip(document));
    assert_all_come_back(&mut service, before);
}

#[test]
fn a_manifest_that_nobody_can_read_goes_along_in_the_store() {
    let Some((mut service, before)) = unreadable_twice(&["perennial-host/0"], "preserved") else {
        return;
    };
    // Each host has a manifest of its own. The one that has the VMs is carried on behind it.
    service.manager().flip("perennial-host/2");
    assert_all_come_back(&mut service, before);
}

#[test]
fn vms_that_are_lost_with_a_killed_host_boot_again_if_their_policy_says_so() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    let config = service.path().join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let [one, two] = VMS.map(|name| format!("name = \"{name}\"\n"));
    let text = text.replace(&one, &(one.clone() + "restart = \"on-failure\"\n"));
    fs::write(&config, text.replace(&two, &(two.clone() + "restart = \"never\"\n"))).unwrap();
    // Their guests run, and the manifest is still in the store.
    service.set_breakpoint("finish");
    service.signal(Signal::TERM);
    service.restart();
    service.wait_for_breakpoint();
    service.signal(Signal::KILL);
    service.start_again();
    service.runs(VMS[0]);
    assert_ne!(service.counts_on(VMS[0]).boot, before[0].boot);
    assert_eq!(service.state(VMS[1]), "failed");
}

#[test]
fn a_full_store_costs_a_program_and_then_the_least_urgent_vm_and_never_all_of_them() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    // A piece of RAM and a document for each VM, and two documents of the host. The service was told of 64.
    service.manager().set_capacity(6);
    service.signal(Signal::TERM);
    service.restart();
    assert_eq!(service.manager().names().len(), 6, "{}", service.logs());
    service.wait_until_it_answers();
    assert_all_go_on(&service, before);
    assert!(service.logs().contains("own program does not go along"), "{}", service.logs());
    let before = VMS.map(|name| service.counts_on(name));
    service.manager().set_capacity(5);
    service.signal(Signal::TERM);
    service.start_again();
    let now = service.counts_on(VMS[0]);
    assert_eq!(now.boot, before[0].boot, "{}", service.logs());
    assert_eq!(service.vm(VMS[1])["state"], "stopped", "{}", service.logs());
    assert!(service.logs().contains("VM `two` is ended"), "{}", service.logs());
}

#[test]
fn a_preserved_vm_stays_in_the_store_if_a_stop_is_undone_and_the_host_is_killed() {
    let Some(mut service) = start("") else { return };
    let before = service.counts_on(VMS[0]);
    let (disk, hidden) = (disk(service.path(), VMS[0]), hidden(service.path(), VMS[0]));
    service.signal(Signal::TERM);
    service.wait_for_its_end();
    fs::rename(&disk, &hidden).unwrap();
    service.start_again();
    assert_eq!(service.state(VMS[0]), "preserved", "{}", service.logs());
    service.runs(VMS[1]);
    let nowhere = ["preflight", "--kernel", "/nowhere", "--initramfs", "/nowhere"];
    let said = String::from_utf8(service.ctl(&nowhere).stdout).unwrap();
    let warning = format!("warning `disk-preserved`: VM `one`: the disk {} is not", disk.display());
    assert!(said.contains(&warning) && !said.contains("`disk-missing`"), "{said}");
    service.set_breakpoint("jump");
    service.signal(Signal::TERM);
    service.wait_for_breakpoint();
    // systemd has no room for the documents of this attempt, which take the places of the last host's.
    let capacity = service.manager().names().len() - 1;
    service.manager().set_capacity(capacity);
    service.signal(Signal::CONT);
    service.wait_for_words("the host tries again");
    service.signal(Signal::KILL);
    service.manager().set_capacity(64);
    service.start_again();
    assert_eq!(service.state(VMS[0]), "preserved", "{}", service.logs());
    fs::rename(&hidden, &disk).unwrap();
    assert!(service.ctl(&["restore", VMS[0]]).status.success(), "{}", service.logs());
    assert_goes_on(&service, VMS[0], before);
}

#[test]
fn while_systemd_does_not_answer_a_stop_ends_no_vm() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    let (socket, gone) = (service.path().join("notify"), service.path().join("gone"));
    fs::rename(&socket, &gone).unwrap();
    service.signal(Signal::TERM);
    service.wait_for_words("systemd does not answer");
    assert_all_go_on(&service, before);
    // The same in the blackout.
    service.set_breakpoint("jump");
    fs::rename(&gone, &socket).unwrap();
    service.wait_for_breakpoint();
    fs::rename(&socket, &gone).unwrap();
    let before = service.readies();
    service.signal(Signal::CONT);
    service.wait_for_words("step `jump`: cannot");
    assert_eq!(service.readies(), before);
    let before = VMS.map(|name| service.counts_on(name));
    fs::rename(&gone, &socket).unwrap();
    service.start_again();
    assert_all_go_on(&service, before);
}

#[test]
fn a_host_that_waits_for_a_systemd_that_is_stuck_serves_its_clients() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    let unanswered = |service: &Service| service.logs().matches("systemd does not answer").count();
    service.manager().set_stuck(true);
    service.signal(Signal::TERM);
    // A host that waited itself would reply when it has given up, each time. On a loaded machine any host may, now and then.
    let is_served = (0..5).any(|_| {
        service.manager().is_asked();
        let before = unanswered(&service);
        service.status();
        unanswered(&service) == before
    });
    assert!(is_served, "{}", service.logs());
    service.wait_for_words("systemd does not answer");
    assert_all_go_on(&service, before);
    let before = VMS.map(|name| service.counts_on(name));
    service.manager().set_stuck(false);
    service.start_again();
    assert_all_go_on(&service, before);
}

#[test]
fn a_vm_that_was_saved_runs_on_while_systemd_does_not_answer() {
    let Some(mut service) = start("") else { return };
    let before = VMS.map(|name| service.counts_on(name));
    let (socket, gone) = (service.path().join("notify"), service.path().join("gone"));
    let process = Pid::from_raw(service.vm(VMS[0])["pid"].as_i64().unwrap() as i32).unwrap();
    service.set_breakpoint("preserve-state");
    service.signal(Signal::TERM);
    service.wait_for_breakpoint();
    super::damage::kill(process);
    fs::rename(&socket, &gone).unwrap();
    service.signal(Signal::CONT);
    service.wait_for_words("systemd does not answer");
    // Under the same host, which nobody can replace.
    service.runs(VMS[0]);
    assert_all_go_on(&service, before);
    let before = VMS.map(|name| service.counts_on(name));
    fs::rename(&gone, &socket).unwrap();
    service.start_again();
    assert_all_go_on(&service, before);
}

#[test]
fn clients_that_wait_get_replies_before_a_stop_by_systemd() {
    let Some(mut service) = start("") else { return };
    let [one, two] = VMS;
    let before = service.counts_on(one);
    assert!(service.ctl(&["stop", two, "--now"]).status.success());
    let hangs = Pid::from_raw(service.vm(one)["pid"].as_i64().unwrap() as i32).unwrap();
    kill_process(hangs, Signal::STOP).unwrap();
    let boots = stop_next_vm_process(service.pid().as_raw_pid() as u32);
    let mut client = Client::of(UnixStream::connect(service.path().join("socket")).unwrap());
    let waiting = [
        json!({"do": "pause", "vm": one}),
        json!({"do": "resize-disk", "vm": one, "disk": disk(service.path(), one)}),
        json!({"do": "boot", "vm": two}),
        json!({"do": "status"}),
    ];
    waiting.iter().zip(1..).for_each(|(command, id)| client.says(id, command));
    client.says(0, &json!({"do": "resume", "vm": one}));
    assert_eq!(client.hears()["id"], 0, "the others wait");
    boots.join().unwrap();
    service.signal(Signal::TERM);
    let mut replies: Vec<_> = waiting.iter().map(|_| client.hears()).collect();
    // It answers in time for the stop.
    kill_process(hangs, Signal::CONT).unwrap();
    replies.sort_by_key(|reply| reply["id"].as_u64());
    let says = [
        "`one` is running: it was not paused",
        "is not resized yet, and this host ends",
        "`two` is booting: it was not booted",
    ];
    for (reply, says) in replies.iter().zip(says) {
        assert!(reply["error"].to_string().contains(says), "{reply}");
    }
    assert!(replies[3]["ok"]["vms"].is_array(), "{replies:?}");
    service.start_again();
    assert_eq!(service.counts_on(one).boot, before.boot, "{}", service.logs());
    service.runs(two);
}
