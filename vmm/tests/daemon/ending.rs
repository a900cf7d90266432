//! A VM's process that was killed and does not end: the host does not wait for that, but the VM's next boot does.
//!
//! A test keeps such a process from its end as a debugger does, which is told of it before it takes place.

#![expect(unsafe_code, reason = "ptrace(2)")]

use std::ptr;

use serde_json::json;

use crate::errands::Client;
use crate::guests::{Vm, host, vm_processes};
use crate::host::Host;
use crate::kernel::COUNTS;

/// A process that does not end as long as this exists.
struct Kept(libc::pid_t);

impl Kept {
    /// Keeps the process of a VM from its end. `None`, with a word about it, if this test may not.
    fn of(host: &Host, vm: &str) -> Option<Self> {
        let pid = host.vm(vm)["pid"].as_i64().unwrap() as libc::pid_t;
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_SEIZE takes options in place of a pointer, and reads no memory of this process.
        let seized =
            unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, none, libc::PTRACE_O_TRACEEXIT) };
        if seized != 0 {
            eprintln!("skipped: {}", std::io::Error::last_os_error());
            return None;
        }
        Some(Self(pid))
    }

    /// Whether the process has come to its end, and waits there.
    fn is_at_its_end(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0)).unwrap();
        status.contains("\nState:\tt")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_DETACH takes a signal, none here, and reads no memory of this process.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

#[test]
fn a_process_that_does_not_end_keeps_nobody_waiting_but_the_next_boot_of_its_vm() {
    let vms: [Vm<'_>; 2] = [("slow", COUNTS, ""), ("other", COUNTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
    let Some(kept) = Kept::of(&host, "slow") else { return };
    let mut client = Client::asks(&host, &json!({"do": "stop", "vm": "slow", "now": true}));
    for command in ["pause", "resume"] {
        client.does(&json!({"do": command, "vm": "other"}));
    }
    let slow = client.does(&json!({"do": "status"}))["vms"][0].clone();
    assert_eq!((&slow["name"], &slow["state"]), (&json!("slow"), &json!("stopped")));
    while !kept.is_at_its_end() {
        client.does(&json!({"do": "status"}));
    }
    let processes = vm_processes(host.child.id());
    let mut boots = Client::asks(&host, &json!({"do": "boot", "vm": "slow"}));
    let slow = boots.does(&json!({"do": "status"}))["vms"][0].clone();
    assert_eq!((&slow["state"], &slow["pid"]), (&json!("booting"), &json!(null)), "{slow}");
    assert_eq!(vm_processes(host.child.id()), processes, "the boot has begun");
    drop(kept);
    assert_eq!(client.is_answered()["ok"]["ended"], "pulled");
    let answer = boots.is_answered();
    assert!(answer["ok"].is_object(), "{answer}");
    host.counts_on("slow");

    // A host that ends waits for it.
    let kept = Kept::of(&host, "slow").unwrap();
    let mut client = Client::asks(&host, &json!({"do": "stop", "vm": "slow", "now": true}));
    client.does(&json!({"do": "status"}));
    let mut ends = Client::asks(&host, &json!({"do": "power-off", "now": true}));
    ends.does(&json!({"do": "status"}));
    for command in ["handover", "update"] {
        let error = ends.is_refused(&json!({"do": command}));
        assert!(error.contains("was told to end"), "{command}: {error}");
    }
    assert!(host.child.try_wait().unwrap().is_none());
    drop(kept);
    assert!(ends.is_answered()["ok"].is_object());
    assert!(host.child.wait().unwrap().success());
}

#[test]
fn a_stop_and_a_boot_say_that_the_process_does_not_end_and_the_vm_boots_when_it_has() {
    let vms: [Vm<'_>; 2] = [("slow", COUNTS, ""), ("other", COUNTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
    let pid = host.vm("slow")["pid"].as_i64().unwrap();
    let Some(kept) = Kept::of(&host, "slow") else { return };
    let mut stop = Client::asks(&host, &json!({"do": "stop", "vm": "slow", "now": true}));
    let mut boot = Client::asks(&host, &json!({"do": "boot", "vm": "slow"}));
    let lingers = format!("VM `slow` has ended, but its process {pid} was killed and does not end");
    for client in [&mut stop, &mut boot] {
        let answer = client.is_answered();
        assert!(answer["error"].to_string().contains(&lingers), "{answer}");
    }
    let slow = host.vm("slow");
    assert_eq!((&slow["state"], &slow["pid"]), (&json!("stopped"), &json!(null)), "{slow}");
    let error = stop.is_refused(&json!({"do": "boot", "vm": "slow"}));
    assert!(error.contains(&lingers), "{error}");
    // The next host would wait for it while all guests stand still.
    host.hands_over(&[]);
    host.counts_on("other");
    drop(kept);
}

#[test]
fn a_vm_boots_by_command_as_soon_as_a_process_that_did_not_end_has() {
    let Some(mut host) = host("", &[("slow", COUNTS, "")]) else { return };
    host.counts_on("slow");
    let Some(kept) = Kept::of(&host, "slow") else { return };
    let mut stop = Client::asks(&host, &json!({"do": "stop", "vm": "slow", "now": true}));
    assert!(stop.is_answered()["error"].is_array());
    drop(kept);
    while !host.ctl(&["boot", "slow"]).status.success() {
        host.answers();
    }
    host.counts_on("slow");
    // A host that ends does not wait for one that does not end at all.
    let _kept = Kept::of(&host, "slow").unwrap();
    assert!(host.ctl(&["power-off", "--now"]).status.success());
    assert!(host.child.wait().unwrap().success());
}
