//! A VM that a host cannot restore goes along with every update and handover, untouched, until a host can.

use perennial_tests::control;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{Backing, HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, kernel, pool, seldom_on_pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    seldom_on_pool("a_vm_whose_disk_is_gone_goes_along_until_a_host_has_the_disk", disk_gone),
    kernel("vms_whose_manifest_cannot_be_read_go_along_until_a_host_can", other_program),
    seldom_on_pool(
        "a_host_that_cannot_read_the_manifest_hands_back_to_the_previous_program",
        hand_back,
    ),
    seldom_on_pool("a_vm_from_a_newer_cpu_goes_along_until_a_host_has_the_cpu", cpu_gone),
    kernel("vms_with_unreadable_states_run_in_processes_of_the_previous_program", one_by_one),
];

/// Too long for every run.
pub(crate) const LONG_TESTS: &[Test] = &[
    pool("vms_whose_manifest_cannot_be_read_go_along_in_a_pool", other_program),
    pool("vms_with_unreadable_states_in_a_pool_run_in_the_previous_program", one_by_one),
];

/// The arguments of an update to a side, by a host that has the images in `data`.
fn to(data: &str, side: char) -> Value {
    json!({
        "kernel": format!("{data}/{side}/bzImage"),
        "initramfs": format!("{data}/{side}/initramfs"),
    })
}

/// Errors unless the VM is in this state, with `named` in its error.
fn expect(status: &Status, name: &str, state: &str, named: &str) -> Result<(), Failure> {
    let vm = status.vms.iter().find(|vm| vm.name == name).ok_or("no such VM")?;
    let error = vm.error.clone().unwrap_or_default().join(": ");
    match vm.state == state && error.contains(named) {
        true => Ok(()),
        false => Err(format!("{name} should be {state} for `{named}`: {status:?}").into()),
    }
}

fn check_only(host: &Host, name: &str) -> Result<(), Failure> {
    let guest = host.guests().iter().find(|guest| guest.name() == name).ok_or("no such guest")?;
    Ok(guest.wait_until_settled(WORK)?)
}

