//! The links of a VM's network devices, as an operator sees and sets them.

use std::collections::BTreeMap;

use super::guest::{Guest, GuestError, Life};
use crate::devices::network::Link;
use crate::link::Request;

impl Guest {
    /// Returns the links of the VM's network devices, by node. Empty if the VM has no process.
    pub fn links(&self) -> BTreeMap<String, Link> {
        match &self.life {
            Life::Live(live) => live.process.told().links().clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Takes the link of a network device up or down, or of all if none is named.
    pub fn set_link(&self, device: Option<&str>, up: bool) -> Result<(), GuestError> {
        let Life::Live(live) = &self.life else {
            let remedy = "only a VM that runs or is paused has links";
            return Err(self.wrong_state(remedy));
        };
        let links = live.process.told().links().clone();
        let wanted = |node: &&String| device.is_none_or(|device| device == *node);
        let chosen: Vec<&String> = links.keys().filter(wanted).collect();
        if chosen.is_empty() {
            let known: Vec<&str> = links.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let device = device.unwrap_or("any").to_owned();
            return Err(GuestError::NoNetworkDevice { name: self.name(), device, known });
        }
        // A process that hangs must not delay the host, so nobody waits for its answer.
        chosen.into_iter().try_for_each(|node| {
            let request = Request::SetLink { device: node.clone(), up };
            let sent = live.process.notify(request);
            sent.map_err(|source| GuestError::Process { name: self.name(), source })
        })
    }

    /// Returns the devices whose link the operator has taken down.
    pub(super) fn links_down(&self) -> Vec<String> {
        let down = self.links().into_iter().filter(|(_, link)| *link == Link::Down);
        down.map(|(node, _)| node).collect()
    }

    /// Takes the links of these devices down again, after a reset of the guest: its machine is a new one.
    pub(super) fn take_down(&self, devices: &[String]) {
        for device in devices {
            if let Err(error) = self.set_link(Some(device), false) {
                tracing::warn!("{}", crate::causes::chain(&error).join(": "));
            }
        }
    }
}
