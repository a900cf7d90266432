//! The state of a network device.

use super::{Driver, Filter, MACS_MAX, MTU_MAX, MTU_MIN, MacTable, Net, PAIRS_MAX, Shared, Wire};
use crate::devices::interface::Mac;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// A network device cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel refuses to use the right number of the tap's queues.
    #[error("cannot choose the queues of tap {tap}")]
    Queues {
        /// The tap.
        tap: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The host has opened another number of queues than the state has.
    #[error("the state has {saved} pairs of queues, the host has opened {here} of tap {tap}")]
    Pairs {
        /// The tap.
        tap: String,
        /// In the state.
        saved: u16,
        /// Of the tap.
        here: usize,
    },
}

/// `perennial,virtio-net-v1`. The transport has the negotiated features, which decide the tap's offloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioNetStateV1 {
    /// The address that the driver finds after reset.
    pub mac: Mac,
    /// The address in use.
    pub current_mac: Mac,
    /// The largest packet in bytes; `None` if the device does not offer MTU.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// Pairs of queues in use.
    pub active_pairs: u16,
    /// The frames that the driver wants.
    pub filter: Filter,
    /// Whether the driver was asked to announce itself and has not confirmed it.
    pub announce: bool,
    /// Whether the operator has taken the link down.
    pub link_down: bool,
}

impl Schema for VirtioNetStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-net-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { mac, current_mac, mtu, queue_pairs, active_pairs, filter, announce, link_down } =
            self;
        let Filter { promiscuous, all_multicast, unicast, multicast } = filter;
        node.put_bytes("mac", &mac.0);
        node.put_bytes("current-mac", &current_mac.0);
        node.put_u32("mtu", mtu.unwrap_or(0).into());
        node.put_u32("queue-pairs", (*queue_pairs).into());
        node.put_u32("active-pairs", (*active_pairs).into());
        node.put_bool("promiscuous", *promiscuous);
        node.put_bool("all-multicast", *all_multicast);
        for (property, overflowed, table) in [
            ("unicast", "unicast-overflowed", unicast),
            ("multicast", "multicast-overflowed", multicast),
        ] {
            let MacTable { macs, overflowed: is_overflowed } = table;
            node.put_bytes(property, &macs.iter().flat_map(|mac| mac.0).collect::<Vec<u8>>());
            node.put_bool(overflowed, *is_overflowed);
        }
        node.put_bool("announce", *announce);
        node.put_bool("link-down", *link_down);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let mac = read_mac(reader, "mac")?;
        let current_mac = read_mac(reader, "current-mac")?;
        let mtu = match reader.narrow("mtu")? {
            0 => None,
            mtu => Some(within(reader, "mtu", mtu, MTU_MIN, MTU_MAX)?),
        };
        let queue_pairs = reader.narrow("queue-pairs")?;
        let queue_pairs = within(reader, "queue-pairs", queue_pairs, 1, PAIRS_MAX as u16)?;
        let active_pairs = reader.narrow("active-pairs")?;
        let active_pairs = within(reader, "active-pairs", active_pairs, 1, queue_pairs)?;
        let filter = Filter {
            promiscuous: reader.bool("promiscuous")?,
            all_multicast: reader.bool("all-multicast")?,
            unicast: read_table(reader, "unicast", "unicast-overflowed")?,
            multicast: read_table(reader, "multicast", "multicast-overflowed")?,
        };
        let announce = reader.bool("announce")?;
        let link_down = reader.bool("link-down")?;
        Ok(Self { mac, current_mac, mtu, queue_pairs, active_pairs, filter, announce, link_down })
    }
}

fn read_mac(reader: &mut Reader<'_>, property: &str) -> Result<Mac, StateError> {
    let mac = Mac(reader.array(property)?);
    match mac.is_of_interface() {
        true => Ok(mac),
        false => Err(reader.invalid(property, format!("{mac} is no address of an interface"))),
    }
}

fn within(
    reader: &Reader<'_>,
    property: &str,
    value: u16,
    least: u16,
    most: u16,
) -> Result<u16, StateError> {
    match (least..=most).contains(&value) {
        true => Ok(value),
        false => Err(reader.invalid(property, format!("{value} is not from {least} to {most}"))),
    }
}

fn read_table(
    reader: &mut Reader<'_>,
    property: &str,
    overflowed: &str,
) -> Result<MacTable, StateError> {
    let (macs, rest) = reader.bytes(property)?.as_chunks();
    if !rest.is_empty() || macs.len() > MACS_MAX {
        let problem = format!("it is not 0 to {MACS_MAX} addresses of 6 bytes");
        return Err(reader.invalid(property, problem));
    }
    let macs = macs.iter().map(|mac| Mac(*mac)).collect();
    Ok(MacTable { macs, overflowed: reader.bool(overflowed)? })
}