fn disk_gone(luo: Luo) -> Result<(), Failure> {
    let log = VmPlan { backing: Backing::File, ..VmPlan::new("log", 128, 1) };
    let plan = HostPlan {
        luo,
        // The next host does not find the file system with the disk's file.
        edit_b: Some(|config| config.replace("target = \"/data\"", "target = \"/elsewhere\"")),
        ..HostPlan::new(vec![VmPlan::new("web", 128, 1), log])
    };
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    host.expect_refusal("update", json!({}), "the disk /data/log.img is on /dev/vda here")?;
    let status = host.update(json!({"force": ["disk-hidden"]}))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    if status.unfinished != ["perennial-vm-log"] {
        return Err(format!("the session of the VM is not named: {status:?}").into());
    }
    check_only(&host, "web")?;
    let status = host.hand_over(json!({}))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    check_only(&host, "web")?;
    // What is undone leaves it preserved.
    host.try_update(with(to("/elsewhere", 'b'), json!({"stop_before": "jump"})))?;
    expect(&host.status()?, "log", "preserved", "/data/log.img")?;
    let status = host.update(to("/elsewhere", 'b'))?;
    expect(&status, "log", "preserved", "/data/log.img")?;
    check_only(&host, "web")?;
    let status = host.update(to("/elsewhere", 'a'))?;
    expect(&status, "log", "running", "")?;
    if !status.unfinished.is_empty() || status.live_updates != 3 {
        return Err(format!("after the VM came back: {status:?}").into());
    }
    // The guest verifies its memory and its disk.
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn with(mut arguments: Value, more: Value) -> Value {
    if let (Value::Object(arguments), Value::Object(more)) = (&mut arguments, more) {
        arguments.extend(more);
    }
    arguments
}

/// Small VMs on a host whose second program knows a binding by another name.
fn misread(luo: Luo, binding: [&'static str; 2], vms: &[&str]) -> HostPlan {
    let vms = vms.iter().map(|name| VmPlan::new(name, 128, 1)).collect();
    HostPlan { luo, other_binding_b: Some(binding), ..HostPlan::new(vms) }
}

fn other_program(luo: Luo) -> Result<(), Failure> {
    let plan = misread(luo, ["entry-v1", "entry-v9"], &["web"]);
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    host.expect_refusal("update", json!({}), "initramfs-documents")?;
    let forced = json!({"force": ["initramfs-documents"]});
    let status = host.update(forced.clone())?;
    expect(&status, "web", "preserved", "vm-entry-v9")?;
    let status = host.update(with(to("/data", 'b'), forced))?;
    expect(&status, "web", "preserved", "vm-entry-v9")?;
    let status = host.update(to("/data", 'a'))?;
    expect(&status, "web", "running", "")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// Errors unless the host holds so many programs of earlier hosts. Returns the digest of the newest.
fn expect_programs(status: &Status, count: usize) -> Result<String, Failure> {
    match status.programs.last() {
        Some(newest) if status.programs.len() == count && newest.version.is_some() => {
            Ok(newest.digest.clone())
        }
        _ => Err(format!("the host should hold {count} programs: {status:?}").into()),
    }
}

fn hand_back(luo: Luo) -> Result<(), Failure> {
    let plan = misread(luo, ["entry-v1", "entry-v9"], &["web"]);
    let (mut host, status) = Host::boot(&plan)?;
    if !status.programs.is_empty() {
        return Err(format!("no host was here before: {status:?}").into());
    }
    host.wait_for_guests()?;
    let status = host.update(json!({"force": ["initramfs-documents"]}))?;
    expect(&status, "web", "preserved", "vm-entry-v9")?;
    let earlier = expect_programs(&status, 1)?;
    let refused = host.request(json!({"do": "recover"}));
    control::expect_refusal(&refused, "preserved", "vm-entry-v9")?;
    // The host cannot give a process what it does not know itself.
    let refused = host.request(json!({"do": "recover", "vm": "web", "with": "previous"}));
    control::expect_refusal(&refused, "preserved", "without a VM")?;
    let status = host.hand_back()?;
    expect(&status, "web", "running", "")?;
    let later = expect_programs(&status, 1)?;
    if later == earlier {
        return Err(format!("the program that was left should be held: {status:?}").into());
    }
    host.check_guests()?;
    // A program that has no path any more leaves like any other. The next host is the same program.
    let status = host.update(to("/data", 'a'))?;
    expect(&status, "web", "running", "")?;
    expect_programs(&status, 1)?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn one_by_one(luo: Luo) -> Result<(), Failure> {
    // In the state documents only: the host can read the manifest.
    let plan = misread(luo, ["serial-v1", "serial-v9"], &["web", "db"]);
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    let named = ["`initramfs-documents`", "VM `web`", "VM `db`", "serial-v1", "serial-v9"];
    host.expect_refusal_of_all("update", json!({}), &named)?;
    let status = host.update(json!({"force": ["initramfs-documents"]}))?;
    expect(&status, "web", "preserved", "serial-v9")?;
    expect(&status, "db", "preserved", "serial-v9")?;
    expect_programs(&status, 1)?;
    let refused = host.request(json!({"do": "recover"}));
    control::expect_refusal(&refused, "preserved", "serial-v9")?;
    for (name, other, state) in [("web", "db", "preserved"), ("db", "web", "running")] {
        let recover = json!({"do": "recover", "vm": name, "with": "previous"});
        let reply = host.request(recover.clone())?;
        if reply["recovered"] != json!([name]) {
            return Err(format!("the reply to `recover` of {name} is {reply}").into());
        }
        let status = host.status()?;
        expect(&status, name, "running", "")?;
        expect(&status, other, state, "")?;
        let program = status.vms.iter().find(|vm| vm.name == name).map(|vm| &vm.program);
        if program.is_none_or(|program| program.is_none()) {
            return Err(format!("{name} should run in an earlier program: {status:?}").into());
        }
        check_only(&host, name)?;
        let refused = host.request(recover);
        if !refused.as_ref().is_err_and(|error| error.to_string().contains("is running")) {
            return Err(format!("{name} was recovered twice: {refused:?}").into());
        }
    }
    host.check_guests()?;
    // The processes of the earlier program save what that program reads.
    let status = host.update(to("/data", 'a'))?;
    expect(&status, "web", "running", "")?;
    expect(&status, "db", "running", "")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn cpu_gone(luo: Luo) -> Result<(), Failure> {
    let extra_host = "missing-hints = \"refuse\"\n".to_owned();
    let plan = HostPlan { extra_host, ..HostPlan::new(vec![VmPlan::new("web", 128, 1)]) }.on(luo);
    let older = |lacks: &str| json!({"cmdline": format!("{} clearcpuid={lacks}", plan.cmdline())});
    let forced = json!({"do": "restore", "vm": "web", "force": true});
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    let to_older = with(to("/data", 'b'), older("avx2,erms"));
    let named = ["`cpu`", "VM `web`", "avx2 (`clearcpuid=avx2`)", "--without web"];
    host.expect_refusal_of_all("update", to_older.clone(), &named)?;
    let status = host.update(with(to_older, json!({"force": ["cpu"]})))?;
    expect(&status, "web", "preserved", "avx2")?;
    control::expect_refusal(&host.request(forced.clone()), "preserved", "avx2")?;
    // The CPU of this host has the feature, and lacks a hint only.
    let status = host.update(with(to("/data", 'a'), older("erms")))?;
    expect(&status, "web", "preserved", "erms")?;
    let unforced = host.request(json!({"do": "restore", "vm": "web"}));
    control::expect_refusal(&unforced, "preserved", "--force")?;
    host.request(forced)?;
    expect(&host.status()?, "web", "running", "")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}
