//! The VM of a rehearsal: puts kernel, initramfs and documents into it, and listens until the next host has told what
//! it found, the VM has ended, or time is up.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kexec::{CommandLine, CommandLineError};

use super::archive::ALIGNMENT;
use super::documents::{self, Source};
use super::report::Transcript;
use super::{DIRECTORY, PARAMETER};
use crate::guests::GuestError;
use crate::guests::confinement::Confinement;
use crate::guests::memfd::scratch_memfd;
use crate::guests::staged::{Images, Staged};
use crate::live_update::next_kernel::{self, Candidate};
use crate::live_update::preflight::{self, Check, Finding};
use crate::machine::{MachineError, RAM_UNIT, VmName};
use crate::state::StateError;

/// The VM's name, in messages only: no other VM of the host knows it.
const NAME: &str = "rehearsal";
/// RAM of the VM beside what is computed from the files.
const RAM: u64 = 288 << 20;
/// How many times its size a compressed initramfs takes, packed and unpacked.
const UNPACKED: u64 = 6;
/// Parameters about the memory of the machine, which the VM does not have, and the ticket for the VMs in the pool.
const NOT_OF_A_VM: [&str; 9] = [
    "memmap",
    "mem",
    "crashkernel",
    "hugepages",
    "hugepagesz",
    "default_hugepagesz",
    "kernelcore",
    "movablecore",
    next_kernel::PARAMETER,
];
/// How long the host listens to a VM that has ended: its serial port may still have something to write.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes that are read from the serial port in one round of the host's loop.
const ROUND: usize = 256 << 10;

/// An update cannot be rehearsed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearsalError {
    /// The next kernel cannot be opened.
    #[error("the kernel or the initramfs cannot be opened: {0}")]
    Candidate(String),
    /// There is no initramfs, so the next host's program is not known.
    #[error("there is no initramfs with the next host's program")]
    NoInitramfs,
    /// The command line has no room for the parameter of a rehearsal.
    #[error("the command line cannot be that of a rehearsal")]
    CommandLine(#[from] CommandLineError),
    /// A document cannot be written.
    #[error("a document cannot be written")]
    Document(#[from] StateError),
    /// The initramfs cannot be copied, or the documents cannot be put behind it.
    #[error("the initramfs cannot be copied with the documents behind it")]
    Copy(#[from] io::Error),
    /// The VM cannot be described.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The VM cannot be booted.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// What a rehearsal needs of the host.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// What goes into the documents.
    pub source: Source<'a>,
    /// Bytes of memory that the host has promised to its VMs.
    pub promised: u64,
    /// The confinement of the host's VMs.
    pub confinement: &'a Arc<Confinement>,
    /// How long the rehearsal may take.
    pub within: Duration,
}

/// A rehearsal that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Rehearsal {
    staged: Staged,
    transcript: Transcript,
    /// The path of the kernel.
    subject: String,
    findings: Vec<Finding>,
    within: Duration,
    deadline: Instant,
    /// How the VM has ended.
    ended: Option<String>,
}

impl Rehearsal {
    /// Boots the candidate in a VM.
    pub fn begin(candidate: &Candidate, given: &Given<'_>) -> Result<Self, RehearsalError> {
        let wrong = |error: &dyn std::error::Error| {
            RehearsalError::Candidate(crate::causes::chain(error).join(": "))
        };
        let kernel = candidate.kernel.as_ref().map_err(|error| wrong(error))?;
        let initramfs = candidate.initramfs.as_ref().map_err(|error| wrong(error))?;
        let initramfs = initramfs.as_ref().ok_or(RehearsalError::NoInitramfs)?;
        let command_line = candidate.command_line.clone()?;
        let (archive, findings) = documents::archive(&given.source)?;
        let ram_bytes =
            ram_bytes(kernel.init_size, initramfs.size, &command_line, archive.len() as u64);
        let images = Images {
            kernel: (kernel.file().try_clone()?, kernel.path.clone()),
            initramfs: joined(initramfs.file(), initramfs.size, &archive)?,
            cmdline: rehearsed(&command_line)?.as_str().to_owned(),
        };
        tracing::info!(
            "rehearsal of {} in a VM of {} MiB with the command line `{}`",
            kernel.path.display(),
            ram_bytes >> 20,
            images.cmdline
        );
        let name = VmName::new(NAME)?;
        let staged = Staged::boot(name, images, ram_bytes, given.promised, given.confinement)?;
        Ok(Self {
            staged,
            transcript: Transcript::default(),
            subject: kernel.path.display().to_string(),
            findings,
            within: given.within,
            deadline: Instant::now() + given.within,
            ended: None,
        })
    }

    /// Listens to the VM. Returns all findings when the rehearsal has ended; then it is to be dropped.
    pub fn go_on(&mut self) -> Option<Vec<Finding>> {
        if self.ended.is_none() {
            self.ended = self.staged.ended();
            if self.ended.is_some() {
                self.deadline = self.deadline.min(Instant::now() + LAST_WORDS);
            }
        }
        self.listen();
        let is_late = Instant::now() >= self.deadline;
        if !self.transcript.has_ended() && !is_late {
            return None;
        }
        let late = || format!("did not report within {} s", self.within.as_secs());
        let how = self.ended.take().or_else(|| is_late.then(late));
        let transcript = std::mem::take(&mut self.transcript);
        let mut findings = std::mem::take(&mut self.findings);
        findings.extend(transcript.findings(&self.subject, how.as_deref()));
        preflight::sort(&mut findings);
        Some(findings)
    }

    fn listen(&mut self) {
        let mut buffer = vec![0; 16 << 10];
        let mut left = ROUND;
        while left > 0 {
            let count = self.staged.read(&mut buffer);
            if count == 0 {
                break;
            }
            self.transcript.add(&buffer[..count]);
            left = left.saturating_sub(count);
        }
    }

    /// What is readable when there is something to [`go_on`](Self::go_on) with.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        self.staged.fds()
    }

    /// When it ends at the latest.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Bytes of its VM's RAM that have no memory of the host yet.
    pub fn untouched_bytes(&self) -> u64 {
        self.staged.untouched_bytes()
    }
}

