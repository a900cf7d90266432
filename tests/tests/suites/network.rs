//! Guests on the network: connections from outside the host that live through updates.

use std::thread;
use std::time::{Duration, Instant};

use perennial_tests::foreground;
use perennial_tests::guest::Guest;
use perennial_tests::host::{Failure, Host, WORK};
use perennial_tests::network::HOST;
use perennial_tests::plan::{HostPlan, Luo, MUTE_MAC, VmPlan};
use perennial_tests::suite::{Test, both, kernel, seldom_on_pool};
use perennial_tests::wire::Sent;
use serde_json::{Value, json};

/// Updates while the connections are open.
const UPDATES: u64 = 3;
/// The largest packet of the guest with several queues.
const MTU: u32 = 1400;
/// Bytes that must come back after each.
const BYTES: u64 = 64 << 10;
/// Datagrams that must come back after each.
const DATAGRAMS: u64 = 20;

pub(crate) const TESTS: &[Test] = &[
    both("connections_from_outside_live_through_three_updates", updates),
    seldom_on_pool(
        "a_connection_lives_through_a_handover_an_undone_update_and_a_link_that_was_down",
        handovers,
    ),
    kernel("a_tap_may_vanish_and_may_be_brought_along", foreground::network),
];

fn vm(name: &str) -> VmPlan {
    VmPlan { network: true, ..VmPlan::new(name, 128, 1) }
}

/// Has the host ask for its own address.
fn by_dhcp(config: String) -> String {
    let network = config.lines().filter(|line| !line.starts_with("gateway = "));
    let ask = |line: &str| match line.starts_with("address = ") {
        true => "address = \"dhcp\"\n".to_owned(),
        false => format!("{line}\n"),
    };
    network.map(ask).collect()
}

