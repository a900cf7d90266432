//! virtio-blk (5.2): a disk that is a raw file or a block device of the host.
//!
//! The host's kernel moves data directly between the file and guest memory, for many requests at a time. A
//! write completes when the kernel has the data. The data is durable after a later FLUSH completes; for a
//! driver that has not negotiated FLUSH each write is durable when it completes (5.2.6.2).

mod calls;
mod engine;
mod errand;
mod error;
#[cfg(test)]
mod flight_tests;
mod format;
mod geometry;
mod growth;
mod health;
mod identification;
mod lock;
mod options;
mod request;
mod state;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod throughput;
mod transfer;
mod worker;

pub use error::BlockError;
pub use geometry::Geometry;
pub use options::BlockOptions;
pub use state::VirtioBlkStateV4;
pub use worker::BlockWorker;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use self::engine::Engine;
use self::errand::{Errands, Resize};
use self::geometry::Alignment;
use self::health::{Health, Waiting};
use self::transfer::Pieces;
use super::{VirtioDevice, VirtioPci, VirtioState, features};
use crate::devices::DeviceError;
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened};
use crate::devices::identity::Identity;
use crate::devices::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};
use crate::devices::storage::{OnResized, Storage, StorageFailure, StorageReport};

/// Bytes of a sector, the unit of all positions (5.2.4).
const SECTOR: u64 = 512;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of one segment.
const SIZE_MAX: u32 = 128 << 10;
/// Most bytes of data of a request. While the requests in flight have as many bytes, no further request is
/// taken. A pause, and with it every VM's blackout, waits for the requests in flight, so a guest must not be
/// able to make a request that takes very long. No driver makes requests of this size.
const REQUEST_MAX: u64 = SIZE_MAX as u64 * SEG_MAX as u64;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// An open image or block device of the host.
#[derive(Debug)]
pub struct Image {
    /// The file or block device; with `direct=on` opened with O_DIRECT.
    pub file: File,
    /// The same without O_DIRECT, if `file` is opened with it.
    pub cached: Option<File>,
    /// Identifies the image independently of its path.
    pub identity: Identity,
    /// What the configuration says of the disk.
    pub options: BlockOptions,
}

impl Image {
    /// Returns the path on the host, for messages only.
    fn path(&self) -> String {
        self.options.path.display().to_string()
    }

    /// Whether it is a block device.
    fn is_device(&self) -> bool {
        matches!(self.identity, Identity::BlockDevice { .. })
    }
}

/// The device.
#[derive(Debug)]
pub struct Block(Arc<Shared>);

/// Shared by the registers and the worker of the device.
#[derive(Debug)]
struct Shared {
    image: Image,
    /// Size in sectors, as the guest was told.
    sectors: AtomicU64,
    /// Whether the size has grown since the driver was told.
    grown: AtomicBool,
    geometry: Geometry,
    /// Whether a driver that has not seen the disk before is offered discards.
    discards: bool,
    /// What O_DIRECT needs.
    alignment: Alignment,
    id: [u8; identification::LEN],
    /// The size of each queue.
    queue_sizes: Vec<u16>,
    /// Whether the driver has negotiated FLUSH. Otherwise every write is made durable before it completes.
    driver_flushes: AtomicBool,
    /// Operations that the storage has not answered, and errors.
    health: Health,
    errands: Errands,
}

