//! A seed for cloud-init: a small read-only disk that the host makes of a directory.
//!
//! cloud-init's data source NoCloud looks for a file system with the label `cidata`. The host reads the directory
//! when the VM's files are opened and makes the disk in a memfd (`image`). It is not carried over a live
//! update: the next host makes it again, byte for byte, if the directory has the same files. The state has the
//! disk's digest, and a restore refuses another disk, because the guest may have this one mounted.
//!
//! To the guest it is a virtio-blk like any other disk, and [`Block`] does all of its work.

mod image;
mod options;
mod state;
#[cfg(test)]
mod tests;

pub use options::SeedOptions;
pub use state::SeedStateV1;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::block::{BlockOptions, BlockWorker, Image};
use super::{Block, BlockError, VirtioDevice, VirtioPci, VirtioState, features};
use crate::devices::DeviceError;
use crate::devices::claims::Claim;
use crate::devices::files::{OpenError, Opened};
use crate::devices::identity::Identity;
use crate::devices::kind::{Built, CommandLine, DeviceCalls, Kind, Place, Site};

/// A seed cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// The disk cannot be read.
    #[error("cannot read the seed that was made of {directory}")]
    Read {
        /// The directory.
        directory: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory has other files than when the guest booted.
    #[error(
        "the files in {directory} are not those of the seed that the guest was given (digest {saved:08x}, now \
         {here:08x}): bring the old ones back, then restore the VM"
    )]
    Changed {
        /// The directory.
        directory: String,
        /// The digest of the guest's disk.
        saved: u32,
        /// The digest of the disk that the directory makes now.
        here: u32,
    },
    /// The disk does not work as such.
    #[error(transparent)]
    Block(#[from] BlockError),
}

/// The device.
#[derive(Debug)]
pub struct Seed {
    block: Block,
    digest: u32,
}

/// A disk in a memfd, and what it was made of.
#[derive(Debug)]
pub struct SeedImage {
    disk: File,
    identity: Identity,
    directory: String,
}

impl SeedImage {
    /// CRC-32 of all bytes: it is to notice a change, nobody forges it.
    fn digest(&self) -> Result<u32, SeedError> {
        let digest = || {
            let mut bytes = vec![0; image::BYTES_MAX];
            let len = usize::try_from(self.disk.metadata()?.len()).unwrap_or(usize::MAX);
            let bytes = bytes.get_mut(..len).ok_or(io::ErrorKind::FileTooLarge)?;
            self.disk.read_exact_at(bytes, 0)?;
            Ok(crc32fast::hash(bytes))
        };
        digest().map_err(|source| SeedError::Read { directory: self.directory.clone(), source })
    }

    fn into_image(self) -> Image {
        let options = BlockOptions {
            path: format!("{} (seed of cloud-init)", self.directory).into(),
            readonly: true,
            raw: true,
            no_uring: true,
            ..BlockOptions::default()
        };
        Image { file: self.disk, cached: None, identity: self.identity, options }
    }
}

impl Seed {
    /// A device for `image`. `label` names the seed among those of all VMs of the host.
    fn new(image: SeedImage, label: &str) -> Result<Self, SeedError> {
        let digest = image.digest()?;
        // Disks have labels of the same form, and no two serial numbers may be the same.
        let label = format!("{label}-seed");
        Ok(Self { block: Block::new(image.into_image(), &label)?, digest })
    }
}

impl VirtioDevice for Seed {
    const NAME: &'static str = "cloud-init";
    const ID: u16 = Block::ID;
    const CLASS: [u8; 3] = Block::CLASS;
    const FEATURES: features::Names = Block::FEATURES;

    type Worker = BlockWorker;

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.block.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.block.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.block.write_config(offset, data);
    }

    fn negotiated(&mut self, features: u64) {
        self.block.negotiated(features);
    }

    fn resumed(&mut self) -> bool {
        self.block.resumed()
    }

    fn worker(&self) -> BlockWorker {
        self.block.worker()
    }
}

impl Kind for Seed {
    const KEY: &'static str = "cloud-init";
    const COMMAND_LINE: Option<CommandLine> = Some(CommandLine {
        usage: "A seed for cloud-init that is made of a directory: --cloud-init=DIR",
        default: None,
        is_path: true,
        foreign: &[],
        harmless: &[],
    });
    const NAME: &'static str = <Self as VirtioDevice>::NAME;
    const MOST: usize = 1;
    const PLACE: Place = Place::Slot;
    const CALLS: DeviceCalls = <Block as Kind>::CALLS;

    type Options = SeedOptions;
    type State = VirtioState<SeedStateV1>;

    fn parse(text: &str, _vcpus: u32) -> Result<SeedOptions, String> {
        SeedOptions::parse(text)
    }

    fn unasked() -> Option<SeedOptions> {
        None
    }

    /// The directory is only read.
    fn claims(_options: &SeedOptions) -> Vec<Claim> {
        Vec::new()
    }

    fn open(options: &SeedOptions) -> Result<Vec<Opened>, OpenError> {
        options.open()
    }

    fn build(
        options: &SeedOptions,
        site: &mut Site,
        state: Option<Self::State>,
    ) -> Result<Built<Self::State>, DeviceError> {
        let taken = site.files.take_identified(options::DISK);
        let (fd, identity) = taken.map_err(|error| site.files_error(error))?;
        let SeedOptions { directory } = options;
        let directory = directory.display().to_string();
        let image = SeedImage { disk: fd.into(), identity, directory };
        VirtioPci::build(site, state, image, |image| Self::new(image, &site.label))
    }
}
