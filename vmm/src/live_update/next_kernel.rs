//! The next kernel: everything that can be known about it before the guests are touched, then its
//! loading.

use std::path::{Path, PathBuf};

use kexec::abi;
use kexec::preflight::{self, Refusal};
use kexec::{
    CommandLine, CommandLineError, Image, ImageError, LoadError, LoadedImage, Running, Survival,
};
use luo::Ticket;

/// The kernel parameter that carries a ticket. The kernel takes no notice of it, as of any with a dot.
pub const PARAMETER: &str = "perennial.ticket";

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

/// What is to be entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextKernel {
    /// The image.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its command line as the operator wrote it.
    pub cmdline: String,
}

/// Checks and loads the next kernel, which gets the ticket for what lies in a pool. Without one the
/// kernel's LUO hands everything over.
pub fn load(next: &NextKernel, ticket: Option<Ticket>) -> Result<LoadedImage, NextKernelError> {
    let NextKernel { kernel, initramfs, cmdline } = next;
    let image = Image::open(kernel, Some(initramfs))?;
    let (survival, command_line) = match ticket {
        None => (Survival::HandedOver, CommandLine::for_live_update(cmdline)?),
        Some(ticket) => {
            let line = CommandLine::new(cmdline)?.with(PARAMETER, &ticket.to_string())?;
            (Survival::Reserved, line)
        }
    };
    let root = Path::new("/");
    let running = Running::read(root)?;
    preflight::check(&running, &image, &command_line, survival)
        .map_err(NextKernelError::Refused)?;
    if survival == Survival::HandedOver {
        compare_formats(root, &image)?;
    }
    Ok(kexec::load(&image, &command_line, &running)?)
}

/// Whether the next kernel understands what this one hands over.
fn compare_formats(root: &Path, image: &Image) -> Result<(), NextKernelError> {
    let path = || image.kernel.path.clone();
    let next = abi::of_image(&image.kernel)
        .map_err(|source| NextKernelError::Examine { path: path(), source })?;
    let Some(next) = next else {
        tracing::warn!(
            "{} is not compressed with gzip (CONFIG_KERNEL_GZIP): whether it understands what this \
             kernel hands over cannot be told beforehand",
            path().display()
        );
        return Ok(());
    };
    let differences = abi::differences(&abi::of_running(root), &next);
    if !differences.is_empty() {
        return Err(NextKernelError::Differs { path: path(), differences });
    }
    Ok(())
}
