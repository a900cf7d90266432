//! The next kernel with its initramfs and command line: opens them once, so that what the preflight checks is what
//! is loaded.

use std::path::{Path, PathBuf};

use kexec::{
    CommandLine, CommandLineError, Identity, Image, ImageError, Initramfs, Kernel, LoadError,
    LoadedImage, Running, StatusError, Survival,
};
use luo::Ticket;
use rustix::process::getpid;

use super::preflight::{self, Check, Finding, Surroundings};
use crate::arch::x86_64::tsc;
use crate::{kvm, look};

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

/// Whether a kernel with this command line was entered by a live update.
pub fn is_of_update(line: &str) -> bool {
    kexec::parameters(line).any(|parameter| parameter.is(MARK) || parameter.is(PARAMETER))
}

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
    Running(#[from] StatusError),
    /// The preflight refuses it.
    #[error("{}", preflight::joined(.0))]
    Refused(Vec<Finding>),
    /// A file is not any more what was checked or rehearsed.
    #[error(
        "{} was changed or replaced after it was {since}: wait until nobody writes it, and begin again", path.display()
    )]
    Changed {
        /// The kernel or the initramfs.
        path: PathBuf,
        /// What was done with it before: `checked` or `rehearsed`.
        since: &'static str,
    },
    /// The running kernel refuses to load the image.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The kernel to enter, with its initramfs and command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextKernel {
    /// Path of the kernel image.
    pub kernel: PathBuf,
    /// Path of the initramfs; `None` if the kernel has one built in.
    pub initramfs: Option<PathBuf>,
    /// The command line as the operator wrote it.
    pub cmdline: String,
    /// The findings of the preflight that the operator overrides.
    pub forced: Vec<Check>,
    /// The files that were rehearsed, if this is an update that follows its rehearsal.
    pub rehearsed: Option<Files>,
}

/// The identities of the kernel and the initramfs; `None` for one that cannot be opened or examined.
pub type Files = [Option<Identity>; 2];

/// Opens a file of the next kernel. Errors if it is on a storage that hangs: this host would hang with it.
fn open<T>(
    what: &'static str,
    path: &Path,
    open: fn(&Path) -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    let error = |source| ImageError::Open { what, path: path.to_owned(), source };
    look::check_answers(path).map_err(error)?;
    open(path)
}

/// A next kernel whose files are open. What cannot be opened or composed is an error here, so that the preflight can
/// tell all of it at once.
#[derive(Debug)]
pub struct Candidate {
    /// What the operator named.
    pub next: NextKernel,
    /// The kernel.
    pub kernel: Result<Kernel, ImageError>,
    /// The initramfs.
    pub initramfs: Result<Option<Initramfs>, ImageError>,
    /// The complete command line.
    pub command_line: Result<CommandLine, CommandLineError>,
    /// How the VMs' memory survives the jump.
    pub survival: Survival,
    /// The running kernel.
    pub running: Result<Running, StatusError>,
    /// The files when they were opened.
    pub opened: Files,
}

impl Candidate {
    /// Opens the files and composes the command line. With a `ticket`, preserved memory lies in a pool, and the
    /// ticket is added to the command line. Without a ticket, the kernel's LUO hands everything over.
    pub fn open(next: &NextKernel, ticket: Option<Ticket>) -> Self {
        let survival = match ticket {
            None => Survival::HandedOver,
            Some(_) => Survival::Reserved,
        };
        Self::with(next, survival, ticket)
    }

    /// [`Candidate::open`] without a host that has a ticket, for a look at the files only. `is_in_pool`: whether
    /// preserved memory would lie in a pool.
    pub fn look(next: &NextKernel, is_in_pool: bool) -> Self {
        let survival = if is_in_pool { Survival::Reserved } else { Survival::HandedOver };
        Self::with(next, survival, None)
    }

    fn with(next: &NextKernel, survival: Survival, ticket: Option<Ticket>) -> Self {
        let kernel = open("kernel", &next.kernel, Kernel::open);
        let initramfs = next.initramfs.as_deref();
        let initramfs = initramfs.map(|path| open("initramfs", path, Initramfs::open)).transpose();
        Self {
            opened: files(kernel.as_ref().ok(), initramfs.as_ref().ok().and_then(Option::as_ref)),
            kernel,
            initramfs,
            command_line: command_line(&next.cmdline, survival, ticket),
            survival,
            running: Running::read(Path::new("/")),
            next: next.clone(),
        }
    }

    /// Checks it. Errors with all findings that refuse it, unless the operator overrides them. Logs the others.
    pub fn check(&self, surroundings: &Surroundings<'_>) -> Result<(), NextKernelError> {
        let findings = preflight::run(self, surroundings);
        let refusals = preflight::refusals(&findings, &self.next.forced);
        for finding in findings.iter().filter(|finding| !refusals.contains(finding)) {
            match finding.severity {
                preflight::Severity::Note => tracing::info!("preflight: {finding}"),
                _ => tracing::warn!("preflight: {finding}"),
            }
        }
        match refusals.is_empty() {
            true => Ok(()),
            false => Err(NextKernelError::Refused(refusals)),
        }
    }