impl Persist for Net {
    type State = VirtioNetStateV1;
    type Resources = Wire;
    type Error = NetError;

    fn save(&self) -> Result<VirtioNetStateV1, NetError> {
        // The transport saves the sizes of the queues. If the device is paused before it has announced its
        // guest, the next restore announces the guest.
        let Self { shared, queue_sizes: _, restored: _ } = self;
        // The host opens the tap by its name again; the transport saves the features. At worst another refusal of the
        // tap is logged.
        let Shared { name: _, taps, mac, mtu, features: _, driver, on_link: _, reported: _ } =
            &**shared;
        let driver = crate::mutex::lock(driver);
        let Driver {
            mac: current_mac,
            filter,
            pairs,
            announce,
            // A restored device always announces its guest, and its tap exists.
            announcements: _,
            tap_gone: _,
            link_down,
        } = &*driver;
        Ok(VirtioNetStateV1 {
            mac: *mac,
            current_mac: *current_mac,
            mtu: *mtu,
            queue_pairs: taps.len() as u16,
            active_pairs: *pairs,
            filter: filter.clone(),
            announce: *announce,
            link_down: *link_down,
        })
    }

    fn restore(state: VirtioNetStateV1, wire: Wire) -> Result<Self, NetError> {
        let VirtioNetStateV1 {
            mac,
            current_mac,
            mtu,
            queue_pairs,
            active_pairs,
            filter,
            announce,
            link_down,
        } = state;
        let here = wire.taps.len();
        if usize::from(queue_pairs) != here {
            return Err(NetError::Pairs { tap: wire.name, saved: queue_pairs, here });
        }
        let driver = Driver {
            mac: current_mac,
            filter,
            pairs: active_pairs,
            announce,
            announcements: 0,
            link_down,
            tap_gone: false,
        };
        Self::with(wire, mac, mtu, driver, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{VirtioPciStateV2, VirtioState};
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    const OTHER: Mac = Mac([2, 9, 8, 7, 6, 5]);

    pub(crate) fn sample() -> VirtioNetStateV1 {
        VirtioNetStateV1 {
            mac: Mac([2, 1, 2, 3, 4, 5]),
            current_mac: Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            mtu: Some(9000),
            queue_pairs: 4,
            active_pairs: 2,
            filter: Filter {
                promiscuous: true,
                all_multicast: true,
                unicast: MacTable { macs: vec![OTHER], overflowed: true },
                multicast: MacTable {
                    macs: vec![Mac([1, 0, 0x5e, 0, 0, 1]), Mac([0x33, 0x33, 0, 0, 0, 1])],
                    overflowed: true,
                },
            },
            announce: true,
            link_down: true,
        }
    }

    contract_tests! {
        VirtioState<VirtioNetStateV1>,
        sample: || VirtioState { device: sample(), transport: VirtioPciStateV2::sample() },
        changes: [
            |s| s.device.mac = OTHER,
            |s| s.device.current_mac = OTHER,
            |s| s.device.mtu = None,
            |s| s.device.queue_pairs = 3,
            |s| s.device.active_pairs = 1,
            |s| s.device.filter.promiscuous = false,
            |s| s.device.filter.all_multicast = false,
            |s| s.device.filter.unicast.macs.clear(),
            |s| s.device.filter.unicast.overflowed = false,
            |s| s.device.filter.multicast.macs.push(OTHER),
            |s| s.device.filter.multicast.overflowed = false,
            |s| s.device.announce = false,
            |s| s.device.link_down = false,
            |s| s.transport.isr += 1,
        ],
        golden: "virtio-net-v1",
    }

    #[test]
    fn a_state_that_no_driver_brings_about_is_refused_by_its_property() {
        type Change = fn(&mut VirtioNetStateV1);
        let changes: [(&str, Change); 8] = [
            ("mac", |s| s.mac = Mac::BROADCAST),
            ("current-mac", |s| s.current_mac = Mac([0; 6])),
            ("mtu", |s| s.mtu = Some(67)),
            ("mtu", |s| s.mtu = Some(65_535)),
            ("queue-pairs", |s| s.queue_pairs = 9),
            ("active-pairs", |s| s.active_pairs = 0),
            ("active-pairs", |s| s.active_pairs = 5),
            ("unicast", |s| s.filter.unicast.macs = vec![OTHER; MACS_MAX + 1]),
        ];
        for (property, change) in changes {
            let mut state = sample();
            change(&mut state);
            let error = read_node::<VirtioNetStateV1>(&state.to_node("net"), "/").unwrap_err();
            let expected = format!("/net: property `{property}`");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
    }
}