/// The finding that an update could not be rehearsed.
impl From<RehearsalError> for Finding {
    fn from(error: RehearsalError) -> Self {
        Self { remedy: String::new(), ..Self::of_error(Check::RehearsalUntried, &error) }
    }
}

/// Returns the command line of the rehearsal.
fn rehearsed(line: &CommandLine) -> Result<CommandLine, CommandLineError> {
    // What the kernel says when it panics comes over the serial port, too.
    line.without(&NOT_OF_A_VM).with("console", "ttyS0")?.with(PARAMETER, "1")
}

/// Returns a file with the initramfs and the archive behind it.
fn joined(initramfs: &File, size: u64, archive: &[u8]) -> io::Result<File> {
    let file = scratch_memfd(DIRECTORY)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let most = buffer.len().min((size - at) as usize);
        initramfs.read_exact_at(&mut buffer[..most], at)?;
        file.write_all_at(&buffer[..most], at)?;
        at += most as u64;
    }
    file.write_all_at(archive, size.next_multiple_of(ALIGNMENT))?;
    Ok(file)
}

/// Returns the RAM of the VM in bytes: room for the files, for the scratch areas of KHO, and to work.
fn ram_bytes(kernel: u64, initramfs: u64, line: &CommandLine, archive: u64) -> u64 {
    let scratch = kexec::parameters(line.as_str()).filter(|parameter| parameter.is("kho_scratch"));
    let scratch = scratch.filter_map(|parameter| parameter.value).last().unwrap_or_default();
    let scratch: u64 =
        scratch.split(',').filter_map(|area| crate::options::parse_size(area).ok()).sum();
    let files = initramfs.saturating_mul(UNPACKED).saturating_add(2 * archive);
    let sum = RAM.saturating_add(kernel).saturating_add(files).saturating_add(scratch);
    sum.min(u64::MAX - RAM_UNIT).next_multiple_of(RAM_UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_that_of_the_update_without_the_memory_of_the_machine() {
        let line = "quiet memmap=1G!4G hugepages=9 perennial.ticket=7 kho=on -- x";
        let line = rehearsed(&CommandLine::new(line).unwrap()).unwrap();
        assert_eq!(line.as_str(), "quiet kho=on console=ttyS0 perennial.rehearsal=1 -- x");
        let full = CommandLine::new(&"x".repeat(CommandLine::MAX_BYTES)).unwrap();
        rehearsed(&full).unwrap_err();
    }

    #[test]
    fn the_documents_follow_the_initramfs_where_the_kernel_looks_for_them() {
        let mut initramfs = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut initramfs, &[7; 1000]).unwrap();
        let file = joined(&initramfs, 1000, b"070701").unwrap();
        let mut bytes = vec![0; 1030];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[..1000], [7; 1000]);
        assert_eq!((&bytes[1000..1024], &bytes[1024..]), (&[0; 24][..], &b"070701"[..]));
    }

    #[test]
    fn the_vm_has_room_for_its_files_and_the_scratch_areas() {
        let line = |text| CommandLine::new(text).unwrap();
        let plain = ram_bytes(40 << 20, 10 << 20, &line("quiet"), 0);
        assert_eq!(plain, RAM + (40 << 20) + (60 << 20));
        let more = ram_bytes(40 << 20, 10 << 20, &line("kho_scratch=16M,256M,0"), 0);
        assert_eq!(more, plain + (272 << 20));
        assert_eq!(ram_bytes(1, 0, &line("kho_scratch=200%"), 0), RAM + RAM_UNIT);
        assert!(ram_bytes(1, u64::MAX, &line(""), 1) > 1 << 60);
    }
}
