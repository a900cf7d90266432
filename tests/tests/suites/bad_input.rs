//! Invalid configurations and requests: each gives one clear error and leaves running VMs unharmed.

use perennial_tests::control::ControlError;
use perennial_tests::host::{Failure, Host};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, both, kernel};
use serde_json::json;

pub(crate) const TESTS: &[Test] = &[
    kernel("vms_that_are_too_much_together_do_not_all_start", too_much_together),
    both("requests_that_cannot_be_obeyed_are_refused_and_the_vm_runs_on", requests),
    kernel("a_configuration_that_is_wrong_is_named_in_the_status", first_configuration),
    both("vms_come_back_although_the_next_configuration_is_wrong", next_configuration),
    kernel("a_host_without_kvm_says_what_is_missing", no_kvm),
    kernel("a_host_without_luo_runs_vms_and_refuses_updates", no_luo),
];

fn requests(luo: Luo) -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&HostPlan::new(vec![VmPlan::new("web", 128, 1)]).on(luo))?;
    host.wait_for_guests()?;
    for (request, named) in [
        (json!({"do": "boot", "vm": "nobody"}), "nobody"),
        (json!({"do": "boot", "vm": "web"}), "web"),
        (json!({"do": "boot", "vm": "x".repeat(200)}), ""),
        (json!({"do": "resume", "vm": "web"}), "web"),
        (json!({"do": "report"}), ""),
        (json!({"do": "update", "stop_before": "lunch"}), "lunch"),
    ] {
        match host.request(request.clone()) {
            Err(ControlError::Refused { errors, .. }) if errors.join(": ").contains(named) => {}
            other => return Err(format!("{request}: {other:?}").into()),
        }
    }
    host.update(json!({}))?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

/// Wrong configurations, each with a text that the error must contain.
const WRONG: [(&str, &str); 6] = [
    ("[host]\ncontrol-port = \"perennial.control\"\nhostnaem = \"a\"\n", "hostnaem"),
    ("[[vm]]\nname = \"web\"\nmemory = \"size=0\"\nkernel = \"/k\"\n", "0 bytes of RAM"),
    (
        "[host]\ncontrol-port = \"perennial.control\"\n\
         [[vm]]\nname = \"web\"\nmemory = \"size=60G\"\nkernel = \"/k\"\n",
        "61440 MiB",
    ),
    (
        "[[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n\
         [[vm]]\nname = \"web\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n",
        "web",
    ),
    (
        "[[vm]]\nname = \"a-name-that-is-much-too-long-for-a-session-of-the-kernel-because-it-does-not-end\"\n\
         memory = \"size=64M\"\nkernel = \"/k\"\n",
        "a-name-that-is-much-too-long",
    ),
    ("this is not TOML", "line 1"),
];

fn first_configuration(_: Luo) -> Result<(), Failure> {
    for (wrong, named) in WRONG {
        // If the configuration cannot be read, the host uses the default name of the control port.
        let plan = HostPlan { config_a: Some(wrong.to_owned()), ..HostPlan::default() };
        let (host, status) = Host::boot(&plan)?;
        let said = status.config_error.clone().unwrap_or_default().join(": ")
            + &status.vms.iter().filter_map(|vm| vm.error.clone()).flatten().collect::<String>();
        if !said.contains(named) {
            return Err(format!("`{named}` is not named: {status:?}").into());
        }
        host.done();
    }
    Ok(())
}

fn too_much_together(_: Luo) -> Result<(), Failure> {
    // Each VM alone would fit. Both would fit only at first, while they have touched little of their RAM.
    let vms = vec![VmPlan::new("web", 512, 1), VmPlan::new("db", 512, 1)];
    let (mut host, status) =
        Host::boot(&HostPlan { memory_mib: Some(1024), ..HostPlan::new(vms) })?;
    let [web, db] = &status.vms[..] else { return Err(format!("{status:?}").into()) };
    let error = db.error.clone().unwrap_or_default().join(": ");
    if web.state != "running" || db.state != "failed" || !error.contains("for other VMs") {
        return Err(format!("the status does not say that both are too much: {status:?}").into());
    }
    host.forget_guest("db");
    host.wait_for_guests()?;
    host.update(json!({}))?;
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn next_configuration(luo: Luo) -> Result<(), Failure> {
    let plan = HostPlan {
        luo,
        edit_b: Some(|config| config.replace("hostname", "hostnaem")),
        ..HostPlan::new(vec![VmPlan::new("web", 128, 1)])
    };
    let (mut host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    let status = host.update(json!({}))?;
    if !status.config_error.clone().unwrap_or_default().join(": ").contains("hostnaem") {
        return Err(format!("the status does not name `hostnaem`: {status:?}").into());
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}

fn no_kvm(_: Luo) -> Result<(), Failure> {
    let plan = HostPlan { without_kvm: true, ..HostPlan::new(vec![VmPlan::new("web", 128, 1)]) };
    let (host, status) = Host::boot(&plan)?;
    let web = &status.vms[0];
    let error = web.error.clone().unwrap_or_default().join(": ");
    if web.state != "failed" || !error.contains("/dev/kvm") || !error.contains("nested") {
        return Err(format!("the status does not say that there is no KVM: {status:?}").into());
    }
    host.done();
    Ok(())
}

fn no_luo(_: Luo) -> Result<(), Failure> {
    let plan = HostPlan { without_luo: true, ..HostPlan::new(vec![VmPlan::new("web", 128, 1)]) };
    let (mut host, status) = Host::boot(&plan)?;
    if status.luo != "keeper" {
        return Err(format!("the backend should be `keeper`: {status:?}").into());
    }
    host.wait_for_guests()?;
    match host.try_update(json!({})) {
        Err(ControlError::Refused { errors, outcome })
            if outcome.as_deref() == Some("running")
                && errors.join(": ").contains("/dev/liveupdate")
                && errors.join(": ").contains("liveupdate=on") => {}
        other => return Err(format!("an update without LUO: {other:?}").into()),
    }
    host.check_guests()?;
    host.power_off_and_check_disks()
}
