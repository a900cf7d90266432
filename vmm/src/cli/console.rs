//! `perennial console`: the terminal on the console of a VM.
//!
//! The host says where the console is: a socket, or a pseudoterminal. Every new process of the VM has a new
//! one, after a reset, a live update or a handover: then the terminal is attached again. If the process is
//! the same, another client has taken the console, and keeps it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;

use super::ctl::{self, CtlError};
use super::terminal::{Terminal, Wait};
use crate::api::VmStatus;
use crate::host;
use crate::machine::{MachineError, VmName};

/// How long the next host, or the next process of the VM, may take to offer the console again.
const AGAIN_WITHIN: Duration = Duration::from_secs(60);
/// Time between two attempts to attach again.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The host's API socket
    #[arg(long, value_name = "PATH", default_value = host::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The VM's name
    #[arg(value_parser = vm_name)]
    vm: VmName,
}

fn vm_name(text: &str) -> Result<VmName, MachineError> {
    VmName::new(text)
}

/// A VM's console cannot be attached to.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConsoleError {
    #[error(transparent)]
    Ctl(#[from] CtlError),
    #[error("there is no VM `{name}`; there is {known}")]
    Unknown { name: VmName, known: String },
    #[error("VM `{name}` is {state}: it has no console until it runs")]
    NotLive { name: VmName, state: String },
    #[error(
        "VM `{0}` has no console that a program can attach to: give it `serial = \"socket=PATH\"` or \
         `serial = \"pty\"`"
    )]
    None(VmName),
    #[error("cannot open the console {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another client has taken the console of VM `{0}`")]
    Taken(VmName),
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
}

/// Where the console of a VM is, and the process of the VM that serves it.
#[derive(Debug)]
struct Console {
    path: PathBuf,
    process: Option<i32>,
}

/// Copies between the terminal and the console until the user leaves.
pub(super) fn run(arguments: &Arguments) -> Result<(), ConsoleError> {
    let mut console = find(arguments)?;
    let mut line = console.open()?;
    let terminal = Terminal::open().map_err(ConsoleError::Terminal)?;
    let lines = terminal.lines().map_err(ConsoleError::Terminal)?;
    loop {
        lines.add(line);
        if terminal.wait(None) == Wait::Left {
            return Ok(());
        }
        match attach_again(arguments, &terminal, console.process)? {
            Some(next) => (console, line) = next,
            None => return Ok(()),
        }
    }
}

/// Attaches to the console of the VM's next process. Returns `None` if the user leaves before.
fn attach_again(
    arguments: &Arguments,
    terminal: &Terminal,
    before: Option<i32>,
) -> Result<Option<(Console, File)>, ConsoleError> {
    let deadline = Instant::now() + AGAIN_WITHIN;
    // Whether the host has named the process that was left.
    let mut named = false;
    loop {
        let attached = match find(arguments) {
            // Not opened: that would take the console from the client that has it now.
            Ok(console) if console.process == before => {
                Err(ConsoleError::Taken(arguments.vm.clone()))
            }
            Ok(console) => console.open().map(|line| (console, line)),
            Err(error) => Err(error),
        };
        let error = match attached {
            Ok(attached) => return Ok(Some(attached)),
            Err(error) => error,
        };
        let is_final = match &error {
            // The host's first answer may be older than the end of the process.
            ConsoleError::Taken(_) => std::mem::replace(&mut named, true),
            ConsoleError::NotLive { .. } => true,
            _ => Instant::now() >= deadline,
        };
        if is_final {
            return Err(error);
        }
        if terminal.wait(Some(PAUSE)) == Wait::Left {
            return Ok(None);
        }
    }
}

/// Asks the host where the console is.
fn find(arguments: &Arguments) -> Result<Console, ConsoleError> {
    let Arguments { socket, vm: name } = arguments;
    let vms = ctl::status(socket)?.vms;
    let Some(vm) = vms.iter().find(|vm| vm.name == *name) else {
        let names: Vec<String> = vms.iter().map(|vm| format!("`{}`", vm.name)).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(ConsoleError::Unknown { name: name.clone(), known });
    };
    let VmStatus { state, pid, console, error, .. } = vm;
    match (console, pid) {
        (Some(path), _) => Ok(Console { path: path.clone(), process: *pid }),
        (None, Some(_)) => Err(ConsoleError::None(name.clone())),
        (None, None) => {
            let why = error.as_ref().map(|why| format!(" ({})", why.join(": ")));
            let state = format!("{state}{}", why.unwrap_or_default());
            Err(ConsoleError::NotLive { name: name.clone(), state })
        }
    }
}

impl Console {
    fn open(&self) -> Result<File, ConsoleError> {
        let path = &self.path;
        open(path).map_err(|source| ConsoleError::Open { path: path.clone(), source })
    }
}

/// Opens a socket or a terminal, without blocking.
fn open(path: &Path) -> io::Result<File> {
    if path.metadata()?.file_type().is_socket() {
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        return Ok(OwnedFd::from(stream).into());
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}
