//! `perennial ctl`: sends one request to a running host and prints the answer on standard output.

use std::io::{self, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use super::output;
use super::preflight::{self, NextFiles, absolute};
use super::request::Request;
use crate::api::{self, Event, HandoverCall, Line, RecoverCall, Status, UpdateCall, With};
use crate::host;
use crate::live_update::Step;
use crate::live_update::preflight::Finding;
use crate::machine::{MachineError, VmName};
use crate::options::parse_size;

/// How long the next host may take to answer `status` after a handover.
const SUCCESSOR_WITHIN: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The host's API socket
    #[arg(long, value_name = "PATH", default_value = host::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the state of the host, its kernel and its VMs
    Status,
    /// Boot a VM that is stopped
    Boot(Name),
    /// Ask a VM's guest to shut down, and pull the plug if it has not done so in time
    Stop {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// Pull the plug at once
        #[arg(long)]
        now: bool,
        /// Time until the plug is pulled, instead of `stop-within-s` of the configuration
        #[arg(long, value_name = "SECONDS", conflicts_with = "now")]
        within: Option<u32>,
    },
    /// Stop a VM's vCPUs and devices
    Pause(Name),
    /// Resume a paused VM
    Resume(Name),
    /// Take the link of a VM's network devices up or down
    Link {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// The state of the link
        state: LinkState,
        /// The device, as `status` names it; by default, all network devices of the VM
        #[arg(long, value_name = "NAME")]
        device: Option<String>,
    },
    /// Try again to restore a VM whose restore failed after a live update
    Restore {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// Continue the guest also if `missing-hints = "refuse"` in [host] refuses that, or if something has written to its
        /// disks while the VM was preserved
        #[arg(long)]
        force: bool,
    },
    /// Bring preserved VMs back
    ///
    /// Without --with the running program tries again to restore them. With the previous program, the process of
    /// the VM is started from it, or without a VM the whole host is handed over to it.
    Recover {
        /// The VM's name; by default, all preserved VMs, or the whole host
        #[arg(value_parser = vm_name)]
        vm: Option<VmName>,
        /// The program of an earlier host, which travelled along
        #[arg(long, value_name = "PROGRAM")]
        with: Option<Earlier>,
    },
    /// Write a VM's state document to a new file of the host; a running VM is paused meanwhile
    Dump {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// The file, which must not exist
        #[arg(value_parser = absolute)]
        path: PathBuf,
    },
    /// Read a piece of a VM's RAM, in hexadecimal
    Memory {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// Guest-physical address, decimal or hexadecimal with 0x
        #[arg(value_parser = address)]
        address: u64,
        /// Number of bytes, at most 16384
        #[arg(default_value_t = 256)]
        bytes: u64,
    },
    /// Make a disk of a running VM as large as its file or block device is now, and tell the guest
    ResizeDisk {
        /// The VM's name
        #[arg(value_parser = vm_name)]
        vm: VmName,
        /// The disk: its device or its path, as in `status`
        disk: String,
        /// Grow the disk's file to this size before that, such as 20G
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Say what would stand in the way of an update, without doing anything
    ///
    /// The exit status is 0 if an update would not be refused, 3 if it would, and 1 if that cannot be found out.
    /// docs/preflight.md describes the findings.
    Preflight {
        #[command(flatten)]
        next: Next,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Boot the next kernel in a VM of the host, and say what would stand in the way of an update to it
    ///
    /// No other VM is paused or touched. The exit status is that of `preflight`.
    Rehearse {
        #[command(flatten)]
        next: Next,
        /// How long it may take; by default `rehearse-within-s` in `[update]`, or 120
        #[arg(long, value_name = "SECONDS")]
        within: Option<NonZeroU32>,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace the host's kernel under its VMs
    Update {
        #[command(flatten)]
        next: Next,
        /// Do everything before this step, then undo it: load, preserve-ram, pause, save,
        /// preserve-state, sync or jump
        #[arg(long, value_name = "STEP", value_parser = step)]
        stop_before: Option<Step>,
        /// Compare the page frames of guest RAM before and after
        #[arg(long)]
        verify_frames: bool,
        /// Boot the next kernel in a VM of the host first, and go on only if nothing refuses it there
        #[arg(long)]
        rehearse: bool,
        /// Do not do that, although `rehearse` in `[update]` says it
        #[arg(long, conflicts_with = "rehearse")]
        no_rehearse: bool,
        /// How long that may take; by default `rehearse-within-s` in `[update]`, or 120
        #[arg(long, value_name = "SECONDS", requires = "rehearse")]
        rehearse_within: Option<NonZeroU32>,
    },
    /// Replace the host's program under its VMs, on this kernel
    Handover {
        /// The next program; by default, the path that the running one was started from
        #[arg(long, value_name = "FILE", value_parser = absolute)]
        program: Option<PathBuf>,
        /// Do everything before this step, then undo it: load, preserve-ram, pause, save,
        /// preserve-state, sync or jump
        #[arg(long, value_name = "STEP", value_parser = step)]
        stop_before: Option<Step>,
        /// A VM to leave out: it ends with this host, its memory is lost; may be given several times
        #[arg(long, value_name = "VM", value_parser = vm_name)]
        without: Vec<VmName>,
    },
    /// Print when each phase of the last live update or handover began and ended
    Report,
    /// Print an event, as one line of JSON, for each change of a VM's state and each step of a live update or a
    /// handover, until the host ends
    Events,
    /// Stop all VMs, as `stop` does, and the host
    PowerOff {
        /// Pull the plug of all VMs at once
        #[arg(long)]
        now: bool,
    },
}

/// The next kernel, and what of the preflight is overridden.
#[derive(Debug, Args)]
struct Next {
    #[command(flatten)]
    files: NextFiles,
    /// Go on in spite of a refusal of the preflight that says so; may be given several times
    #[arg(long, value_name = "NAME")]
    force: Vec<String>,
    /// A VM to leave out: it ends with this host, its memory is lost; may be given several times
    #[arg(long, value_name = "VM", value_parser = vm_name)]
    without: Vec<VmName>,
}

impl From<Next> for UpdateCall {
    fn from(next: Next) -> Self {
        let Next { files: NextFiles { kernel, initramfs, cmdline }, force, without } = next;
        Self { kernel, initramfs, cmdline, force, without, ..Self::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Earlier {
    Previous,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkState {
    Up,
    Down,
}

#[derive(Debug, Args)]
struct Name {
    /// The VM's name
    #[arg(value_parser = vm_name)]
    vm: VmName,
}

fn vm_name(text: &str) -> Result<VmName, MachineError> {
    VmName::new(text)
}

fn address(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

fn step(text: &str) -> Result<Step, serde_json::Error> {
    serde_json::from_value(text.into())
}

/// The command failed: the host could not be reached, or refused it.
#[derive(Debug, thiserror::Error)]
pub(super) enum CtlError {
    #[error("cannot reach a host at {}: is `perennial host` running?", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the host at {} has not answered for {seconds} s: it is busy with an update or its start, or it hangs", socket.display())]
    Silent { socket: PathBuf, seconds: u64 },
    #[error("the connection to the host broke")]
    Broken(#[from] io::Error),
    #[error("the host hung up without an answer")]
    NoAnswer {
        /// Whether the host had announced that it was about to enter another kernel or program.
        jumping: bool,
    },
    #[error("the host's answer cannot be read")]
    Unreadable(#[from] serde_json::Error),
    #[error("{}{}", error.join(": "), outcome.map_or(String::new(), |o| format!(" [guests: {o}]")))]
    Refused { error: Vec<String>, outcome: Option<crate::live_update::Outcome> },
}

impl From<Command> for api::Command {
    fn from(command: Command) -> Self {
        match command {
            Command::Status => Self::Status,
            Command::Boot(Name { vm }) => Self::Boot { vm },
            Command::Stop { vm, now, within } => Self::Stop { vm, now, within_s: within },
            Command::Pause(Name { vm }) => Self::Pause { vm },
            Command::Resume(Name { vm }) => Self::Resume { vm },
            Command::Link { vm, state, device } => {
                Self::Link { vm, device, up: state == LinkState::Up }
            }
            Command::Restore { vm, force } => Self::Restore { vm, force },
            Command::Recover { vm, with } => {
                let with = with.map(|Earlier::Previous| With::Previous);
                Self::Recover(RecoverCall { vm, with })
            }
            Command::Dump { vm, path } => Self::Dump { vm, path: Some(path) },
            Command::Memory { vm, address, bytes } => Self::Memory { vm, address, bytes },
            Command::ResizeDisk { vm, disk, size } => Self::ResizeDisk { vm, disk, size },
            Command::Preflight { next, json: _ } => Self::Preflight(next.into()),
            Command::Rehearse { next, within, json: _ } => {
                Self::Rehearse(UpdateCall { rehearse_within_s: within, ..next.into() })
            }
            Command::Update {
                next,
                stop_before,
                verify_frames,
                rehearse,
                no_rehearse,
                rehearse_within: rehearse_within_s,
            } => {
                let rehearse = (rehearse || no_rehearse).then_some(rehearse);
                let next = next.into();
                Self::Update(UpdateCall {
                    stop_before,
                    verify_frames,
                    rehearse,
                    rehearse_within_s,
                    ..next
                })
            }
            Command::Handover { program, stop_before, without } => {
                Self::Handover(HandoverCall { program, stop_before, without })
            }
            Command::Report => Self::Report,
            Command::Events => Self::Events,
            Command::PowerOff { now } => Self::PowerOff { now },
        }
    }
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode, CtlError> {
    let Arguments { socket, command } = arguments;
    if let Command::Events = command {
        return follow(&socket).map(|()| ExitCode::SUCCESS);
    }
    let as_text = matches!(
        command,
        Command::Preflight { json: false, .. } | Command::Rehearse { json: false, .. }
    );
    let hands_over =
        matches!(command, Command::Handover { .. } | Command::Recover { vm: None, with: Some(_) });
    let answer = match ask(&socket, command) {
        // The host that got the request is replaced. Print the next host's status instead.
        Err(CtlError::NoAnswer { jumping: true }) if hands_over => successor(&socket)?,
        other => other?,
    };
    match as_text {
        true => {
            preflight::print(&serde_json::from_value::<Vec<Finding>>(answer["findings"].clone())?)
        }
        false => output::line(serde_json::to_string_pretty(&answer)?),
    }
    Ok(match answer["refused"].as_bool() {
        Some(true) => ExitCode::from(preflight::REFUSED),
        _ => ExitCode::SUCCESS,
    })
}

/// Asks the host for its status.
pub(super) fn status(socket: &Path) -> Result<Status, CtlError> {
    Ok(serde_json::from_value(ask(socket, Command::Status)?)?)
}

fn ask(socket: &Path, command: Command) -> Result<Value, CtlError> {
    Request::send(socket, command.into())?.reply()
}

/// Waits for the next host and returns its status.
fn successor(socket: &Path) -> Result<Value, CtlError> {
    // It takes the VMs over before it answers.
    of_successor(|| Request::send_patiently(socket, api::Command::Status)?.reply())
}

/// Asks until the next host answers.
fn of_successor<T>(ask: impl Fn() -> Result<T, CtlError>) -> Result<T, CtlError> {
    let deadline = Instant::now() + SUCCESSOR_WITHIN;
    loop {
        match ask() {
            Err(CtlError::Connect { .. } | CtlError::NoAnswer { .. } | CtlError::Broken(_))
                if Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// Prints the events of the host, and after a handover those of the next host, until the host ends.
fn follow(socket: &Path) -> Result<(), CtlError> {
    let watch = || {
        let mut request = Request::send(socket, api::Command::Events)?;
        request.reply().map(|_| request)
    };
    let mut output = io::stdout().lock();
    let mut request = watch()?;
    loop {
        let mut jumping = false;
        // A connection that breaks has ended as well.
        while let Ok(Some(line)) = request.line() {
            // A newer host may know events that this program does not.
            jumping |= matches!(serde_json::from_str(&line), Ok(Line::Event(Event::Jumping)));
            if writeln!(output, "{line}").is_err() {
                // Nobody reads the events any more.
                return Ok(());
            }
        }
        if !jumping {
            return Ok(());
        }
        request = of_successor(watch)?;
    }
}
