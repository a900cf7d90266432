//! A VM that only this host knows: it is in no configuration and no manifest, has no disk and no network, and ends with
//! its value. The host reads what it writes to its serial port.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use guest_mem::Segment;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use super::GuestError;
use super::confinement::Confinement;
use super::conversation::{ProcessError, unexpected};
use super::files::Files;
use super::guest::create_ram;
use super::process::VmProcess;
use super::ram::RamSource;
use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::observed;
use crate::link::{Event, Reply, Request, Role};
use crate::machine::{KernelBoot, Machine, VmName, place};

/// Bytes that the serial port may be ahead of the host.
const AHEAD: usize = 1 << 20;

/// What a staged VM boots.
#[derive(Debug)]
pub struct Images {
    /// The kernel, and its path for messages.
    pub kernel: (File, PathBuf),
    /// The initramfs.
    pub initramfs: File,
    /// The command line.
    pub cmdline: String,
}

/// A staged VM, which runs. Dropping it ends it.
#[derive(Debug)]
pub struct Staged {
    process: VmProcess,
    output: File,
    segments: Vec<Segment>,
}

impl Staged {
    /// Boots a VM with one vCPU, in which VMs can run if this host's KVM can do that. Errors if the host has too little
    /// memory beside `promised` bytes, which it has promised to others.
    pub fn boot(
        name: VmName,
        images: Images,
        ram_bytes: u64,
        promised: u64,
        confinement: &Arc<Confinement>,
    ) -> Result<Self, GuestError> {
        let segments = create_ram(&name, ram_bytes, RamSource::new(None).with_promised(promised))?;
        let clone = |source: io::Error| GuestError::Clone { name: name.clone(), source };
        let (output, sink) = pipe().map_err(clone)?;
        let mut files =
            Files::kvm().map_err(|source| GuestError::Open { name: name.clone(), source })?;
        files.push(Role::Kernel, images.kernel.0);
        files.push(Role::Initramfs, images.initramfs);
        for segment in &segments {
            files.push(Role::Segment, segment.file().try_clone().map_err(clone)?);
        }
        let devices = place(observed::options());
        for device in &devices {
            let file = observed::console_file(&device.options, &sink).map_err(clone)?;
            if let Some((role, fd)) = file.map(|file| Role::of_device(&device.node(), file)) {
                files.push(role, fd);
            }
        }
        let boot = KernelBoot {
            kernel: images.kernel.1,
            initramfs: Some("initramfs".into()),
            cmdline: images.cmdline,
        };
        let (cpus, cpu) = (1, CpuModel::Host);
        let machine =
            Machine { name: name.clone(), ram_bytes, cpus, cpu, boot: boot.into(), devices };
        let process = start(machine, &files, confinement);
        let process = process.map_err(|source| GuestError::Process { name, source })?;
        Ok(Self { process, output: output.into(), segments })
    }

    /// Reads what the serial port has written. Returns 0 if there is nothing new.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        // Any error means that there is nothing to read.
        self.output.read(buffer).unwrap_or(0)
    }

    /// How the VM has ended, as a clause without a subject. `None` if it runs.
    pub fn ended(&self) -> Option<String> {
        match self.process.events() {
            Ok(events) => events.into_iter().find_map(|event| match event {
                Event::Shutdown => Some("powered off".to_owned()),
                Event::Reset => Some("reset".to_owned()),
                Event::Crashed(why) => Some(format!("failed: {why}")),
                _ => None,
            }),
            Err(error) => Some(format!("ended: {}", crate::causes::chain(&error).join(": "))),
        }
    }

    /// What is readable when there is something to [`read`](Self::read), or the VM has perhaps [`ended`](Self::ended).
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.output.as_fd(), self.process.as_fd()]
    }

    /// Bytes of its RAM that have no memory of the host yet.
    pub fn untouched_bytes(&self) -> u64 {
        let untouched = |segment| guest_mem::untouched_bytes(segment).unwrap_or(segment.len());
        self.segments.iter().map(untouched).sum()
    }
}

fn start(
    machine: Machine,
    files: &Files,
    confinement: &Arc<Confinement>,
) -> Result<VmProcess, ProcessError> {
    let process = VmProcess::spawn(confinement)?;
    let ram = RamSource::new(None).kind();
    process.build(Request::Boot { machine, ram, nested: true }, &files.borrow())?;
    match process.reply()? {
        Reply::Built => {}
        other => return Err(unexpected("boot", &other)),
    }
    process.ask(Request::Resume)?;
    Ok(process)
}

/// A pipe that neither end waits for.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // A smaller pipe loses the oldest output earlier.
    let _ = fcntl_setpipe_size(&write, AHEAD);
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostSection;

    #[test]
    fn a_host_with_too_little_memory_beside_what_it_has_promised_boots_none() {
        let file = || tempfile::tempfile().unwrap();
        let boot = |ram_bytes, promised| {
            let kernel = (file(), PathBuf::from("/kernel"));
            let images = Images { kernel, initramfs: file(), cmdline: String::new() };
            let confinement = Confinement::new(&HostSection::default());
            let name = VmName::new("rehearsal").unwrap();
            Staged::boot(name, images, ram_bytes, promised, &confinement).unwrap_err()
        };
        for (ram_bytes, promised) in [(1 << 50, 0), (32 << 20, 1 << 50)] {
            let error = boot(ram_bytes, promised);
            assert!(matches!(error, GuestError::NotEnoughRam { .. }), "{error}");
        }
    }

    #[test]
    fn a_flood_fills_the_pipe_and_neither_end_waits() {
        let (read, write) = pipe().unwrap();
        let (mut read, mut write) = (File::from(read), File::from(write));
        let mut written = 0;
        while let Ok(count) = io::Write::write(&mut write, &[7; 4096]) {
            written += count;
        }
        assert!((4096..=AHEAD).contains(&written), "{written}");
        let mut buffer = vec![0; AHEAD];
        assert_eq!(read.read(&mut buffer).unwrap(), written);
        read.read(&mut buffer).unwrap_err();
    }
}
