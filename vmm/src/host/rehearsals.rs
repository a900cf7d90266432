//! The rehearsal that runs on this host: who asked for it, and what follows. The host's loop serves all else meanwhile.
//!
//! ```text
//!   rehearse           begin --> runs --> findings: the reply
//!   update --rehearse  begin --> runs --> findings that refuse: an error        none: the update
//!                                  \--its client leaves, or the host ends--> nothing happens
//! ```

use std::num::NonZeroU32;
use std::time::Duration;

use super::{Host, HostError, init};
use crate::api::UpdateCall;
use crate::live_update::next_kernel::{Candidate, Files};
use crate::live_update::preflight::{self, Check, Finding, Surroundings};
use crate::live_update::rehearsal::{Given, Rehearsal, RehearsalError, Source};

/// The client that waits for the rehearsal. `C` tells which client a reply is for.
pub(super) struct Rehearsals<C> {
    asked: Option<Asked<C>>,
}

/// A request for a rehearsal.
pub(super) struct Asked<C> {
    /// The client, and the number of its request.
    pub(super) request: (C, u64),
    /// The arguments.
    pub(super) call: UpdateCall,
    /// Whether the update follows.
    pub(super) updates: bool,
    /// The files that are rehearsed; `None` until the rehearsal has begun.
    pub(super) files: Option<Files>,
}

impl<C> Default for Rehearsals<C> {
    fn default() -> Self {
        Self { asked: None }
    }
}

impl<C: Copy + PartialEq> Rehearsals<C> {
    /// Whether `client` waits for a reply.
    pub(super) fn is_waiting(&self, client: C) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.request.0 == client)
    }

    /// Begins a rehearsal. Returns what was asked and the finding if it cannot be done here now.
    pub(super) fn begin(
        &mut self,
        host: &mut Host,
        asked: Asked<C>,
    ) -> Result<Option<(Asked<C>, Finding)>, HostError> {
        host.refuse_during_rehearsal()?;
        match host.begin_rehearsal(&asked.call)? {
            Ok(files) => {
                self.asked = Some(Asked { files: Some(files), ..asked });
                Ok(None)
            }
            Err(error) => Ok(Some((asked, error.into()))),
        }
    }

    /// Returns what was asked and found, if the rehearsal has ended.
    pub(super) fn round(&mut self, host: &mut Host) -> Option<(Asked<C>, Vec<Finding>)> {
        let findings = host.rehearsal.as_mut()?.go_on()?;
        host.rehearsal = None;
        Some((self.asked.take()?, findings))
    }

    /// Ends the rehearsal if it is of a client for which `is_meant` is true. Returns the request.
    pub(super) fn end(
        &mut self,
        host: &mut Host,
        is_meant: impl Fn(C) -> bool,
    ) -> Option<(C, u64)> {
        let asked = self.asked.take_if(|asked| is_meant(asked.request.0))?;
        host.rehearsal = None;
        Some(asked.request)
    }
}

impl<C> Asked<C> {
    /// Returns the findings that refuse the update.
    pub(super) fn refusals(&self, findings: &[Finding]) -> Result<Vec<Finding>, HostError> {
        Ok(preflight::refusals(findings, &self.call.forced()?))
    }
}

impl Host {
    /// Whether an update is rehearsed first.
    pub(super) fn rehearses(&self, call: &UpdateCall) -> bool {
        call.rehearse.unwrap_or(self.config.update.rehearse)
    }

    /// Errors if a rehearsal runs.
    pub(super) fn refuse_during_rehearsal(&self) -> Result<(), HostError> {
        match self.rehearsal {
            Some(_) => Err(HostError::Rehearsing),
            None => Ok(()),
        }
    }

    /// Bytes of memory that the VM of a rehearsal may still take.
    pub(super) fn promised_to_rehearsal(&self) -> u64 {
        self.rehearsal.as_ref().map_or(0, Rehearsal::untouched_bytes)
    }

    /// Boots the next kernel in a VM. Returns the identities of its files.
    fn begin_rehearsal(
        &mut self,
        call: &UpdateCall,
    ) -> Result<Result<Files, RehearsalError>, HostError> {
        // The program of any other host is on a disk, which a rehearsal does not have.
        if !init::is_pid_1() {
            return Err(HostError::NoRehearsal);
        }
        let luo = self.luo.as_ref().map_err(|none| HostError::NoLuo(none.clone()))?;
        let candidate = Candidate::open(&self.next_kernel(call)?, luo.ticket());
        let source = Source {
            surroundings: Surroundings::of_host(&self.vms, luo.as_ref()).leaving_out(&call.without),
            config: &self.config_text,
            number: self.number + 1,
            carried: &self.carried,
            backend: luo.backend(),
        };
        let within_s = call.rehearse_within_s.map(NonZeroU32::get);
        let within_s = within_s.unwrap_or_else(|| self.config.update.rehearse_within_s());
        let given = Given {
            source,
            promised: self.vms.iter().map(|vm| vm.untouched_bytes()).sum(),
            confinement: &self.confinement,
            within: Duration::from_secs(within_s.into()),
        };
        let begun = Rehearsal::begin(&candidate, &given);
        Ok(begun.map(|rehearsal| {
            self.rehearsal = Some(rehearsal);
            candidate.opened
        }))
    }

    /// Errors with the refusals of the preflight, before anything is rehearsed.
    pub(super) fn refuse_before_rehearsal(&self, call: &UpdateCall) -> Result<(), HostError> {
        let refusals = preflight::refusals(&self.preflight(call)?, &call.forced()?);
        match refusals.is_empty() {
            true => Ok(()),
            false => Err(HostError::Refused(refusals)),
        }
    }
}

/// Logs what the rehearsal of an update that goes on found.
pub(super) fn log(findings: &[Finding]) {
    for finding in findings {
        match finding.name {
            Check::Rehearsed => tracing::info!("rehearsal: {finding}"),
            _ => tracing::warn!("rehearsal: {finding}"),
        }
    }
}
