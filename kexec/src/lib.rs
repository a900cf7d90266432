//! Loads the next kernel and enters it, and checks beforehand whether that can work.
//!
//! ```text
//!   Image::open + CommandLine::for_live_update
//!        |
//!   preflight, abi::differences             refuse a kernel that would lose preserved memory
//!   Contents, Archive                       look into both files
//!        |
//!   load -> LoadedImage                     dropped: unloaded again
//!        |
//!   jump                                    returns only if it failed, with the image
//! ```
//!
//! Only `kexec_file_load` is used: an image loaded by the older `kexec_load` carries no pointer to the
//! preserved memory, and all of it would be lost silently. This crate knows only so much of Kexec Handover
//! (KHO) as decides whether a kernel can be loaded and will find what was preserved. It also knows memory
//! that is reserved by `memmap=`, which needs no KHO ([`Survival`]). It does not know what is preserved.
//! Images are those of x86-64 (`bzImage`).

pub mod abi;
mod archive;
mod command_line;
mod compression;
mod contents;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod image;
mod jump;
mod load;
mod lzop;
mod memmap;
pub mod preflight;
mod status;

pub use archive::{Archive, ArchiveError, Entry};
pub use command_line::{CommandLine, CommandLineError, Parameter, parameters, switch};
pub use compression::Compression;
pub use contents::{Contents, ContentsError, Part, Presence};
pub use image::{Identity, Image, ImageError, Initramfs, Kernel};
pub use jump::{JumpError, jump};
pub use load::{LoadError, LoadedImage, UnloadError, load};
pub use memmap::reserves;
/// The errno of a system call.
pub use rustix::io::Errno;
pub use status::{Running, ScratchArea, StatusError};

/// How preserved memory survives the jump. Decides which parameters the next kernel needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// The running kernel hands the memory over (KHO, LUO).
    HandedOver,
    /// The memory is reserved in both kernels by the same `memmap=`.
    Reserved,
}

/// Formats a size for messages, in whole mebibytes, rounded up.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
