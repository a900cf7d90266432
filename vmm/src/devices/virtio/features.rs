//! Feature bits, their names, and what a driver may accept.

/// Names of feature bits, for errors.
pub type Names = &'static [(u32, &'static str)];

/// The driver may use `used_event`, the device `avail_event` (2.7.10).
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// A chain may be in a separate, indirect descriptor table (2.7.5.3).
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// The device follows version 1 of the specification (section 6).
pub const VERSION_1: u64 = 1 << 32;

/// The driver may reset one queue and leave the others as they are (2.6.1).
pub const RING_RESET: u64 = 1 << 40;

/// The features that the transport offers in addition to each device's features.
pub const TRANSPORT: u64 = RING_EVENT_IDX | RING_INDIRECT_DESC | VERSION_1 | RING_RESET;

/// Names of bits that are the same for all devices (section 6).
const COMMON: Names = &[
    (24, "NOTIFY_ON_EMPTY"),
    (28, "RING_INDIRECT_DESC"),
    (29, "RING_EVENT_IDX"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];

/// Returns the names of all bits in `bits`, separated by commas. A bit without a name is given as
/// `bit` and its number.
pub fn names(bits: u64, device: Names) -> String {
    let name = |bit: u32| {
        device
            .iter()
            .chain(COMMON)
            .find(|(known, _)| *known == bit)
            .map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
    };
    let names: Vec<String> = (0..64).filter(|bit| bits >> bit & 1 != 0).map(name).collect();
    names.join(", ")
}

/// Returns whether a driver may accept `accepted` out of `offered`: only offered bits, and always
/// `VERSION_1`. A driver without `VERSION_1` is a legacy driver, which these devices do not support
/// (6.1, 6.2).
pub fn acceptable(accepted: u64, offered: u64) -> bool {
    accepted & !offered == 0 && accepted & VERSION_1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_names_or_numbers() {
        assert_eq!(
            names(VERSION_1 | 1 << 9 | 1 << 60, &[(9, "FLUSH")]),
            "FLUSH, VERSION_1, bit 60"
        );
        assert_eq!(names(0, &[]), "");
    }

    #[test]
    fn a_driver_must_accept_version_1_and_only_what_is_offered() {
        assert!(acceptable(VERSION_1, TRANSPORT));
        assert!(!acceptable(RING_EVENT_IDX, TRANSPORT));
        assert!(!acceptable(VERSION_1 | 1, TRANSPORT));
    }
}
