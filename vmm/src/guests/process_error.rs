//! Why the process of a VM did not carry out a request.

use std::time::Duration;

use crate::config::USERS;
use crate::link::LinkError;

/// A VM's process could not be started, or did not carry out a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The process cannot be started.
    #[error("cannot start the VM's process")]
    Spawn(#[source] std::io::Error),
    /// All user IDs are taken.
    #[error(
        "all {USERS} user IDs for VMs' processes are in use: stop a VM, or end processes of VMs that hang"
    )]
    NoUser,
    /// A part of the confinement is missing, which the configuration requires.
    #[error(
        "the VM's process cannot be confined in full, as `confine = \"required\"` in [host] demands: {missing}"
    )]
    Unconfined {
        /// The missing parts.
        missing: String,
    },
    /// The process reported why it ends, and ended.
    #[error("the VM's process ended (request: {request}): {why}")]
    Crashed {
        /// The request, in words.
        request: &'static str,
        /// The reason that the process gave.
        why: String,
    },
    /// The link to the process failed.
    #[error("the link to the VM's process failed (request: {request})")]
    Link {
        /// The request, in words.
        request: &'static str,
        /// Why the link failed.
        #[source]
        source: LinkError,
    },
    /// The process answered that it cannot carry out the request.
    #[error("the VM's process cannot {request}")]
    Refused {
        /// The request, in words.
        request: &'static str,
        /// The chain of causes that the process gave, outermost first.
        #[source]
        source: Reasons,
    },
    /// The process has not answered by a deadline. It owes the answer.
    #[error(
        "the VM's process has not answered within {within:?} (request: {request}): it hangs, or the host is \
         overloaded. `stop --now` ends the VM, and `--without` leaves it out"
    )]
    Late {
        /// The request, in words.
        request: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// The process sent a reply of the wrong kind.
    #[error("the VM's process sent {reply}, which is no answer to the request ({request})")]
    Unexpected {
        /// The request, in words.
        request: &'static str,
        /// The reply.
        reply: String,
    },
}

impl ProcessError {
    /// The process cannot carry out the request (in words), for these causes, outermost first.
    pub fn refused(request: &'static str, chain: Vec<String>) -> Self {
        Self::Refused { request, source: Reasons::new(chain) }
    }

    /// Whether the process has ended, or is ended because it does not follow the protocol. One that hangs, or that cannot
    /// carry out a request, may go on.
    pub fn is_end(&self) -> bool {
        match self {
            Self::Crashed { .. } | Self::Unexpected { .. } => true,
            Self::Link { source, .. } => {
                matches!(source, LinkError::Closed | LinkError::Unread | LinkError::Malformed(_))
            }
            _ => false,
        }
    }

    /// Whether the process ended before it read the last request, so that it has done nothing of it.
    pub fn is_unread(&self) -> bool {
        matches!(self, Self::Link { source: LinkError::Unread, .. })
    }
}

/// A chain of causes that came from another process.
#[derive(Debug)]
pub struct Reasons {
    text: String,
    source: Option<Box<Reasons>>,
}

impl Reasons {
    /// Most causes that are kept. A compromised process may send any number of them, and each is one
    /// more level of nesting.
    pub(super) const MOST: usize = 32;

    pub(super) fn new(mut chain: Vec<String>) -> Self {
        chain.truncate(Self::MOST);
        let innermost = chain.pop().unwrap_or_else(|| "no reason".to_owned());
        let innermost = Self { text: innermost, source: None };
        chain
            .into_iter()
            .rev()
            .fold(innermost, |source, text| Self { text, source: Some(Box::new(source)) })
    }
}

impl std::fmt::Display for Reasons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Reasons {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}
