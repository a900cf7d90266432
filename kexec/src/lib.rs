//! Load the next kernel and enter it, and know beforehand whether that can work.
//!
//! ```text
//!   Image::open + CommandLine::for_live_update
//!        |
//!   preflight::check, abi::differences      refuse what would lose what is preserved
//!        |
//!   load -> LoadedImage                     dropped: unloaded again
//!        |
//!   jump                                    returns only if it failed, with the image
//! ```
//!
//! Only `kexec_file_load` is used: an image loaded by the older `kexec_load` carries no pointer to
//! what was handed over, and all of it is lost silently. This crate knows the Kexec Handover (KHO)
//! as far as it decides whether a kernel can be loaded and will find what was preserved, and memory
//! that is reserved by `memmap=`, which needs no KHO ([`Survival`]); what is preserved is not its
//! business. The images are those of x86-64 (`bzImage`).

pub mod abi;
mod command_line;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod image;
mod jump;
mod load;
mod memmap;
pub mod preflight;
mod status;

pub use command_line::{CommandLine, CommandLineError, Parameter, parameters, switch};
pub use image::{Image, ImageError, Initramfs, Kernel};
pub use jump::{JumpError, jump};
pub use load::{LoadError, LoadedImage, UnloadError, load};
pub use memmap::reserves;
/// The errno of a system call.
pub use rustix::io::Errno;
pub use status::{Running, ScratchArea, StatusError};

/// How what is preserved survives the jump, and so what the next kernel has to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// The running kernel hands it over (KHO, LUO).
    HandedOver,
    /// It lies in memory that both kernels are told to leave alone (`memmap=`).
    Reserved,
}

/// A size for people: whole mebibytes, rounded up.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
