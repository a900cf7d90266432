//! The rehearsal of a live update: boots the next kernel with its initramfs and its command line in a VM of this host.
//! There the next host does what it would do after the jump, up to the restore of the VMs, and tells what it found.
//!
//! ```text
//!   this host                           a VM of this host, which never travels
//!   kernel, initramfs, command line --> the next kernel
//!   copies of the documents ----------> the next host (`host::rehearsal`): modules, LUO, documents, KVM
//!   findings <-------- serial port ----   then it switches the VM off
//! ```
//!
//! No VM is paused for it: the state documents are those with which the VMs came into their processes.

mod archive;
mod documents;
pub mod report;
mod stage;

pub use documents::{
    CPU_FLAGS, DIRECTORY, INDEX, LUO, MANIFEST, STATES, Source, VM, cpu_flags, flags,
};
pub use stage::{Given, Rehearsal, RehearsalError};

/// The kernel parameter that tells the next host that it is rehearsed. A host that has it and no [`DIRECTORY`] in its
/// initramfs is not.
pub const PARAMETER: &str = "perennial.rehearsal";
