//! The state of a disk.

use super::{Block, BlockError, Image, SECTOR, Shared, identification, transfer};
use crate::devices::identity::Identity;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// `perennial,virtio-blk-v1`. The transport has the driver's features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioBlkStateV1 {
    /// Size of the disk, in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// The disk's identification string.
    pub id: [u8; identification::LEN],
    /// The file or block device of the host.
    pub identity: Identity,
}

impl Schema for VirtioBlkStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-blk-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { capacity_sectors, readonly, id, identity } = self;
        node.put_u64("capacity-sectors", *capacity_sectors);
        node.put_bool("read-only", *readonly);
        node.put_bytes("id", id);
        identity.encode(node);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let capacity_sectors = reader.u64("capacity-sectors")?;
        if capacity_sectors.checked_mul(SECTOR).is_none() {
            let problem = format!("{capacity_sectors} sectors are more than can be addressed");
            return Err(reader.invalid("capacity-sectors", problem));
        }
        Ok(Self {
            capacity_sectors,
            readonly: reader.bool("read-only")?,
            id: reader.array("id")?,
            identity: Identity::decode(reader)?,
        })
    }
}

impl Persist for Block {
    type State = VirtioBlkStateV1;
    type Resources = Image;
    type Error = BlockError;

    fn save(&self) -> Result<VirtioBlkStateV1, BlockError> {
        // The transport saves the queues, and the features, which say whether the driver knows FLUSH.
        let Self(shared) = self;
        let Shared { image, sectors, id, queue_sizes: _, driver_flushes: _ } = &**shared;
        // The new host opens the file again; the options are in the machine's description.
        let Image { file: _, identity, readonly, raw: _, no_uring: _, queues: _, path: _ } = image;
        let identity = identity.clone();
        Ok(VirtioBlkStateV1 { capacity_sectors: *sectors, readonly: *readonly, id: *id, identity })
    }

    fn restore(state: VirtioBlkStateV1, image: Image) -> Result<Self, BlockError> {
        let VirtioBlkStateV1 { capacity_sectors, readonly, id, identity } = state;
        let path = image.path.clone();
        if image.readonly != readonly {
            return Err(BlockError::Mode { path, saved: readonly });
        }
        if !image.identity.is_same(&identity) {
            return Err(BlockError::Another { path, saved: identity, here: image.identity });
        }
        let here = transfer::size(&image.file)
            .map_err(|source| BlockError::Size { path: path.clone(), source })?;
        let saved = capacity_sectors * SECTOR;
        if here != saved {
            return Err(BlockError::Changed { path, saved, here });
        }
        Ok(Self::with(image, capacity_sectors, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{VirtioPciStateV1, VirtioState};
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    impl VirtioBlkStateV1 {
        pub(crate) fn sample() -> Self {
            Self {
                capacity_sectors: 0x0010_0000,
                readonly: true,
                id: *b"perennial disk a.img",
                identity: Identity::BlockDevice {
                    major: 254,
                    minor: 16,
                    serial: "disk-7".to_owned(),
                },
            }
        }
    }

    contract_tests! {
        VirtioState<VirtioBlkStateV1>,
        sample: || VirtioState {
            device: VirtioBlkStateV1::sample(),
            transport: VirtioPciStateV1::sample(),
        },
        changes: [
            |s| s.device.capacity_sectors += 1,
            |s| s.device.readonly = false,
            |s| s.device.id[19] = 0,
            |s| s.device.identity = Identity::File { file_system: 0x1234_5678_9abc_def0, inode: 12 },
            |s| s.device.identity =
                Identity::BlockDevice { major: 254, minor: 16, serial: String::new() },
            |s| s.transport.isr += 1,
        ],
        golden: "virtio-blk-v1",
    }

    #[test]
    fn a_disk_that_cannot_be_identified_is_refused() {
        for words in [
            &["file", "7"][..],
            &["file", "x", "7"],
            &["file", "7", "x"],
            &["block-device", "254", "a"],
            &["block-device", "254:x", "a"],
            &["socket", "1", "2"],
        ] {
            let mut node = VirtioBlkStateV1::sample().to_node("disk");
            node.properties.remove("identity");
            node.put_strings("identity", words);
            let error = read_node::<VirtioBlkStateV1>(&node, "/").unwrap_err().to_string();
            assert!(error.starts_with("/disk: property `identity`"), "{error}");
        }
    }

    #[test]
    fn a_disk_too_large_for_its_bytes_to_be_counted_is_refused() {
        let mut state = VirtioBlkStateV1::sample();
        state.capacity_sectors = u64::MAX / SECTOR + 1;
        let error = read_node::<VirtioBlkStateV1>(&state.to_node("device"), "/").unwrap_err();
        assert!(error.to_string().starts_with("/device: property `capacity-sectors`"), "{error}");
    }
}
