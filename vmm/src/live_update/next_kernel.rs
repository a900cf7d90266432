//! The next kernel: everything that can be known about it before the guests are touched, then its
//! loading.

use std::path::{Path, PathBuf};

use kexec::abi;
use kexec::preflight::{self, Refusal};
use kexec::{CommandLine, CommandLineError, Image, ImageError, LoadError, LoadedImage, Running};

/// The next kernel cannot be used, or would lose what is preserved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NextKernelError {
    /// An image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The command line cannot be used.
    #[error("the next kernel's command line")]
    CommandLine(#[from] CommandLineError),
    /// What the running kernel is cannot be found out.
    #[error(transparent)]
    Running(#[from] kexec::StatusError),
    /// The preflight refuses it.
    #[error("{}", joined(.0))]
    Refused(Vec<Refusal>),
    /// The image cannot be examined.
    #[error("cannot examine {}: is the file damaged?", path.display())]
    Examine {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It speaks other versions of the handover's formats.
    #[error("{} cannot take over: {}", path.display(), joined(differences))]
    Differs {
        /// The image.
        path: PathBuf,
        /// In which formats.
        differences: Vec<abi::Difference>,
    },
    /// The running kernel refuses to load it.
    #[error(transparent)]
    Load(#[from] LoadError),
}

fn joined(reasons: &[impl ToString]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Checks and loads the next kernel.
pub fn load(
    kernel: &Path,
    initramfs: &Path,
    cmdline: &str,
) -> Result<LoadedImage, NextKernelError> {
    let image = Image::open(kernel, Some(initramfs))?;
    let command_line = CommandLine::for_live_update(cmdline)?;
    let root = Path::new("/");
    let running = Running::read(root)?;
    preflight::check(&running, &image, &command_line).map_err(NextKernelError::Refused)?;
    let path = || kernel.to_owned();
    let next = abi::of_image(&image.kernel)
        .map_err(|source| NextKernelError::Examine { path: path(), source })?;
    if let Some(next) = next {
        let differences = abi::differences(&abi::of_running(root), &next);
        if !differences.is_empty() {
            return Err(NextKernelError::Differs { path: path(), differences });
        }
    }
    Ok(kexec::load(&image, &command_line)?)
}
