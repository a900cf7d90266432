//! The state of a seed.

use super::{Seed, SeedError, SeedImage};
use crate::devices::virtio::Block;
use crate::devices::virtio::block::VirtioBlkStateV4;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// `perennial,cloud-init-v1`. The transport has the driver's features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedStateV1 {
    /// CRC-32 of the disk.
    pub digest: u32,
    /// The disk.
    pub disk: VirtioBlkStateV4,
}

impl Schema for SeedStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,cloud-init-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { digest, disk } = self;
        node.put_u32("crc32", *digest);
        node.push(disk.to_node("disk"));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { digest: reader.u32("crc32")?, disk: reader.child("disk")? })
    }
}

impl Persist for Seed {
    type State = SeedStateV1;
    type Resources = SeedImage;
    type Error = SeedError;

    fn save(&self) -> Result<SeedStateV1, SeedError> {
        let Self { block, digest } = self;
        Ok(SeedStateV1 { digest: *digest, disk: block.save()? })
    }

    fn restore(state: SeedStateV1, image: SeedImage) -> Result<Self, SeedError> {
        let SeedStateV1 { digest, disk } = state;
        let here = image.digest()?;
        if here != digest {
            let directory = image.directory;
            return Err(SeedError::Changed { directory, saved: digest, here });
        }
        // The memfd is another one than before; the digest says that it has the same bytes.
        let disk = VirtioBlkStateV4 { identity: image.identity.clone(), ..disk };
        Ok(Self { block: Block::restore(disk, image.into_image())?, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{VirtioPciStateV2, VirtioState};
    use crate::state::contract::contract_tests;

    contract_tests! {
        VirtioState<SeedStateV1>,
        sample: || VirtioState {
            device: SeedStateV1 { digest: 0x1234_5678, disk: VirtioBlkStateV4::sample() },
            transport: VirtioPciStateV2::sample(),
        },
        changes: [
            |s| s.device.digest += 1,
            |s| s.device.disk.capacity_sectors += 1,
            |s| s.transport.isr += 1,
        ],
        golden: "cloud-init-v1",
    }
}