impl Block {
    /// A device for `image`. `label` names the disk among those of all VMs of the host. Errors if the
    /// image does not have whole sectors, or is in a format other than raw and its options do not say
    /// `image_type=raw`.
    pub fn new(image: Image, label: &str) -> Result<Self, BlockError> {
        let size = transfer::size(&image.file)
            .map_err(|source| BlockError::Size { path: image.path(), source })?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(BlockError::NoSectors { path: image.path(), bytes: size });
        }
        if !image.options.raw {
            // O_DIRECT would refuse to read so few bytes to any address.
            let readable = image.cached.as_ref().unwrap_or(&image.file);
            let format = format::recognize(readable, size)
                .map_err(|source| BlockError::Head { path: image.path(), source })?;
            if let Some(format) = format {
                return Err(BlockError::Format { path: image.path(), format });
            }
        }
        let geometry = Geometry::of(&image.file)
            .map_err(|source| BlockError::Size { path: image.path(), source })?;
        let discards =
            !image.options.readonly && engine::can_discard(&image.file, image.is_device(), size);
        Ok(Self::with(image, size / SECTOR, geometry, identification::of(label), discards))
    }

    fn with(
        image: Image,
        sectors: u64,
        geometry: Geometry,
        id: [u8; identification::LEN],
        discards: bool,
    ) -> Self {
        Self(Arc::new(Shared {
            discards,
            alignment: Alignment::of(&image.file),
            queue_sizes: vec![QUEUE_SIZE; usize::from(image.options.queues())],
            image,
            sectors: AtomicU64::new(sectors),
            grown: AtomicBool::new(false),
            geometry,
            id,
            driver_flushes: AtomicBool::new(false),
            health: Health::default(),
            errands: Errands::new().expect("an eventfd, as every doorbell is one"),
        }))
    }

    /// The configuration structure (5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let most = (REQUEST_MAX / SECTOR) as u32;
        let geometry = self.0.geometry;
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        // capacity, size_max, seg_max, blk_size, num_queues
        put(0, &self.0.sectors().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &geometry.block_bytes.to_le_bytes());
        // topology: physical_block_exp, alignment_offset, min_io_size, opt_io_size
        put(24, &[geometry.physical_exponent, geometry.alignment_offset]);
        put(26, &geometry.minimum_io_blocks.to_le_bytes());
        put(28, &geometry.optimal_io_blocks.to_le_bytes());
        put(34, &(self.0.queue_sizes.len() as u16).to_le_bytes());
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        put(36, &most.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(geometry.block_bytes / SECTOR as u32).to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        put(48, &most.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
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
        let mode = if self.0.image.options.readonly { F_RO } else { F_WRITE_ZEROES };
        let discard = if self.0.discards { F_DISCARD } else { 0 };
        let several = if self.0.queue_sizes.len() > 1 { F_MQ } else { 0 };
        let topology = if self.0.geometry.has_topology() { F_TOPOLOGY } else { 0 };
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | mode | discard | several | topology
    }

    /// A discard that the storage cannot do is a hint that is not followed.
    fn features_that_stay(&self) -> u64 {
        if self.0.image.options.readonly { 0 } else { F_DISCARD }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.0.queue_sizes
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

    fn resumed(&mut self) -> bool {
        self.0.grown.swap(false, Ordering::Relaxed)
    }

    fn worker(&self) -> BlockWorker {
        BlockWorker::new(self.0.clone(), Engine::new(&self.0))
    }

    fn storage(&self) -> Option<Arc<dyn Storage>> {
        Some(self.0.clone())
    }
}

impl Storage for Shared {
    fn report(&self) -> StorageReport {
        let now = Instant::now();
        let Waiting { in_flight, stalled, oldest } = self.health.waiting(now);
        let (errors, last_error) = self.health.errors(now);
        StorageReport {
            engine: self.health.engine(),
            direct: self.image.options.direct,
            queues: self.image.options.queues(),
            bytes: self.sectors() * SECTOR,
            errors,
            last_error,
            in_flight,
            stalled,
            waiting_s: oldest.unwrap_or_default().as_secs(),
        }
    }

    fn check_answers(&self) -> Result<(), StorageFailure> {
        match self.health.waiting(Instant::now()) {
            Waiting { stalled: 0, .. } => Ok(()),
            waiting => Err(self.silent(waiting).into()),
        }
    }

    fn begin_sync(&self) {
        if !self.image.options.readonly {
            self.errands.begin_sync();
        }
    }

    fn end_sync(&self, deadline: Instant) -> Result<(), StorageFailure> {
        let silent = || self.silent(self.health.waiting(Instant::now()));
        Ok(self.errands.wait_for_sync(deadline).ok_or_else(silent)??)
    }

    fn resize(&self, bytes: Option<u64>, on_resized: OnResized) {
        if let Err(refused) = self.errands.resize(Resize { bytes, on_resized }) {
            (refused.on_resized)(Err(BlockError::Resizing { path: self.image.path() }.into()));
        }
    }
}

impl Shared {
    fn silent(&self, Waiting { stalled, oldest, .. }: Waiting) -> BlockError {
        let seconds = oldest.unwrap_or_default().as_secs();
        BlockError::Silent { path: self.image.path(), seconds, count: stalled.max(1) }
    }

    /// Size in sectors, as the guest was told.
    fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// Takes over that the file has `bytes` bytes now, if that is more than the guest was told. Returns whether
    /// it is. A last part of a block is left out.
    fn grow(&self, bytes: u64) -> bool {
        let block = u64::from(self.geometry.block_bytes);
        let sectors = bytes / block * block / SECTOR;
        let grown = sectors > self.sectors.fetch_max(sectors, Ordering::Relaxed);
        self.grown.fetch_or(grown, Ordering::Relaxed);
        grown
    }

    /// Whether a transfer of `bytes` bytes at `offset` between the file and `pieces` goes through the page cache
    /// although the disk has `direct=on`.
    ///
    /// A disk with `direct=on` reads and writes through the page cache what O_DIRECT does not accept: few
    /// requests, such as those of a boot loader, or of a guest whose image was made for smaller blocks. Linux
    /// keeps both views of the file the same.
    fn needs_cache(&self, offset: u64, bytes: u64, pieces: &Pieces) -> bool {
        let Alignment { memory, offset: block } = self.alignment;
        let aligned = || {
            (offset | bytes).is_multiple_of(block)
                && pieces.left().iter().all(|piece| {
                    (piece.iov_base.addr() as u64 | piece.iov_len as u64).is_multiple_of(memory)
                })
        };
        self.image.cached.is_some() && !aligned()
    }
}

impl Kind for Block {
    const KEY: &'static str = "disk";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "Disks: path=FILE[,readonly=on][,direct=on][,num_queues=N], raw images or block devices",
        default: None,
        is_path: false,
        foreign: options::FOREIGN,
        harmless: options::HARMLESS,
    });
    const NAME: &'static str = <Self as VirtioDevice>::NAME;
    const MOST: usize = 24;
    const PLACE: Place = Place::Slot;
    const CALLS: DeviceCalls = calls::CALLS;
    const BOOTS_FROM: Option<&'static str> = Some(options::IMAGE);

    type Options = BlockOptions;
    type State = VirtioState<VirtioBlkStateV4>;

    fn parse(text: &str, vcpus: u32) -> Result<BlockOptions, String> {
        BlockOptions::parse(text, vcpus)
    }

    fn unasked() -> Option<BlockOptions> {
        None
    }

    fn stored_at(options: &BlockOptions) -> Option<&Path> {
        Some(&options.path)
    }

    fn claims(options: &BlockOptions) -> Vec<Claim> {
        let (shared, shared_with) = (options.readonly, Some("readonly=on"));
        vec![Claim { shared, shared_with, ..Claim::path("disk", &options.path) }]
    }

    fn open(options: &BlockOptions) -> Result<Vec<Opened>, OpenError> {
        options.open()
    }

    fn build(
        options: &BlockOptions,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError> {
        let taken = site.files.take_identified(options::IMAGE);
        let (fd, identity) = taken.map_err(|error| site.files_error(error))?;
        let (file, cached) = match options.direct {
            true => {
                let direct = site.files.take(options::DIRECT);
                let direct = direct.map_err(|error| site.files_error(error))?;
                (direct.into(), Some(fd.into()))
            }
            false => (fd.into(), None),
        };
        let image = Image { file, cached, identity, options: options.clone() };
        VirtioPci::build(site, state, image, |image| Self::new(image, &site.label))
    }
}
