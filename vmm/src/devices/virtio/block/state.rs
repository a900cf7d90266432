//! The state of a disk.

use super::{Block, BlockError, Geometry, Image, SECTOR, Shared, identification, transfer};
use crate::devices::identity::{Identity, is_on_lasting_file_system};
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// `perennial,virtio-blk-v4`. A disk that is no file of which it is known when it was made is written by an older
/// binding, so that programs which know only that one can read it: as `-v3` a device with a unit, as `-v2` what has
/// neither, and as `-v1` what has blocks of 512 bytes and no topology besides. The transport has the driver's features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioBlkStateV4 {
    /// Size of the disk, in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// The disk's identification string.
    pub id: [u8; identification::LEN],
    /// The file or block device of the host.
    pub identity: Identity,
    /// The block sizes that the guest was told.
    pub geometry: Geometry,
}

impl Schema for VirtioBlkStateV4 {
    const COMPATIBLE: &'static [&'static str] = &[
        "perennial,virtio-blk-v4",
        "perennial,virtio-blk-v3",
        "perennial,virtio-blk-v2",
        "perennial,virtio-blk-v1",
    ];

    fn bindings(&self) -> &'static [&'static str] {
        match self.identity {
            Identity::File { born: Some(_), .. } => &Self::COMPATIBLE[..1],
            Identity::BlockDevice { unit: Some(_), .. } => &Self::COMPATIBLE[1..2],
            _ if self.geometry != Geometry::default() => &Self::COMPATIBLE[2..3],
            _ => &Self::COMPATIBLE[3..],
        }
    }

    fn encode(&self, node: &mut Node) {
        let Self { capacity_sectors, readonly, id, identity, geometry } = self;
        node.put_u64("capacity-sectors", *capacity_sectors);
        node.put_bool("read-only", *readonly);
        node.put_bytes("id", id);
        identity.encode(node);
        let Geometry {
            block_bytes,
            physical_exponent,
            alignment_offset,
            minimum_io_blocks,
            optimal_io_blocks,
        } = *geometry;
        if self.bindings() != &Self::COMPATIBLE[3..] {
            node.put_u32("block-bytes", block_bytes);
            node.put_u32("physical-block-exponent", physical_exponent.into());
            node.put_u32("alignment-offset-blocks", alignment_offset.into());
            node.put_u32("minimum-io-blocks", minimum_io_blocks.into());
            node.put_u32("optimal-io-blocks", optimal_io_blocks);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let capacity_sectors = reader.u64("capacity-sectors")?;
        if capacity_sectors.checked_mul(SECTOR).is_none() {
            let problem = format!("{capacity_sectors} sectors are more than can be addressed");
            return Err(reader.invalid("capacity-sectors", problem));
        }
        let [with_born, with_unit, with_geometry] =
            [0, 1, 2].map(|binding| reader.is_compatible(Self::COMPATIBLE[binding]));
        Ok(Self {
            capacity_sectors,
            readonly: reader.bool("read-only")?,
            id: reader.array("id")?,
            identity: Identity::decode(reader, with_unit, with_born)?,
            geometry: match with_born || with_unit || with_geometry {
                true => decode_geometry(reader)?,
                false => Geometry::default(),
            },
        })
    }
}

fn decode_geometry(reader: &mut Reader<'_>) -> Result<Geometry, StateError> {
    let block_bytes = reader.u32("block-bytes")?;
    if !Geometry::is_block_size(block_bytes) {
        let problem = format!("{block_bytes} bytes is not the size of a block of a disk");
        return Err(reader.invalid("block-bytes", problem));
    }
    Ok(Geometry {
        block_bytes,
        physical_exponent: reader.narrow("physical-block-exponent")?,
        alignment_offset: reader.narrow("alignment-offset-blocks")?,
        minimum_io_blocks: reader.narrow("minimum-io-blocks")?,
        optimal_io_blocks: reader.u32("optimal-io-blocks")?,
    })
}

impl Persist for Block {
    type State = VirtioBlkStateV4;
    type Resources = Image;
    type Error = BlockError;

