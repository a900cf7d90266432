//! virtio-blk (5.2): a disk that is a raw file or a block device of the host.
//!
//! Data moves straight between the file and guest memory. A write is complete when the host's kernel
//! has it; it is durable after FLUSH, or at once for a driver that does not know FLUSH (5.2.6.2).

mod file;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::request::Buffers;
use super::{Rings, VirtioDevice, VirtioWorker, features};
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// Bytes of a sector, the unit of all positions (5.2.4).
const SECTOR: u64 = 512;
/// Entries of the one queue.
const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of one segment.
const SIZE_MAX: u32 = 128 << 10;
/// Most data of a request, in bytes. A pause, and with it every VM's blackout, waits for the request
/// that is being executed, so no guest may make one that takes for ever. No driver comes near.
const REQUEST_MAX: u64 = SIZE_MAX as u64 * SEG_MAX as u64;
/// Length of the identification string (5.2.6).
const ID_LEN: usize = 20;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    /// The file or block device.
    pub file: File,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Its path on the host, for errors only.
    pub path: String,
}

/// A disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// How large it is cannot be found out.
    #[error("cannot find out the size of the disk {path}")]
    Size {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not made of whole sectors, or of none.
    #[error(
        "the disk {path} has {bytes} bytes: it must have at least one sector, and whole ones of 512"
    )]
    NoSectors {
        /// The disk.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// It is not the disk that it was.
    #[error(
        "the disk {path} had {saved} bytes before the update and has {here} now: bring the disk \
         back as it was, then restore the VM"
    )]
    Changed {
        /// The disk.
        path: String,
        /// Size before.
        saved: u64,
        /// Size now.
        here: u64,
    },
    /// The guest may have been told that it can write.
    #[error("the disk {path} was {} before the update and is {} now", mode(*.saved), mode(!*.saved))]
    Mode {
        /// The disk.
        path: String,
        /// Whether it was read-only.
        saved: bool,
    },
}

fn mode(readonly: bool) -> &'static str {
    if readonly { "read-only" } else { "writable" }
}

/// The device.
#[derive(Debug)]
pub struct Block(Arc<Shared>);

/// What both halves of the device need.
#[derive(Debug)]
struct Shared {
    disk: Disk,
    sectors: u64,
    id: [u8; ID_LEN],
    /// The driver knows FLUSH; otherwise every write is made durable before it completes.
    driver_flushes: AtomicBool,
}

