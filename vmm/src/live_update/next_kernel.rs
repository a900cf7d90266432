//! Checks the next kernel as far as is possible while the guests run, then loads it.

use std::path::{Path, PathBuf};

use kexec::abi;
use kexec::preflight::{self, Refusal};
use kexec::{
    CommandLine, CommandLineError, Image, ImageError, LoadError, LoadedImage, Running, Survival,
};
use luo::Ticket;
use rustix::process::getpid;

use crate::arch::x86_64::tsc;
use crate::kvm;

/// The kernel parameter that carries a ticket. The kernel ignores it: it ignores every parameter of a
/// module that it does not have, which is how it reads a name with a dot.
pub const PARAMETER: &str = "perennial.ticket";

/// The kernel parameter that says that a live update entered the kernel, whatever carries the VMs. Its value is
/// another one each time. A host that finds it and no VMs knows that they are lost.
pub const MARK: &str = "perennial.update";

/// The kernel parameter with the rate of the TSC in kHz (Linux 5.12 and later; others ignore it).
const TSC_RATE: &str = "tsc_early_khz";
/// Parameter with the seconds from a panic to the reboot; 0, the default of most kernels, is never.
const PANIC: &str = "panic";
/// Seconds from a panic to the reboot, if nobody set them.
pub const PANIC_SECONDS: u32 = 10;

/// The next kernel cannot be used, or would lose preserved memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NextKernelError {
    /// The kernel image or the initramfs cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The command line cannot be used.
    #[error("the next kernel's command line cannot be used")]
    CommandLine(#[from] CommandLineError),
    /// The facts about the running kernel cannot be read.
    #[error(transparent)]
    Running(#[from] kexec::StatusError),
    /// The preflight refuses it.
    #[error("{}", joined(.0))]
    Refused(Vec<Refusal>),
    /// The handover formats of the image cannot be read.
    #[error("cannot examine {}: is the file damaged?", path.display())]
    Examine {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The next kernel reads other versions of the handover formats than the running kernel writes.
    #[error("{} cannot take over: {}", path.display(), joined(differences))]
    Differs {
        /// The image.
        path: PathBuf,
        /// The formats that differ.
        differences: Vec<abi::Difference>,
    },
    /// The running kernel refuses to load the image.
    #[error(transparent)]
    Load(#[from] LoadError),
}

fn joined(reasons: &[impl ToString]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The kernel to enter, with its initramfs and command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextKernel {
    /// Path of the kernel image.
    pub kernel: PathBuf,
    /// Path of the initramfs.
    pub initramfs: PathBuf,
    /// The command line as the operator wrote it.
    pub cmdline: String,
}

/// Checks and loads the next kernel. With a `ticket`, preserved memory lies in a pool, and the ticket is
/// added to the command line. Without a ticket, the kernel's LUO hands everything over.
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
    let command_line = command_line.with(MARK, &unique())?;
    let command_line = match tsc::rate_is_in_cpuid() {
        true => command_line,
        false => tell_tsc_rate(command_line, kvm::tsc_khz().ok()),
    };
    // A distribution decides for itself; nothing else would reboot a host that is PID 1.
    let command_line = match getpid().is_init() {
        true => add_unless_given(command_line, PANIC, &PANIC_SECONDS.to_string()),
        false => command_line,
    };
    let root = Path::new("/");
    let running = Running::read(root)?;
    preflight::check(&running, &image, &command_line, survival)
        .map_err(NextKernelError::Refused)?;
    if survival == Survival::HandedOver {
        compare_formats(root, &image)?;
    }
    tracing::info!("next kernel: {} with the command line `{command_line}`", kernel.display());
    Ok(kexec::load(&image, &command_line, &running)?)
}

/// Returns a text that no other call returns.
fn unique() -> String {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    let ticks = || format!("{:016x}", tsc::now());
    uuid.map_or_else(|_| ticks(), |uuid| uuid.trim().to_owned())
}

/// Tells the next kernel the rate of the TSC, as this kernel knows it, unless the operator already does.
///
/// A kernel measures the rate at its start if the CPU does not tell it, on a loaded hypervisor very wrongly. A guest
/// cannot be restored if the rates of two kernels of one machine differ, unless the CPU scales the TSC. The next
/// kernel measures again later, and corrects the rate by at most 1 % (`tsc_refine_calibration_work` in Linux
/// arch/x86/kernel/tsc.c).
fn tell_tsc_rate(line: CommandLine, khz: Option<u32>) -> CommandLine {
    match khz {
        Some(khz @ 1..) => add_unless_given(line, TSC_RATE, &khz.to_string()),
        _ => line,
    }
}

/// Adds a parameter, unless the operator has given it. A line without room for it is used as it is.
fn add_unless_given(line: CommandLine, name: &str, value: &str) -> CommandLine {
    let is_given = kexec::parameters(line.as_str()).any(|parameter| parameter.is(name));
    match is_given {
        true => line,
        false => line.clone().with(name, value).unwrap_or(line),
    }
}

/// Errors if the next kernel does not read the handover formats that this kernel writes. Only warns if
/// the formats of the next kernel cannot be found out.
fn compare_formats(root: &Path, image: &Image) -> Result<(), NextKernelError> {
    let path = || image.kernel.path.clone();
    let next = abi::of_image(&image.kernel)
        .map_err(|source| NextKernelError::Examine { path: path(), source })?;
    let Some(next) = next else {
        tracing::warn!(
            "{} is not compressed with gzip (CONFIG_KERNEL_GZIP), so it is not checked whether it \
             reads the handover formats of the running kernel",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_kernel_is_told_the_rate_of_the_tsc_once() {
        let told = |text: &str, khz| {
            tell_tsc_rate(CommandLine::new(text).unwrap(), khz).as_str().to_owned()
        };
        assert_eq!(told("quiet", Some(2_596_148)), "quiet tsc_early_khz=2596148");
        assert_eq!(told("quiet -- 1", Some(1)), "quiet tsc_early_khz=1 -- 1");
        assert_eq!(told("tsc-early-khz=5", Some(2_596_148)), "tsc-early-khz=5");
        for unknown in [None, Some(0)] {
            assert_eq!(told("quiet", unknown), "quiet");
        }
        let rebooting = |text: &str| {
            let line = CommandLine::new(text).unwrap();
            add_unless_given(line, PANIC, "10").as_str().to_owned()
        };
        assert_eq!(rebooting("quiet"), "quiet panic=10");
        assert_eq!(rebooting("panic=0 quiet"), "panic=0 quiet");
        let full = "x".repeat(CommandLine::MAX_BYTES);
        assert_eq!(told(&full, Some(1)), full);
    }
}
