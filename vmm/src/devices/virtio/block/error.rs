//! The errors of disks.

use std::io;

use crate::devices::identity::Identity;

/// A disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The size cannot be read.
    #[error("cannot read the size of the disk {path}")]
    Size {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The size is 0 or not a multiple of the sector size.
    #[error(
        "the disk {path} has {bytes} bytes: its size must be a multiple of 512 bytes, and not 0"
    )]
    NoSectors {
        /// The disk.
        path: String,
        /// Size in bytes.
        bytes: u64,
    },
    /// The start or the end of the image cannot be read.
    #[error("cannot read the disk {path} to find out whether it is a raw image")]
    Head {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image has a format other than raw.
    #[error(
        "the disk {path} is a {format} image, and only raw images can be used: convert it (qemu-img \
         convert -O raw), or say image_type=raw if the guest wrote that onto a raw disk itself"
    )]
    Format {
        /// The disk.
        path: String,
        /// The format.
        format: &'static str,
    },
    /// The size is smaller than the saved one.
    #[error(
        "the disk {path} had {saved} bytes before the update and has only {here} now: bring the disk \
         back as it was, then restore the VM"
    )]
    Shrunk {
        /// The disk.
        path: String,
        /// Size before.
        saved: u64,
        /// Size now.
        here: u64,
    },
    /// The guest was told a larger size than the storage has.
    #[error(
        "the disk {path} has {told} bytes for its guest, and its storage has only {here} now: a disk \
         cannot become smaller, so bring the storage back as it was"
    )]
    Smaller {
        /// The disk.
        path: String,
        /// Size for the guest, in bytes.
        told: u64,
        /// Size of the storage, in bytes.
        here: u64,
    },
    /// A resize to a smaller size.
    #[error(
        "the disk {path} has {told} bytes and cannot become smaller: {wanted} bytes are wanted"
    )]
    Shrink {
        /// The disk.
        path: String,
        /// Size for the guest, in bytes.
        told: u64,
        /// The wanted size, in bytes.
        wanted: u64,
    },
    /// A resize to a size that has no whole blocks.
    #[error(
        "the size of the disk {path} must be a multiple of {block} bytes, and {wanted} is none"
    )]
    NoBlocks {
        /// The disk.
        path: String,
        /// The wanted size, in bytes.
        wanted: u64,
        /// Size of a block, in bytes.
        block: u32,
    },
    /// A resize of a block device.
    #[error(
        "the disk {path} is a block device of {here} bytes, which only its own tools can grow to \
         {wanted} bytes: grow it there, then resize the disk without a size"
    )]
    NoFile {
        /// The disk.
        path: String,
        /// Size of the block device, in bytes.
        here: u64,
        /// The wanted size, in bytes.
        wanted: u64,
    },
    /// The file cannot grow.
    #[error("cannot grow the file of the disk {path} to {wanted} bytes")]
    Grow {
        /// The disk.
        path: String,
        /// The wanted size, in bytes.
        wanted: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The storage could not make the guest's writes durable.
    #[error("cannot make the writes to the disk {path} durable")]
    Sync {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The storage does not answer.
    #[error(
        "the storage of the disk {path} has not answered for {seconds} s (operations: {count}): repair it, or stop \
         the VM"
    )]
    Silent {
        /// The disk.
        path: String,
        /// How long the oldest operation waits for it.
        seconds: u64,
        /// Number of operations that wait for too long.
        count: u32,
    },
    /// The last resize is not finished.
    #[error("the disk {path} is being resized already, and its storage has not answered yet")]
    Resizing {
        /// The disk.
        path: String,
    },
    /// The image is another file or block device than the saved one.
    #[error(
        "the disk {path} was {saved} before the update and is {here} now: bring back the one that it \
         was, then restore the VM"
    )]
    Another {
        /// The disk.
        path: String,
        /// The saved identity.
        saved: Box<Identity>,
        /// The identity now.
        here: Box<Identity>,
    },
    /// The disk was writable and is read-only now, or the other way round.
    #[error("the disk {path} was {} before the update and is {} now", mode(*.saved), mode(!*.saved))]
    Mode {
        /// The disk.
        path: String,
        /// Whether the disk was read-only.
        saved: bool,
    },
}

fn mode(readonly: bool) -> &'static str {
    if readonly { "read-only" } else { "writable" }
}
