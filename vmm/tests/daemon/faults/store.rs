//! What a host does with systemd's fd store beside the cells of the tables.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Backend;
use super::service::{PATIENCE, Service, VMS};

#[test]
fn a_host_that_cannot_find_out_systemds_version_boots_no_vm_over_the_store() {
    if !super::has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Systemd, tempfile::tempdir().unwrap(), "");
    let before = VMS.map(|name| service.counts_on(name));
    let systemctl = service.path().join("systemctl");
    let tells_its_version = fs::read(&systemctl).unwrap();
    fs::write(&systemctl, "#!/bin/sh\nexit 1\n").unwrap();
    // Twice: the host without the store leaves it as it is.
    for _ in 0..2 {
        service.signal(Signal::TERM);
        service.start_again();
        for name in VMS {
            let vm = service.vm(name);
            assert_eq!(vm["state"], "withheld", "{vm}");
            assert!(vm["error"].to_string().contains("an unknown version"), "{vm}");
            assert!(service.runners(name).is_empty() && service.is_still_kept(name), "{name}");
        }
    }
    fs::write(&systemctl, tells_its_version).unwrap();
    service.signal(Signal::TERM);
    service.start_again();
    for (name, before) in VMS.into_iter().zip(before) {
        let now = service.counts_on(name);
        assert!(now.boot == before.boot && now.count >= before.count, "{before:?} {now:?}");
        assert_eq!(service.runners(name).len(), 1);
    }
}

#[test]
fn vms_that_are_lost_with_a_killed_host_boot_again_if_their_policy_says_so() {
    if !super::has_kvm() {
        return;
    }
    let mut service = Service::start(Backend::Systemd, tempfile::tempdir().unwrap(), "");
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
    let deadline = Instant::now() + PATIENCE;
    while service.state(VMS[0]) != "running" {
        assert!(Instant::now() < deadline, "it does not boot\n{}", service.logs());
        thread::sleep(Duration::from_millis(10));
    }
    assert_ne!(service.counts_on(VMS[0]).boot, before[0].boot);
    assert_eq!(service.state(VMS[1]), "failed");
}
