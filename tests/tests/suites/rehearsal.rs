//! Rehearsals of live updates: the next kernel and the next host in a VM of the host.

use std::time::Duration;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, kernel, pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[kernel(
    "what_would_not_arrive_is_refused_in_a_rehearsal_and_what_would_is_updated_to",
    rehearse,
)];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] =
    &[pool("a_stock_kernel_with_modules_reports_in_a_rehearsal", with_modules)];

/// How long a rehearsal may take: a kernel boots in a VM of a VM that is emulated.
const WITHIN_S: u64 = 180;

fn rehearse(luo: Luo) -> Result<(), Failure> {
    // The program of the next host knows a binding of state documents by another name.
    let binding = Some(["serial-v1", "serial-v9"]);
    let vm = VmPlan::new("web", 128, 1);
    let plan = HostPlan {
        luo,
        other_binding_b: binding,
        edit_a: Some(rehearsing),
        ..HostPlan::new(vec![vm])
    };
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;

    let good = json!({"kernel": "/data/a/bzImage", "initramfs": "/data/a/initramfs"});
    let without_init = with(&good, json!({"initramfs": "/data/bad/no-init"}));
    let rehearsal = host.send(call(&without_init))?;
    // The host serves meanwhile: nothing was paused or replaced.
    let before = process(&mut host)?;
    for command in ["rehearse", "update", "handover"] {
        host.expect_refusal(command, json!({}), "a rehearsal runs")?;
    }
    let answer = host.reply(rehearsal)?;
    expect_finding(&answer, "rehearsal-boot", "Kernel panic")?;
    // And without landlock, which the configuration requires.
    let older_cpu = format!("{} clearcpuid=avx2,erms lsm=capability", plan.cmdline());
    let answer = rehearsal_of(&mut host, &with(&good, json!({"cmdline": older_cpu})))?;
    expect_finding(&answer, "rehearsal-cpu", "avx2")?;
    expect_finding(&answer, "rehearsal-confinement", "landlock")?;
    // Without virtualisation in the VM, its /proc/cpuinfo has to tell.
    let not_nested = format!("{} clearcpuid=avx2,svm", plan.cmdline());
    let answer = rehearsal_of(&mut host, &with(&good, json!({"cmdline": not_nested})))?;
    expect_finding(&answer, "rehearsal-cpu", "avx2")?;
    if !answer.to_string().contains("rehearsal-cpu-unknown") {
        return Err(format!("the VM has virtualisation: {answer:#}").into());
    }
    let without_luo = with(&good, json!({"kernel": "/data/guest/bzImage"}));
    expect(&mut host, without_luo, "rehearsal-luo", "/dev/liveupdate")?;
    // No kernel boots in a VM, and its host reports, in that time.
    let hangs = with(&good, json!({"rehearse_within_s": 1}));
    expect(&mut host, hangs, "rehearsal-boot", "did not report within 1 s")?;

    let after = process(&mut host)?;
    if after != before {
        return Err(format!("during a rehearsal {before}, after all {after}").into());
    }
    host.check_guests()?;
    host.update(rehearsed(&good))?;
    host.check_guests()?;
    // Now the documents are those of a VM that was restored. The preflight shows them to the next program, too.
    expect(&mut host, json!({}), "rehearsal-documents", "serial-v9")?;
    let named = ["`initramfs-documents`", "VM `web`", "serial-v1", "serial-v9"];
    host.expect_refusal_of_all("update", json!({}), &named)?;
    // The configuration has each update rehearsed.
    let hangs = with(&good, json!({"rehearse_within_s": 1}));
    host.expect_refusal("update", hangs.clone(), "did not report within 1 s")?;
    let unrehearsed = with(&hangs, json!({"rehearse": false, "stop_before": "load"}));
    let answer = host.try_update(unrehearsed)?;
    if answer["stopped_before"] != "load" {
        return Err(format!("not an update without rehearsal: {answer:#}").into());
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// Changes a configuration so that updates are rehearsed.
fn rehearsing(config: String) -> String {
    let lines = format!("[update]\nrehearse = true\nrehearse-within-s = {WITHIN_S}\n");
    config.replace("[update]\n", &lines)
}

/// A distribution's kernel, whose next host loads modules, KVM among them.
fn with_modules(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan::new(vec![VmPlan::new("web", 128, 1)]).on(luo);
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    let side_a = json!({"kernel": "/data/a/bzImage", "initramfs": "/data/a/initramfs"});
    let answer = rehearsal_of(&mut host, &side_a)?;
    if answer["refused"] == true {
        return Err(format!("refused: {answer:#}").into());
    }
    // Without `erms` as well, Linux 6.1 hangs: it takes `fsrm` for a promise of it (arch/x86/lib/memmove_64.S).
    let older_cpu =
        with(&side_a, json!({"cmdline": format!("{} clearcpuid=avx2", plan.cmdline())}));
    expect(&mut host, older_cpu, "rehearsal-cpu", "avx2")?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// The VMs of the host, with their states and processes.
fn process(host: &mut Host) -> Result<Value, Failure> {
    let status = host.request(json!({"do": "status"}))?;
    let vms = status["vms"].as_array().cloned().unwrap_or_default();
    Ok(vms.iter().map(|vm| json!([vm["name"], vm["state"], vm["pid"]])).collect())
}

fn with(arguments: &Value, more: Value) -> Value {
    let mut arguments = arguments.clone();
    if let (Value::Object(arguments), Value::Object(more)) = (&mut arguments, more) {
        arguments.extend(more);
    }
    arguments
}

fn rehearsed(arguments: &Value) -> Value {
    with(arguments, json!({"rehearse": true, "rehearse_within_s": WITHIN_S}))
}

/// The request to rehearse an update with these arguments.
fn call(arguments: &Value) -> Value {
    with(&json!({"do": "rehearse", "rehearse_within_s": WITHIN_S}), arguments.clone())
}

/// Rehearses an update with these arguments. Errors unless it is refused by this name, with `named` in the sentence.
fn expect(host: &mut Host, arguments: Value, refusal: &str, named: &str) -> Result<(), Failure> {
    let answer = rehearsal_of(host, &arguments)?;
    expect_finding(&answer, refusal, named)
}

/// The answer to a rehearsal of an update with these arguments.
fn rehearsal_of(host: &mut Host, arguments: &Value) -> Result<Value, Failure> {
    Ok(host.request_within(call(arguments), Duration::from_secs(WITHIN_S + 60))?)
}

fn expect_finding(answer: &Value, refusal: &str, named: &str) -> Result<(), Failure> {
    let findings = answer["findings"].as_array().cloned().unwrap_or_default();
    let found = findings.iter().find(|f| f["name"] == refusal && f["severity"] == "refusal");
    let sentence = found.and_then(|finding| finding["sentence"].as_str()).unwrap_or_default();
    match answer["refused"] == true && sentence.contains(named) {
        true => Ok(()),
        false => Err(format!("not refused by `{refusal}` with `{named}`: {answer:#}").into()),
    }
}