impl Block {
    /// A device for `disk`, whose guest sees it as `id` (at most 20 bytes of it).
    pub fn new(disk: Disk, id: &str) -> Result<Self, BlockError> {
        let size = file::size(&disk.file)
            .map_err(|source| BlockError::Size { path: disk.path.clone(), source })?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(BlockError::NoSectors { path: disk.path, bytes: size });
        }
        let mut bytes = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        Ok(Self::with(disk, size / SECTOR, bytes))
    }

    fn with(disk: Disk, sectors: u64, id: [u8; ID_LEN]) -> Self {
        let driver_flushes = AtomicBool::new(false);
        Self(Arc::new(Shared { disk, sectors, id, driver_flushes }))
    }

    /// The configuration structure (5.2.4): capacity, size_max, seg_max, geometry, blk_size.
    fn config(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[0..8].copy_from_slice(&self.0.sectors.to_le_bytes());
        bytes[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        bytes[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        bytes[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        bytes
    }
}

impl VirtioDevice for Block {
    const NAME: &'static str = "virtio-blk";
    const ID: u16 = 2;
    /// Mass storage, other.
    const CLASS: [u8; 3] = [0x01, 0x80, 0x00];
    const FEATURES: features::Names = &[
        (1, "SIZE_MAX"),
        (2, "SEG_MAX"),
        (4, "GEOMETRY"),
        (5, "RO"),
        (6, "BLK_SIZE"),
        (9, "FLUSH"),
        (10, "TOPOLOGY"),
        (11, "CONFIG_WCE"),
        (12, "MQ"),
        (13, "DISCARD"),
        (14, "WRITE_ZEROES"),
    ];

    type Worker = BlockWorker;

    fn features(&self) -> u64 {
        let readonly = if self.0.disk.readonly { F_RO } else { 0 };
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | readonly
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Only `writeback` could be written, and CONFIG_WCE is not offered.
    }

    fn negotiated(&mut self, features: u64) {
        self.0.driver_flushes.store(features & F_FLUSH != 0, Ordering::Relaxed);
    }

    fn worker(&self) -> BlockWorker {
        BlockWorker(self.0.clone())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Shared {
    /// Makes what was written durable.
    fn flush(&self) -> io::Result<()> {
        match self.disk.readonly {
            true => Ok(()),
            false => self.disk.file.sync_data(),
        }
    }
}

/// Executes requests in the order of the ring.
#[derive(Debug)]
pub struct BlockWorker(Arc<Shared>);

impl VirtioWorker for BlockWorker {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        rings.serve(queue, |chain| match Buffers::collect(rings.memory(), chain) {
            Some(buffers) => request::execute(&self.0, buffers),
            // Without a byte for the status there is no way to answer.
            None => 0,
        });
    }

    fn on_source(&mut self, _source: usize, _rings: &Rings) {}
}

/// `perennial,virtio-blk-v1`. The driver's features are the transport's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioBlkStateV1 {
    /// Size of the disk, in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// What the guest reads as the disk's identification.
    pub id: [u8; ID_LEN],
}

impl Schema for VirtioBlkStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,virtio-blk-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { capacity_sectors, readonly, id } = self;
        node.put_u64("capacity-sectors", *capacity_sectors);
        node.put_bool("read-only", *readonly);
        node.put_bytes("id", id);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let capacity_sectors = reader.u64("capacity-sectors")?;
        if capacity_sectors.checked_mul(SECTOR).is_none() {
            let problem = format!("{capacity_sectors} sectors are more than can be addressed");
            return Err(reader.invalid("capacity-sectors", problem));
        }
        Ok(Self { capacity_sectors, readonly: reader.bool("read-only")?, id: reader.array("id")? })
    }
}

impl Persist for Block {
    type State = VirtioBlkStateV1;
    type Resources = Disk;
    type Error = BlockError;

    fn save(&self) -> Result<VirtioBlkStateV1, BlockError> {
        // What the driver knows follows from its features, which the transport saves.
        let Shared { disk, sectors, id, driver_flushes: _ } = &*self.0;
        Ok(VirtioBlkStateV1 { capacity_sectors: *sectors, readonly: disk.readonly, id: *id })
    }

    fn restore(state: VirtioBlkStateV1, disk: Disk) -> Result<Self, BlockError> {
        let VirtioBlkStateV1 { capacity_sectors, readonly, id } = state;
        let path = disk.path.clone();
        if disk.readonly != readonly {
            return Err(BlockError::Mode { path, saved: readonly });
        }
        let here = file::size(&disk.file)
            .map_err(|source| BlockError::Size { path: path.clone(), source })?;
        let saved = capacity_sectors * SECTOR;
        if here != saved {
            return Err(BlockError::Changed { path, saved, here });
        }
        Ok(Self::with(disk, capacity_sectors, id))
    }
}

#[cfg(test)]
mod state_tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    impl VirtioBlkStateV1 {
        pub(crate) fn sample() -> Self {
            Self { capacity_sectors: 0x0010_0000, readonly: true, id: *b"perennial disk a.img" }
        }
    }

    contract_tests! {
        VirtioBlkStateV1,
        sample: VirtioBlkStateV1::sample,
        changes: [|s| s.capacity_sectors += 1, |s| s.readonly = false, |s| s.id[19] = 0],
        golden: "virtio-blk-v1",
    }

    #[test]
    fn a_disk_too_large_for_its_bytes_to_be_counted_is_refused() {
        let mut state = VirtioBlkStateV1::sample();
        state.capacity_sectors = u64::MAX / SECTOR + 1;
        let error = read_node::<VirtioBlkStateV1>(&state.to_node("device"), "/").unwrap_err();
        assert!(error.to_string().starts_with("/device: property `capacity-sectors`"), "{error}");
    }
}
