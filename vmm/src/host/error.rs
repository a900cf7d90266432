//! Why a host cannot start, or cannot carry out a command.

use std::path::PathBuf;

use super::backend::NoLuo;
use super::kernel_entry::NoteError;
use super::service;
use crate::config::ConfigError;
use crate::guests::GuestError;
use crate::live_update::incoming::IncomingError;
use crate::live_update::{Outcome, UpdateError, next_host};
use crate::machine::VmName;

/// The host cannot start, or a command cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The configuration is unusable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A command for a VM failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The live update did not happen.
    #[error("the live update did not take place")]
    Update(#[from] UpdateError),
    /// The handover did not happen.
    #[error("the handover did not take place")]
    Handover(#[source] UpdateError),
    /// The path of this host's own program cannot be determined.
    #[error(transparent)]
    OwnProgram(#[from] next_host::OwnProgramError),
    /// Page frames cannot be compared.
    #[error(
        "page frames cannot be verified under systemd: it pins guest RAM only after this host has \
         ended, and may move it until then; update without it"
    )]
    FramesNotPinned,
    /// systemd cannot be asked for the kexec.
    #[error("the live update did not take place")]
    Service(#[from] service::KexecError),
    /// There is no LUO to update through.
    #[error("this host cannot do live updates: {}", .0.why)]
    NoLuo(NoLuo),
    /// The host that a handover starts could not reach the VMs either.
    #[error(
        "VMs are withheld, because what they were preserved in is out of reach: mend that and start \
         this host again, or `update` to a kernel whose host can reach it"
    )]
    Withheld,
    /// A VM was given up, and its old state would come back if the next host found the others.
    #[error(
        "what is preserved cannot be passed on to the next host: VM `{0}` was given up here, and its \
         old state would come back; switch the host off instead"
    )]
    GivenUp(String),
    /// What is preserved out of reach was not passed on.
    #[error("what is preserved was not passed on to the next host")]
    PassOn(#[source] UpdateError),
    /// A VM cannot be given up.
    #[error("VM `{name}` cannot be given up")]
    GiveUp {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: NoteError,
    },
    /// An argument of the update is missing.
    #[error(
        "no {0} for the next host: give one with the command, or in [update] of the configuration"
    )]
    NothingToLoad(&'static str),
    /// What the last kernel left cannot be read.
    #[error("the manifest of the last live update cannot be used; its sessions stay unfinished")]
    Arrival(#[from] IncomingError),
    /// There has been no live update.
    #[error("there is no report: this host came up by a cold boot")]
    NoReport,
    /// The API cannot be offered.
    #[error("cannot offer the API on {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The main loop cannot go on.
    #[error("the host's main loop failed")]
    Loop(#[source] std::io::Error),
}

impl HostError {
    /// What became of the guests, if the error is about a live update.
    pub fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Update(error) | Self::Handover(error) => Some(error.outcome()),
            Self::NoLuo(NoLuo { holds: false, .. })
            | Self::NothingToLoad(_)
            | Self::FramesNotPinned
            | Self::Service(_)
            | Self::OwnProgram(_) => Some(Outcome::Running),
            Self::NoLuo(_)
            | Self::GivenUp(_)
            | Self::PassOn(_)
            | Self::Withheld
            | Self::Guest(GuestError::StillPreserved { .. })
            | Self::Arrival(_) => Some(Outcome::Preserved),
            _ => None,
        }
    }
}
