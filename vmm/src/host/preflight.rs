//! The preflight of an update that is not done: `perennial ctl preflight`.

use super::{Host, HostError, index_of, service};
use crate::api::UpdateCall;
use crate::live_update::UpdateError;
use crate::live_update::next_kernel::Candidate;
use crate::live_update::preflight::{self, Check, Finding, Surroundings};
use crate::machine::VmName;

impl Host {
    /// What a preflight knows of this host.
    pub(super) fn surroundings(&self) -> Surroundings<'_> {
        let surroundings = match &self.luo {
            Ok(luo) => Surroundings {
                empties_store: self.is_in_fd_store() && service::empties_store(),
                ..Surroundings::of_host(&self.vms, luo.as_ref())
            },
            Err(_) => Surroundings::without_vms(),
        };
        surroundings.configured(&self.config_text)
    }

    /// Errors if a disk of a VM that a handover would take along could not be opened by the next program. The way back to an
    /// earlier program does without: it is for VMs, whatever else it costs.
    pub(super) fn check_disks(&self, without: &[VmName]) -> Result<(), HostError> {
        let nothing = Surroundings::without_vms();
        let refused =
            preflight::refused_disks(&Surroundings { vms: &self.vms, without, ..nothing });
        match refused.is_empty() {
            true => Ok(()),
            false => Err(HostError::Handover(UpdateError::Disks(refused))),
        }
    }

    /// Returns all findings about an update. Loads nothing, and touches no VM.
    pub(super) fn preflight(&self, call: &UpdateCall) -> Result<Vec<Finding>, HostError> {
        call.without.iter().try_for_each(|name| index_of(&self.vms, name).map(drop))?;
        let next = self.next_kernel(call)?;
        let ticket = match &self.luo {
            Ok(luo) => luo.ticket(),
            Err(_) => self.kernel_entry.ticket_to_pass_on(),
        };
        let candidate = Candidate::open(&next, ticket);
        let kept = self.kept_disks.shown();
        let surroundings = self.surroundings().leaving_out(&call.without).keeping(&kept);
        let mut findings = preflight::run(&candidate, &surroundings);
        if let (Err(none), None) = (&self.luo, ticket)
            && !findings.iter().any(|finding| finding.name == Check::RunningLuo)
        {
            let sentence = format!("this host cannot do live updates: {}", none.why);
            findings.push(Finding::new(Check::RunningLuo, "", sentence, ""));
            preflight::sort(&mut findings);
        }
        Ok(findings)
    }
}
