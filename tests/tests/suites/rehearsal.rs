//! Rehearsals of live updates: the next kernel and the next host in a VM of the host.

use std::time::Duration;

use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, kernel};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[kernel(
    "what_would_not_arrive_is_refused_in_a_rehearsal_and_what_would_is_updated_to",
    rehearse,
)];

/// How long a rehearsal may take: a kernel boots in a VM of a VM that is emulated.
const WITHIN_S: u64 = 180;

fn rehearse(luo: Luo) -> Result<(), Failure> {
    // The program of the next host knows a binding of state documents by another name. No preflight sees that.
    let binding = Some(["serial-v1", "serial-v9"]);
    let vm = VmPlan::new("web", 128, 1);
    let plan = HostPlan { luo, other_binding_b: binding, ..HostPlan::new(vec![vm]) };
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
    let older_cpu = format!("{} clearcpuid=avx2,erms", plan.cmdline());
    expect(&mut host, with(&good, json!({"cmdline": older_cpu})), "rehearsal-cpu", "avx2")?;
    let without_luo = with(&good, json!({"kernel": "/data/guest/bzImage"}));
    expect(&mut host, without_luo, "rehearsal-luo", "/dev/liveupdate")?;
    let hangs = with(&good, json!({"rehearse_within_s": 0}));
    expect(&mut host, hangs, "rehearsal-boot", "did not report within 0 s")?;

    let after = process(&mut host)?;
    if after != before {
        return Err(format!("during a rehearsal {before}, after all {after}").into());
    }
    host.check_guests()?;
    host.update(rehearsed(&good))?;
    host.check_guests()?;
    // Now the documents are those of a VM that was restored.
    host.expect_refusal("update", rehearsed(&json!({})), "serial-v9")?;
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
    let answer = host.request_within(call(&arguments), Duration::from_secs(WITHIN_S + 60))?;
    expect_finding(&answer, refusal, named)
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
