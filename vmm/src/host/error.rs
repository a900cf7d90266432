//! Errors of a host's start and of its commands.

use std::path::PathBuf;

use super::backend::NoLuo;
use super::instance::InstanceError;
use super::kernel_entry::NoteError;
use super::service;
use crate::api::Line;
use crate::causes::chain;
use crate::config::ConfigError;
use crate::guests::GuestError;
use crate::live_update::preflight::{Finding, UnknownCheck, joined};
use crate::live_update::programs::ProgramError;
use crate::live_update::{Outcome, UpdateError, next_host};
use crate::machine::VmName;

/// The host cannot start, or a command cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A command for a VM failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The live update did not take place.
    #[error("the live update did not take place")]
    Update(#[from] UpdateError),
    /// The handover did not take place.
    #[error("the handover did not take place")]
    Handover(#[source] UpdateError),
    /// The path of this host's own program cannot be determined.
    #[error(transparent)]
    OwnProgram(#[from] next_host::OwnProgramError),
    /// Page frames cannot be compared under systemd.
    #[error(
        "page frames cannot be verified under systemd: it pins guest RAM only after this host has \
         ended, and the kernel may move pages until then; update without `verify_frames`"
    )]
    FramesNotPinned,
    /// systemd could not be asked for the kexec.
    #[error("the live update did not take place")]
    Service(#[from] service::KexecError),
    /// systemd is about to enter the next kernel.
    #[error(
        "a live update is pending: systemd was asked to enter the kernel that is loaded. Another one would take its \
         place, and after a handover the next program would not know of it. Wait for it, or end it (`systemctl cancel`) and try again"
    )]
    Pending,
    /// This host has no LUO for a live update.
    #[error("this host cannot do live updates: {}", .0.why)]
    NoLuo(NoLuo),
    /// A handover is refused while VMs are withheld: the next program could not reach them either.
    #[error(
        "VMs are withheld, because this host cannot reach the place where they are preserved: repair \
         the cause and start this host again, or `update` to a kernel whose host can reach it"
    )]
    Withheld,
    /// A VM was given up. A next host that can reach the pool would resume its old state.
    #[error(
        "the preserved VMs cannot be passed on to the next host: VM `{0}` was given up here, and the \
         next host would resume its old state; switch the host off instead"
    )]
    GivenUp(String),
    /// VMs that are preserved where this host cannot reach them were not passed on.
    #[error("the preserved VMs were not passed on to the next host")]
    PassOn(#[source] UpdateError),
    /// The decision to give a VM up cannot be recorded.
    #[error("VM `{name}` cannot be given up")]
    GiveUp {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: NoteError,
    },
    /// A VM's guest was asked to shut down and has not done so yet.
    #[error(
        "VM `{0}` is stopping: wait until it has ended, or end it at once with `stop --now`, and try \
         again"
    )]
    Stopping(VmName),
    /// A command is carried out for a VM that is to go along.
    #[error(
        "VM `{vm}` is being {done} by another command: wait until that has ended, or leave the VM out, and try again"
    )]
    Busy {
        /// The VM.
        vm: VmName,
        /// What the command does with the VM.
        done: &'static str,
    },
    /// The host is about to end.
    #[error(
        "this host was told to end (`power-off`, SIGTERM or SIGINT), and waits for its VMs: it starts no VM, and is not \
         replaced by another host. Ask the one that is started next"
    )]
    Ending,
    /// Too many requests of a client wait for VMs.
    #[error(
        "{0} requests of this client wait for VMs already: send more when some of them are answered"
    )]
    TooManyWait(usize),
    /// Too many clients watch the events.
    #[error("{0} clients watch the events already: no more can")]
    TooManyWatch(usize),
    /// A disk is not resized yet.
    #[error(
        "VM `{vm}`: {device} is not resized yet, because its storage or the VM's process has not answered for \
         {seconds} s: it may be resized later, so look at `status`"
    )]
    ResizeLate {
        /// The VM.
        vm: VmName,
        /// The disk, as a node.
        device: String,
        /// How long the client has waited.
        seconds: u64,
    },
    /// The VM ended during a resize.
    #[error("VM `{vm}` has ended before {device} was resized: its storage may have become larger")]
    ResizeEnded {
        /// The VM.
        vm: VmName,
        /// The disk, as a node.
        device: String,
    },
    /// The host leaves its VMs to another one during a resize.
    #[error(
        "VM `{vm}`: {device} is not resized yet, and this host ends: its VMs go along, so look at `status` of the \
         next one"
    )]
    ResizeLeft {
        /// The VM.
        vm: VmName,
        /// The disk, as a node.
        device: String,
    },
    /// The kernel or the initramfs of an update is not given.
    #[error("no {0} to update to: name one in the command, or in [update] of the configuration")]
    NothingToLoad(&'static str),
    /// What the last host left cannot be read, and would not survive another live update or handover.
    #[error(
        "what the last host left cannot be read, and would be lost: {why}. Remove the cause and try \
         again with `restore`, or give the state of every withheld VM up with `stop`"
    )]
    NotSeen {
        /// The chain of causes.
        why: String,
    },
    /// A preserved VM cannot be carried on now.
    #[error(
        "`{what}` is preserved, and cannot go along now: try again, or give it up with `stop` if it is \
         a VM that is not needed"
    )]
    NotHeld {
        /// The VM's session, or the document.
        what: String,
        /// Why.
        #[source]
        source: luo::Error,
    },
    /// The program of an earlier host cannot be taken out of its session now.
    #[error("{what} cannot be taken over now")]
    NoProgramNow {
        /// The program.
        what: String,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// A manifest for a preserved VM cannot be carried on now.
    #[error(
        "the manifest for a preserved VM cannot be retrieved now: {why}. Try again, or give the VMs \
         that need it up with `stop`"
    )]
    NoManifest {
        /// The chain of causes.
        why: String,
    },
    /// VMs are preserved, or lost, that could not be restored.
    #[error("{}{why}", recovered_before(recovered))]
    NotRecovered {
        /// The VMs that were restored.
        recovered: Vec<VmName>,
        /// The errors of the others.
        why: String,
        /// What became of the one that has fared worst.
        outcome: Outcome,
    },
    /// A VM's entry in the manifest cannot be read, so this host cannot give a process what the VM needs.
    #[error(
        "this program cannot read the manifest that describes VM `{vm}`, so it cannot serve the VM's process: {why}. \
         `recover --with previous` without a VM hands over the whole host"
    )]
    NoEntry {
        /// The VM.
        vm: VmName,
        /// The chain of causes.
        why: String,
    },
    /// No program of an earlier host is held.
    #[error(
        "no program of an earlier host is held: there was none, it was this one, or there was no room for it (see \
         the last host's log). `handover --program` takes the path of one"
    )]
    NoProgram,
    /// None of the programs that are held can be used.
    #[error("no program of an earlier host can be used: {why}")]
    NoFitProgram {
        /// The programs, each with what is wrong with it.
        why: String,
    },
    /// The file descriptor of a document cannot be duplicated.
    #[error("cannot show the documents to the program")]
    NoCopy(#[source] std::io::Error),
    /// A finding that no operator can override was to be.
    #[error(transparent)]
    Force(#[from] UnknownCheck),
    /// The preflight or the rehearsal refuses the update.
    #[error("the live update did not take place: {}", joined(.0))]
    Refused(Vec<Finding>),
    /// A rehearsal runs.
    #[error(
        "a rehearsal runs: wait until it has ended, or end it by ending the client that asked for it"
    )]
    Rehearsing,
    /// This host cannot rehearse an update.
    #[error(
        "only a host that is the first process of its machine can rehearse an update: the program of any \
         other is not in the initramfs. An update goes on without it with `--no-rehearse`"
    )]
    NoRehearsal,
    /// There was no live update or handover.
    #[error(
        "there is no report: this host was started by a cold boot, and no earlier host left one"
    )]
    NoReport,
    /// A command panicked.
    #[error(
        "this host has a defect, please report it: {0}. What the command had begun may be unfinished: see `status`"
    )]
    Defect(String),
    /// Another host runs on this machine, or it is not known whether one does.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The API cannot be offered.
    #[error("cannot offer the API on {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The main loop failed.
    #[error("the host's main loop failed")]
    Loop(#[source] std::io::Error),
}

