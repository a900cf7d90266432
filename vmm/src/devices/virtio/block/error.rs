//! Why a disk cannot be used.

use std::io;

use crate::devices::identity::Identity;

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
    /// Its start or its end cannot be read.
    #[error("cannot read the disk {path} to find out whether it is a raw image")]
    Head {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is in the format of another hypervisor.
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
    /// It is another file or block device.
    #[error(
        "the disk {path} was {saved} before the update and is {here} now: bring back the one that it \
         was, then restore the VM"
    )]
    Another {
        /// The disk.
        path: String,
        /// What it was.
        saved: Identity,
        /// What it is.
        here: Identity,
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