/// Waits until the host has its address, which QEMU's user network would assign too.
fn wait_for_address(host: &mut Host) -> Result<(), Failure> {
    let wanted = format!("{HOST}/24");
    let deadline = Instant::now() + WORK;
    loop {
        match host.status()?.address {
            Some(address) if address == wanted => return Ok(()),
            other if Instant::now() > deadline => {
                return Err(format!("the host's address is {other:?} instead of {wanted}").into());
            }
            _ => thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Waits until both pairs of queues of the guest's network device have brought frames. Errors unless the device has the
/// largest packet of the configuration.
fn wait_for_both_pairs(guest: &Guest) -> Result<(), Failure> {
    let count = |notes: &[Value]| notes.iter().filter(|note| note["note"] == "net").count();
    let ask = || -> Result<[u64; 2], Failure> {
        let before = count(&guest.notes());
        guest.order("net")?;
        let notes = guest.wait_for_notes("its network", WORK, |all| count(all) > before)?;
        let note = notes.iter().rfind(|note| note["note"] == "net").ok_or("no note")?;
        if note["mtu"] != MTU || note["pairs"] != 2 {
            return Err(format!("its network device is {note}").into());
        }
        Ok(serde_json::from_value(note["received"].clone())?)
    };
    let (first, deadline) = (ask()?, Instant::now() + WORK);
    loop {
        match ask()? {
            now if now.iter().zip(first).all(|(now, first)| *now > first) => return Ok(()),
            now if Instant::now() > deadline => {
                return Err(format!("its queues have received {now:?}, at first {first:?}").into());
            }
            _ => guest.wait_for_heartbeats(5, WORK)?,
        }
    }
}

/// Waits until the host has announced the guest by the device of which the guest makes no use.
fn wait_for_announcement(host: &Host, before: Sent) -> Result<Sent, Failure> {
    let deadline = Instant::now() + WORK;
    loop {
        match host.sent_from(MUTE_MAC)? {
            sent if sent.others > 0 => {
                return Err(format!("the device was to be mute: {sent:?}").into());
            }
            sent if sent.announcements > before.announcements => return Ok(sent),
            sent if Instant::now() > deadline => {
                return Err(
                    format!("the guest is not announced: {sent:?}, before {before:?}").into()
                );
            }
            _ => thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn updates(luo: Luo) -> Result<(), Failure> {
    let several = VmPlan { queues: 2, cpus: 2, mtu: Some(MTU), ..vm("db") };
    let plan = HostPlan {
        edit_a: Some(by_dhcp),
        edit_b: Some(by_dhcp),
        ..HostPlan::new(vec![VmPlan { mute_net: true, ..vm("web") }, several]).on(luo)
    };
    let (mut host, status) = Host::boot(&plan)?;
    wait_for_address(&mut host)?;
    if status.config_error.is_some() {
        return Err(format!("the host says: {status:?}").into());
    }
    host.wait_for_guests()?;
    // The guest answers the two to `db` on different vCPUs.
    let connections = [host.connect("web")?, host.connect("db")?, host.connect("db")?];
    let datagrams = host.send_datagrams("web")?;
    for connection in &connections {
        connection.wait_for(BYTES, WORK)?;
    }
    wait_for_both_pairs(&host.guests()[1])?;
    datagrams.wait_for(DATAGRAMS, WORK)?;
    let mut announced = host.sent_from(MUTE_MAC)?;
    if announced != Sent::default() {
        return Err(format!("the mute device has sent before any update: {announced:?}").into());
    }
    for number in 1..=UPDATES {
        let after = host.update(json!({}))?;
        if after.live_updates != number || after.config_error.is_some() {
            return Err(format!("update {number}: {after:?}").into());
        }
        wait_for_address(&mut host)?;
        announced = wait_for_announcement(&host, announced)
            .map_err(|error| format!("after update {number}: {error}"))?;
        for connection in &connections {
            connection.wait_for(BYTES, WORK).map_err(|e| format!("after update {number}: {e}"))?;
        }
        wait_for_both_pairs(&host.guests()[1])
            .map_err(|error| format!("after update {number}: {error}"))?;
        datagrams.wait_for(DATAGRAMS, WORK).map_err(|e| format!("after update {number}: {e}"))?;
        host.check_guests().map_err(|error| format!("after update {number}: {error}"))?;
    }
    for connection in &connections {
        connection.finish(WORK)?;
    }
    let (sent, returned) = datagrams.finish()?;
    println!("{returned} of {sent} datagrams came back, each once");
    host.power_off_and_check_disks()
}

/// Takes the link of the guest's network device up or down, and waits until its `number`th carrier is so.
fn set_link(host: &mut Host, up: bool, number: usize) -> Result<(), Failure> {
    host.request(json!({"do": "link", "vm": "web", "up": up}))?;
    let guest = host.guests().first().ok_or("no guest")?;
    guest.order(if up { "carrier 1" } else { "carrier 0" })?;
    guest.wait_for_notes("a change of its carrier", WORK, |notes| {
        notes.iter().filter(|note| note["note"] == "carrier").count() >= number
    })?;
    wait_for_link(host, if up { "up" } else { "down" })
}

/// Waits until the status says so of the link of the only network device.
fn wait_for_link(host: &mut Host, wanted: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + WORK;
    loop {
        let links = host.status()?.vms.swap_remove(0).links;
        match links.values().collect::<Vec<_>>()[..] {
            [link] if link == wanted => return Ok(()),
            _ if Instant::now() > deadline => {
                return Err(format!("the links are {links:?} instead of {wanted}").into());
            }
            _ => thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn handovers(luo: Luo) -> Result<(), Failure> {
    let (mut host, _) = Host::boot(&HostPlan::new(vec![vm("web")]).on(luo))?;
    // It is fixed here.
    wait_for_address(&mut host)?;
    host.wait_for_guests()?;
    let connection = host.connect("web")?;
    connection.wait_for(BYTES, WORK)?;
    // The configuration in this initramfs makes no bridge.
    let found = host.request(json!({"do": "preflight", "initramfs": "/data/bad/stranger"}))?;
    let mut findings = found["findings"].as_array().into_iter().flatten();
    if !findings.any(|finding| finding["name"] == "bridge-hidden") {
        return Err(format!("the preflight does not miss the bridge: {found:#}").into());
    }
    set_link(&mut host, false, 1)?;
    host.hand_over(json!({}))?;
    // The new process of the VM has the operator's setting from the state document.
    wait_for_link(&mut host, "down")?;
    set_link(&mut host, true, 2)?;
    connection.wait_for(BYTES, WORK)?;
    // The last step before the jump: all devices were paused and saved.
    let reply = host.try_update(json!({"stop_before": "jump"}))?;
    if reply["outcome"] != "running" {
        return Err(format!("the update was not undone: {reply}").into());
    }
    connection.wait_for(BYTES, WORK)?;
    host.check_guests()?;
    connection.finish(WORK)?;
    host.power_off_and_check_disks()
}
