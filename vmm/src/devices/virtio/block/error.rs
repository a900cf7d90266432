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
    /// The image is another file or block device than the saved one.
    #[error(
        "the disk {path} was {saved} before the update and is {here} now: bring back the one that it \
         was, then restore the VM"
    )]
    Another {
        /// The disk.
        path: String,
        /// The saved identity.
        saved: Identity,
        /// The identity now.
        here: Identity,
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