    /// Loads it.
    pub fn load(self) -> Result<Loaded, NextKernelError> {
        let files = Image { kernel: self.kernel?, initramfs: self.initramfs? };
        let (command_line, running) = (self.command_line?, self.running?);
        let kernel = files.kernel.path.display();
        if let Some(rehearsed) = &self.next.rehearsed {
            self.next.is_same(rehearsed, &self.opened, "rehearsed")?;
        }
        tracing::info!("next kernel: {kernel} with the command line `{command_line}`");
        let image = kexec::load(&files, &command_line, &running)?;
        // The running kernel has its copies now. If one is of another content, it is unloaded here.
        self.next.is_same(&self.opened, &identities(&files), "checked")?;
        Ok(Loaded { image, files, command_line, next: self.next, checked: self.opened })
    }
}

/// A next kernel that is loaded, with the open files that it was loaded from. Dropping it unloads it.
#[derive(Debug)]
pub struct Loaded {
    image: LoadedImage,
    files: Image,
    command_line: CommandLine,
    next: NextKernel,
    checked: Files,
}

impl Loaded {
    /// Loads it once more, because another program may have unloaded it or loaded another one over it: the running kernel
    /// tells only whether any is loaded. Errors if that fails or the files were changed; then what is loaded stays so.
    pub fn load_again(&mut self) -> Result<(), NextKernelError> {
        self.next.is_same(&self.checked, &identities(&self.files), "checked")?;
        let running = Running::read(Path::new("/"))?;
        self.image = kexec::load(&self.files, &self.command_line, &running)?;
        Ok(())
    }

    /// Returns the image, to be entered.
    pub fn into_image(self) -> LoadedImage {
        self.image
    }
}

impl NextKernel {
    /// Errors if a file is not what it was when something was done with it.
    fn is_same(
        &self,
        before: &Files,
        now: &Files,
        since: &'static str,
    ) -> Result<(), NextKernelError> {
        let paths = [Some(&self.kernel), self.initramfs.as_ref()];
        let mut files = before.iter().zip(now).zip(paths);
        match files.find_map(|((before, now), path)| path.filter(|_| before != now)) {
            Some(path) => Err(NextKernelError::Changed { path: path.clone(), since }),
            None => Ok(()),
        }
    }
}

fn identities(image: &Image) -> Files {
    files(Some(&image.kernel), image.initramfs.as_ref())
}

fn files(kernel: Option<&Kernel>, initramfs: Option<&Initramfs>) -> Files {
    let initramfs = initramfs.and_then(|initramfs| initramfs.identity().ok());
    [kernel.and_then(|kernel| kernel.identity().ok()), initramfs]
}

/// Checks and loads the next kernel: [`Candidate::open`], [`Candidate::check`] and [`Candidate::load`].
pub fn load(
    next: &NextKernel,
    ticket: Option<Ticket>,
    surroundings: &Surroundings<'_>,
) -> Result<Loaded, NextKernelError> {
    let candidate = Candidate::open(next, ticket);
    candidate.check(surroundings)?;
    candidate.load()
}

/// Returns the command line of the next kernel: the operator's, with what carries the VMs.
fn command_line(
    text: &str,
    survival: Survival,
    ticket: Option<Ticket>,
) -> Result<CommandLine, CommandLineError> {
    let line = match survival {
        Survival::HandedOver => CommandLine::for_live_update(text)?,
        Survival::Reserved => CommandLine::new(text)?,
    };
    let line = match ticket {
        Some(ticket) => line.with(PARAMETER, &ticket.to_string())?,
        None => line,
    };
    let line = line.with(MARK, &unique())?;
    let line = match tsc::rate_is_in_cpuid() {
        true => line,
        false => tell_tsc_rate(line, kvm::tsc_khz().ok()),
    };
    // A distribution decides for itself; nothing else would reboot a host that is PID 1.
    Ok(match getpid().is_init() {
        true => add_unless_given(line, PANIC, &PANIC_SECONDS.to_string()),
        false => line,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_rehearsed_and_then_replaced_is_not_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("initramfs");
        let write = |contents: &str| std::fs::write(&path, contents).unwrap();
        write("070701");
        let next = NextKernel {
            kernel: "/nowhere".into(),
            initramfs: Some(path.clone()),
            cmdline: String::new(),
            forced: Vec::new(),
            rehearsed: None,
        };
        let opened = || Candidate::look(&next, false).opened;
        let rehearsed = opened();
        assert!(rehearsed[0].is_none() && rehearsed[1].is_some());
        next.is_same(&rehearsed, &opened(), "rehearsed").unwrap();
        write("070701 and more");
        let error = next.is_same(&rehearsed, &opened(), "rehearsed").unwrap_err().to_string();
        assert!(error.contains("/initramfs was changed or replaced after it was rehearsed"));
    }

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
