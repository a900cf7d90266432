//! The capability VIRTIO_PCI_CAP_PCI_CFG (4.1.4.9): a window in the configuration space through which firmware
//! reaches the registers in the BAR before it has mapped the BAR.
//!
//! The driver writes BAR, offset and length into the capability. Then an access to its last four bytes reads or
//! writes the register there. The capability is the last one of the function, so that the others lie where they
//! lay before it existed.

use super::BAR_SIZE;
use crate::devices::pci::ConfigSpace;
use crate::state::{Node, Reader, Schema, StateError};

/// Offsets in the capability (4.1.4).
const BAR: usize = 4;
const OFFSET: usize = 8;
const LENGTH: usize = 12;
const DATA: usize = 16;
/// Length of the capability in bytes.
pub(super) const LEN: usize = 20;

/// What a driver has written into the capability. `perennial,virtio-config-access-v1`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConfigAccessStateV1 {
    /// Index of the BAR.
    pub bar: u8,
    /// Offset in the BAR, in bytes.
    pub offset: u32,
    /// Length of the access, in bytes.
    pub length: u32,
    /// The data that was read or written last.
    pub data: [u8; 4],
}

impl ConfigAccessStateV1 {
    /// Reads the capability at `capability` of `config`.
    pub(super) fn read(config: &ConfigSpace, capability: u8) -> Self {
        let at = |offset| usize::from(capability) + offset;
        Self {
            bar: config.get::<1>(at(BAR))[0],
            offset: u32::from_le_bytes(config.get(at(OFFSET))),
            length: u32::from_le_bytes(config.get(at(LENGTH))),
            data: config.get(at(DATA)),
        }
    }

    /// Writes the capability at `capability` of `config`.
    pub(super) fn write(&self, config: &mut ConfigSpace, capability: u8) {
        let Self { bar, offset, length, data } = self;
        let at = |offset| usize::from(capability) + offset;
        config.set(at(BAR), &[*bar]);
        config.set(at(OFFSET), &offset.to_le_bytes());
        config.set(at(LENGTH), &length.to_le_bytes());
        config.set(at(DATA), data);
    }

    /// Returns offset and length of the register that the driver has chosen, or `None` if there cannot be one:
    /// BAR 0 is the only one, and an access has 1, 2 or 4 bytes and is aligned (4.1.4.9.2).
    pub(super) fn register(&self) -> Option<(u64, usize)> {
        let Self { bar, offset, length, data: _ } = *self;
        let aligned = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        let within = offset.checked_add(length).is_some_and(|end| end <= BAR_SIZE);
        (bar == 0 && aligned && within).then_some((offset.into(), length as usize))
    }

    /// Whether an access to `len` bytes of the configuration space at `offset` touches the data of the capability
    /// at `capability`.
    pub(super) fn is_touched(capability: u8, offset: u8, len: usize) -> bool {
        let data = usize::from(capability) + DATA;
        let start = usize::from(offset);
        start < data + 4 && data < start + len
    }
}

/// Returns the body of the capability, and the bits of it that the driver may write. Both begin after the ID and
/// the pointer to the next capability.
pub(super) fn capability() -> ([u8; LEN - 2], [u8; LEN - 2]) {
    let (mut body, mut writable) = ([0; LEN - 2], [0; LEN - 2]);
    // cap_len, cfg_type
    body[..2].copy_from_slice(&[LEN as u8, 5]);
    writable[BAR - 2] = 0xff;
    writable[OFFSET - 2..].fill(0xff);
    (body, writable)
}

impl Schema for ConfigAccessStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-config-access-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { bar, offset, length, data } = *self;
        node.put_u32("bar", bar.into());
        node.put_u32("offset-bytes", offset);
        node.put_u32("length-bytes", length);
        node.put_bytes("data", &data);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            bar: reader.narrow("bar")?,
            offset: reader.u32("offset-bytes")?,
            length: reader.u32("length-bytes")?,
            data: reader.array("data")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    impl ConfigAccessStateV1 {
        pub(crate) fn sample() -> Self {
            Self { bar: 1, offset: 0x14, length: 4, data: [1, 2, 3, 4] }
        }
    }

    contract_tests! {
        ConfigAccessStateV1,
        sample: ConfigAccessStateV1::sample,
        changes: [
            |s| s.bar = 0,
            |s| s.offset += 1,
            |s| s.length = u32::MAX,
            |s| s.data[3] = 0,
        ],
        golden: "virtio-config-access-v1",
    }

    #[test]
    fn only_an_aligned_access_within_the_bar_reaches_a_register() {
        let register = |bar, offset, length| {
            ConfigAccessStateV1 { bar, offset, length, data: [0; 4] }.register()
        };
        assert_eq!(register(0, 0x14, 1), Some((0x14, 1)));
        assert_eq!(register(0, BAR_SIZE - 4, 4), Some((u64::from(BAR_SIZE) - 4, 4)));
        for (bar, offset, length) in [
            (1, 0, 4),
            (0, 0, 0),
            (0, 0, 3),
            (0, 0, 8),
            (0, 2, 4),
            (0, BAR_SIZE, 1),
            (0, u32::MAX, 1),
            (0, 0, u32::MAX),
            (0xff, u32::MAX, u32::MAX),
        ] {
            assert_eq!(register(bar, offset, length), None, "{bar} {offset:#x} {length}");
        }
    }
}
