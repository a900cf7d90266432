//! Which frames the driver wants to receive (5.1.6.5.1, 5.1.6.5.2).

use super::MACS_MAX;
use crate::devices::interface::Mac;

/// Addresses that the driver wants frames for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MacTable {
    /// The addresses.
    pub macs: Vec<Mac>,
    /// Whether the driver gave more addresses than the device keeps: then all addresses are wanted.
    pub overflowed: bool,
}

impl MacTable {
    /// The table as the driver gave it.
    pub(super) fn new(macs: Vec<Mac>) -> Self {
        match macs.len() {
            0..=MACS_MAX => Self { macs, overflowed: false },
            _ => Self { macs: Vec::new(), overflowed: true },
        }
    }

    fn has(&self, mac: Mac) -> bool {
        self.overflowed || self.macs.contains(&mac)
    }
}

/// What the driver set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Whether all frames are wanted.
    pub promiscuous: bool,
    /// Whether all frames to groups are wanted.
    pub all_multicast: bool,
    /// Addresses of interfaces, besides the device's own.
    pub unicast: MacTable,
    /// Addresses of groups, besides broadcast.
    pub multicast: MacTable,
}

impl Default for Filter {
    /// After reset, and for a driver that knows no filter: all frames are wanted.
    fn default() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            unicast: MacTable::default(),
            multicast: MacTable::default(),
        }
    }
}

impl Filter {
    /// Whether a driver whose device has the address `own` wants a frame to `destination`.
    pub(super) fn wants(&self, own: Mac, destination: Mac) -> bool {
        let Self { promiscuous, all_multicast, unicast, multicast } = self;
        match destination {
            _ if *promiscuous => true,
            Mac::BROADCAST => true,
            group if group.is_multicast() => *all_multicast || multicast.has(group),
            one => one == own || unicast.has(one),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 1]);

    #[test]
    fn a_driver_gets_what_it_asked_for_and_broadcasts() {
        let wants =
            |filter: &Filter| [OWN, Mac::BROADCAST, OTHER, GROUP].map(|to| filter.wants(OWN, to));
        assert_eq!(wants(&Filter::default()), [true; 4]);
        let mut filter = Filter { promiscuous: false, ..Filter::default() };
        assert_eq!(wants(&filter), [true, true, false, false]);
        filter.multicast = MacTable::new(vec![GROUP]);
        assert_eq!(wants(&filter), [true, true, false, true]);
        filter.unicast = MacTable::new(vec![OTHER]);
        assert_eq!(wants(&filter), [true; 4]);
        let all_multicast = Filter { promiscuous: false, all_multicast: true, ..Filter::default() };
        assert_eq!(wants(&all_multicast), [true, true, false, true]);
    }

    #[test]
    fn a_table_that_is_too_long_lets_everything_through() {
        let kept = MacTable::new(vec![GROUP; MACS_MAX]);
        assert!(!kept.overflowed && kept.macs.len() == MACS_MAX);
        let table = MacTable::new(vec![GROUP; MACS_MAX + 1]);
        assert!(table.overflowed && table.macs.is_empty() && table.has(OTHER));
    }
}
