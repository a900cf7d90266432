//! Whether the next host makes the bridges that the VMs' taps are ports of. A host that is the first process makes the
//! bridge of its own configuration, and nobody else is there to make another one.

use super::{Check, Finding, Surroundings};
use crate::config::Config;
use crate::devices::needs::HostNeed;
use crate::machine::VmName;

/// Checks that `next`, the next host's configuration, names each bridge that a VM with a process needs.
pub(super) fn check(surroundings: &Surroundings<'_>, next: Option<&Config>) -> Vec<Finding> {
    let Some(next) = next.filter(|_| surroundings.is_first_process) else { return Vec::new() };
    let there = next.host.network.as_ref().and_then(|network| network.bridge.as_deref());
    surroundings.device_needs().filter_map(|(vm, need)| hidden(vm, &need, there)).collect()
}

fn hidden(vm: &VmName, need: &HostNeed, there: Option<&str>) -> Option<Finding> {
    let HostNeed::Bridge(bridge) = need else { return None };
    let makes = match there {
        Some(there) if there == bridge => return None,
        Some(there) => format!("makes only the bridge {there}"),
        None => "makes no bridge".to_owned(),
    };
    let sentence = format!(
        "VM `{vm}` has a tap on the bridge {bridge}, and `[host.network]` of the next configuration {makes}"
    );
    let remedy = format!("add `bridge = \"{bridge}\"` to the configuration in the initramfs");
    Some(Finding::new(Check::BridgeHidden, format!("VM `{vm}`"), sentence, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_host_must_make_the_bridge_of_a_tap() {
        let (vm, need) = (VmName::new("web").unwrap(), HostNeed::Bridge("br0".to_owned()));
        assert_eq!(hidden(&vm, &need, Some("br0")), None);
        assert_eq!(hidden(&vm, &HostNeed::Driver { module: "tun", of: "taps" }, None), None);
        for (there, says) in [(None, "makes no bridge"), (Some("br1"), "only the bridge br1")] {
            let finding = hidden(&vm, &need, there).unwrap();
            assert_eq!((finding.name, finding.can_be_forced), (Check::BridgeHidden, true));
            let text = finding.to_string();
            assert!(text.contains(says) && text.contains("`web`"), "{text}");
            assert!(text.contains("`bridge = \"br0\"`"), "{text}");
        }
    }
}