    fn save(&self) -> Result<VirtioBlkStateV4, BlockError> {
        let Self(shared) = self;
        let Shared {
            image,
            sectors: _,
            // After a restore the driver is told the size once more than necessary at worst.
            grown: _,
            geometry,
            // The features in the state of the transport say what the driver was offered.
            discards: _,
            // The new host finds out what its O_DIRECT needs.
            alignment: _,
            id,
            // The transport saves the queues, and the features, which say whether the driver knows FLUSH.
            queue_sizes: _,
            driver_flushes: _,
            // No request is in flight. The counts of errors begin again with the next process.
            health: _,
            errands: _,
        } = &**shared;
        // The new host opens the files again; the options are in the machine's description.
        let Image { file: _, cached: _, identity, options } = image;
        Ok(VirtioBlkStateV4 {
            capacity_sectors: shared.sectors(),
            readonly: options.readonly,
            id: *id,
            identity: identity.clone(),
            geometry: *geometry,
        })
    }

    /// Errors if the disk is another one or has become smaller. A disk that has grown is larger for the guest
    /// as well; its driver is told when the VM is resumed.
    fn restore(state: VirtioBlkStateV4, image: Image) -> Result<Self, BlockError> {
        let VirtioBlkStateV4 { capacity_sectors, readonly, id, identity, geometry } = state;
        let path = image.path();
        if image.options.readonly != readonly {
            return Err(BlockError::Mode { path, saved: readonly });
        }
        let lasting = is_on_lasting_file_system(&image.file);
        if !image.identity.is_same(&identity, lasting) {
            let (saved, here) = (Box::new(identity), Box::new(image.identity));
            return Err(BlockError::Another { path, saved, here });
        }
        let here = transfer::size(&image.file)
            .map_err(|source| BlockError::Size { path: path.clone(), source })?;
        let saved = capacity_sectors * SECTOR;
        if here < saved {
            return Err(BlockError::Shrunk { path, saved, here });
        }
        let block = Self::with(image, capacity_sectors, geometry, id, false);
        block.0.grow(here);
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{VirtioPciStateV2, VirtioState};
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    impl VirtioBlkStateV4 {
        pub(crate) fn sample() -> Self {
            Self {
                capacity_sectors: 0x0010_0000,
                readonly: true,
                id: *b"perennial disk a.img",
                identity: Identity::BlockDevice {
                    major: 254,
                    minor: 16,
                    serial: "disk-7".to_owned(),
                    unit: None,
                    others: Vec::new(),
                },
                geometry: Geometry::default(),
            }
        }
    }

    mod v1 {
        use super::*;

        contract_tests! {
            VirtioState<VirtioBlkStateV4>,
            sample: || VirtioState {
                device: VirtioBlkStateV4::sample(),
                transport: VirtioPciStateV2::sample(),
            },
            changes: [
                |s| s.device.capacity_sectors += 1,
                |s| s.device.readonly = false,
                |s| s.device.id[19] = 0,
                |s| s.device.identity = Identity::File { file_system: 0x1234_5678_9abc_def0, inode: 12, born: None },
                |s| s.device.identity = Identity::BlockDevice {
                    major: 254,
                    minor: 16,
                    serial: String::new(),
                    unit: None,
                    others: Vec::new(),
                },
                |s| s.transport.isr += 1,
                |s| s.device.geometry.block_bytes = 4096,
            ],
            golden: "virtio-blk-v1",
        }
    }

    /// A disk with every block size other than the usual one.
    fn with_topology() -> VirtioBlkStateV4 {
        let geometry = Geometry {
            block_bytes: 4096,
            physical_exponent: 2,
            alignment_offset: 1,
            minimum_io_blocks: 4,
            optimal_io_blocks: 256,
        };
        VirtioBlkStateV4 { geometry, ..VirtioBlkStateV4::sample() }
    }

    mod v2 {
        use super::*;

        contract_tests! {
            VirtioState<VirtioBlkStateV4>,
            sample: || VirtioState {
                device: with_topology(),
                transport: VirtioPciStateV2::sample(),
            },
            changes: [
                |s| s.device.capacity_sectors += 1,
                |s| s.device.readonly = false,
                |s| s.device.id[19] = 0,
                |s| s.device.identity = Identity::File { file_system: 1, inode: 12, born: None },
                |s| s.device.geometry.block_bytes = 512,
                |s| s.device.geometry.physical_exponent = 0,
                |s| s.device.geometry.alignment_offset = 0,
                |s| s.device.geometry.minimum_io_blocks = 0,
                |s| s.device.geometry.optimal_io_blocks = 0,
                |s| s.device.geometry = Geometry::default(),
            ],
            golden: "virtio-blk-v2",
        }
    }

    fn namespace(unit: &str) -> Identity {
        let unit = Some(unit.to_owned());
        let serial = "disk-7".to_owned();
        Identity::BlockDevice { major: 259, minor: 1, serial, unit, others: Vec::new() }
    }

    mod v3 {
        use super::*;

        contract_tests! {
            VirtioState<VirtioBlkStateV4>,
            sample: || VirtioState {
                device: VirtioBlkStateV4 {
                    identity: namespace("NVMe namespace `eui.0025385b81b00001`"),
                    ..VirtioBlkStateV4::sample()
                },
                transport: VirtioPciStateV2::sample(),
            },
            changes: [
                |s| s.device.capacity_sectors += 1,
                |s| s.device.identity = namespace("NVMe namespace `eui.0025385b81b00002`"),
                |s| s.device.identity = VirtioBlkStateV4::sample().identity,
                |s| s.device.geometry = with_topology().geometry,
            ],
            golden: "virtio-blk-v3",
        }
    }

    fn made_at(born: &str) -> Identity {
        Identity::File { file_system: 1, inode: 12, born: Some(born.to_owned()) }
    }

    contract_tests! {
        VirtioState<VirtioBlkStateV4>,
        sample: || VirtioState {
            device: VirtioBlkStateV4 {
                identity: made_at("1764250000.012345678"),
                ..VirtioBlkStateV4::sample()
            },
            transport: VirtioPciStateV2::sample(),
        },
        changes: [
            |s| s.device.capacity_sectors += 1,
            |s| s.device.identity = made_at("1764250000.012345679"),
            |s| s.device.identity = Identity::File { file_system: 1, inode: 12, born: None },
            |s| s.device.identity = VirtioBlkStateV4::sample().identity,
            |s| s.device.geometry = with_topology().geometry,
        ],
        golden: "virtio-blk-v4",
    }

    #[test]
    fn blocks_of_an_impossible_size_are_refused() {
        for bytes in [0, 256, 3 << 10, 1 << 20] {
            let mut state = with_topology();
            state.geometry.block_bytes = bytes;
            let error = read_node::<VirtioBlkStateV4>(&state.to_node("device"), "/").unwrap_err();
            assert!(error.to_string().starts_with("/device: property `block-bytes`"), "{error}");
        }
    }

    #[test]
    fn a_disk_that_cannot_be_identified_is_refused() {
        for words in [
            &["file", "7"][..],
            &["file", "x", "7"],
            &["file", "7", "x"],
            // The binding of the sample knows no time at which a file was made.
            &["file", "7", "7", "1.000000000"],
            &["block-device", "254", "a"],
            &["block-device", "254:x", "a"],
            // The binding of the sample knows no unit.
            &["block-device", "254:16", "a", "b"],
            &["socket", "1", "2"],
        ] {
            let mut node = VirtioBlkStateV4::sample().to_node("disk");
            node.properties.remove("identity");
            node.put_strings("identity", words);
            let error = read_node::<VirtioBlkStateV4>(&node, "/").unwrap_err().to_string();
            assert!(error.starts_with("/disk: property `identity`"), "{error}");
        }
    }

    #[test]
    fn a_disk_too_large_for_its_bytes_to_be_counted_is_refused() {
        let mut state = VirtioBlkStateV4::sample();
        state.capacity_sectors = u64::MAX / SECTOR + 1;
        let error = read_node::<VirtioBlkStateV4>(&state.to_node("device"), "/").unwrap_err();
        assert!(error.to_string().starts_with("/device: property `capacity-sectors`"), "{error}");
    }
}
