//! Sets up the network interfaces of `[host.network]` (PID 1 only): loopback, a bridge, its uplink, and
//! the host's own address.
//!
//! Interfaces that are already set up stay as they are. The network devices open their taps themselves.

use std::io;
use std::net::Ipv4Addr;

use super::dhcp;
use crate::causes::chain;
use crate::config::{Address, HostAddress, HostSection, NetworkSection};
use crate::devices::files::wait_for_device;
use crate::devices::interface::{Interface, set_gateway};

/// The loopback interface.
const LOOPBACK: &str = "lo";

/// A step of setting up the network failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetworkError {
    /// The uplink does not exist.
    #[error(
        "[host.network] uplink: there is no interface `{name}`; `[host] modules` has to list the module \
         of its hardware"
    )]
    NoUplink {
        /// Name of the uplink.
        name: String,
    },
    /// The kernel refused a step.
    #[error("[host.network]: cannot {attempt} {interface}")]
    Step {
        /// The step.
        attempt: &'static str,
        /// The interface.
        interface: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The default route cannot be set.
    #[error("[host.network]: cannot make {gateway} the gateway")]
    Gateway {
        /// The address.
        gateway: Ipv4Addr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Sets up loopback and the network of `[host.network]`. Returns the steps that failed; the others are done.
pub(super) fn set_up(host: &HostSection) -> Vec<NetworkError> {
    let none = NetworkSection::default();
    let section = host.network.as_ref().unwrap_or(&none);
    let NetworkSection { bridge, uplink, address, gateway } = section;
    // The host does not need loopback, and a kernel may be built without IP, so an error is ignored.
    if let Err(error) = step("switch on", LOOPBACK, Interface::set_up) {
        tracing::warn!("{}", chain(&error).join(": "));
    }
    let mut failed = Vec::new();
    let mut attempt = |result: Result<(), NetworkError>| failed.extend(result.err());
    if let Some(bridge) = bridge {
        attempt(step("make the bridge", bridge, |new| new.make_bridge().map(drop)));
    }
    if let Some(uplink) = uplink {
        attempt(connect(uplink, bridge.as_deref()));
    }
    if let Some(bridge) = bridge {
        attempt(step("switch on", bridge, Interface::set_up));
    }
    if let (Some(address), Some(own)) = (address, section.own_interface()) {
        attempt(match address {
            HostAddress::Dhcp => step("ask by DHCP for an address of", own, |own| {
                dhcp::start(own, uplink.as_deref().unwrap_or(own.name()), host)
            }),
            HostAddress::Fixed(Address { address, prefix }) => {
                step("give its address to", own, |own| own.set_address(*address, *prefix))
            }
        });
    }
    if let Some(gateway) = *gateway {
        let set = set_gateway(gateway);
        attempt(set.map_err(|source| NetworkError::Gateway { gateway, source }));
    }
    failed
}

/// Returns the host's own address in the form `192.0.2.5/24`, if it has one.
pub(super) fn own_address(section: &NetworkSection) -> Option<String> {
    let interface = Interface::new(section.own_interface()?).ok()?;
    interface.address().ok()?.map(|(address, prefix)| format!("{address}/{prefix}"))
}

/// Switches the uplink on, and makes it a port of the bridge.
fn connect(uplink: &str, bridge: Option<&str>) -> Result<(), NetworkError> {
    let is_there = || Interface::new(uplink).ok().filter(Interface::exists);
    if wait_for_device(is_there).is_none() {
        return Err(NetworkError::NoUplink { name: uplink.to_owned() });
    }
    if let Some(bridge) = bridge {
        step("put into the bridge", uplink, |uplink| uplink.add_to(bridge))?;
        // By default a bridge has the lowest address of its ports, which would change whenever a guest's tap
        // is added or removed.
        step("give the address of its uplink to", bridge, |bridge| {
            bridge.set_mac(Interface::new(uplink)?.mac()?)
        })?;
    }
    step("switch on", uplink, Interface::set_up)
}

fn step(
    attempt: &'static str,
    name: &str,
    change: impl FnOnce(&Interface) -> io::Result<()>,
) -> Result<(), NetworkError> {
    Interface::new(name)
        .and_then(|interface| change(&interface))
        .map_err(|source| NetworkError::Step { attempt, interface: name.to_owned(), source })
}