/// The start of a sentence about the VMs that were not recovered.
fn recovered_before(recovered: &[VmName]) -> String {
    let names: Vec<_> = recovered.iter().map(|name| format!("`{name}`")).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("VM {} runs again; ", names.join(", ")),
    }
}

impl HostError {
    /// Logs the error, and returns the reply to request `id`, which was not carried out because of it.
    pub(super) fn reply(&self, id: u64) -> Line {
        let why = chain(self);
        tracing::warn!("{}", why.join(": "));
        Line::Error { id, error: why, outcome: self.outcome() }
    }

    /// Returns what became of the guests, if the error is about a live update or a handover.
    pub fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Update(error) | Self::Handover(error) => Some(error.outcome()),
            Self::NoLuo(NoLuo { may_hold_vms: false, .. })
            | Self::NothingToLoad(_)
            | Self::FramesNotPinned
            | Self::Force(_)
            | Self::Pending
            | Self::Stopping(_)
            | Self::Ending
            | Self::Busy { .. }
            | Self::Service(_)
            | Self::Refused(_)
            | Self::Rehearsing
            | Self::NoRehearsal
            | Self::NoProgram
            | Self::NoFitProgram { .. }
            | Self::NoCopy(_)
            | Self::OwnProgram(_) => Some(Outcome::Running),
            Self::NoLuo(_)
            | Self::GivenUp(_)
            | Self::PassOn(_)
            | Self::Withheld
            | Self::Guest(GuestError::StillPreserved { .. } | GuestError::DiskWritten { .. })
            | Self::NoEntry { .. }
            | Self::NotSeen { .. }
            | Self::NotHeld { .. }
            | Self::NoManifest { .. } => Some(Outcome::Preserved),
            Self::NotRecovered { outcome, .. } => Some(*outcome),
            Self::Guest(GuestError::Lost { .. } | GuestError::LostAndBoots { .. }) => {
                Some(Outcome::Lost)
            }
            _ => None,
        }
    }
}
