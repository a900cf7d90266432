//! The power button: guests that obey it, a guest that ignores it, and what the host does meanwhile.

use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::suite::{Test, seldom_on_pool};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] =
    &[seldom_on_pool("guests_are_asked_to_shut_down_and_those_that_do_not_are_ended", button)];

/// Longer than any test.
const LATER: u32 = 3600;

fn button(luo: Luo) -> Result<(), Failure> {
    let obeys = |name| VmPlan { parameters: "perennial.button=obey", ..VmPlan::new(name, 96, 1) };
    let vms = vec![obeys("web"), obeys("db"), VmPlan::new("mute", 96, 1)];
    let extra_host = "stop-within-s = 5\n".to_owned();
    let (mut host, _) = Host::boot(&HostPlan { extra_host, ..HostPlan::new(vms) }.on(luo))?;
    host.wait_for_guests()?;
    for guest in &host.guests()[..2] {
        guest.wait_for_note("button", WORK)?;
    }

    // One client of the control port after another is served, also one that has left in the middle of a line.
    for _ in 0..3 {
        host.connect_again()?;
        expect_states(&mut host, &["running"; 3])?;
    }

    // A guest that ignores the button keeps nothing else waiting.
    let asked = host.send(json!({"do": "stop", "vm": "mute", "within_s": LATER}))?;
    expect_states(&mut host, &["running", "running", "stopping"])?;
    host.expect_refusal("update", json!({}), "`mute` is stopping")?;
    host.expect_refusal("handover", json!({}), "`mute` is stopping")?;
    let at_once = host.send(json!({"do": "stop", "vm": "mute", "now": true}))?;
    for request in [asked, at_once] {
        expect_end(&host.reply(request)?, "pulled")?;
    }
    expect_states(&mut host, &["running", "running", "stopped"])?;
    host.forget_guest("mute");

    // The button works after a live update as well. A guest that has no time is not asked for long.
    host.update(json!({}))?;
    host.check_guests()?;
    expect_end(&host.request(json!({"do": "stop", "vm": "web"}))?, "by-guest")?;
    host.request(json!({"do": "boot", "vm": "mute"}))?;
    expect_end(&host.request(json!({"do": "stop", "vm": "mute", "within_s": 1}))?, "pulled")?;

    // The host's end is the end of all guests, with one deadline.
    host.request(json!({"do": "boot", "vm": "mute"}))?;
    let console = host.shut_down()?;
    for line in ["VM `db` has shut down", "VM `mute`: its guest did not shut down in time"] {
        if !console.contains(line) {
            return Err(format!("the host did not say `{line}`:\n{console}").into());
        }
    }
    Ok(())
}

fn expect_end(reply: &Value, how: &str) -> Result<(), Failure> {
    match reply["ended"] == how {
        true => Ok(()),
        false => Err(format!("the VM should have ended {how}, the reply is {reply}").into()),
    }
}

fn expect_states(host: &mut Host, expected: &[&str]) -> Result<(), Failure> {
    let vms = host.status()?.vms;
    match vms.iter().map(|vm| vm.state.as_str()).eq(expected.iter().copied()) {
        true => Ok(()),
        false => Err(format!("the VMs are not {expected:?}: {vms:?}").into()),
    }
}
