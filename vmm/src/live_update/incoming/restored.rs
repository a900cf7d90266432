//! What a live update has made of a VM: live, preserved or failed.

use std::sync::Arc;

use luo::Incoming;

use super::frames::FrameComparison;
use crate::guests::confinement::Confinement;
use crate::guests::entry::VmEntry;
use crate::guests::held::Held;
use crate::guests::{Guest, Life};

/// A VM after a live update.
pub struct RestoredVm {
    /// The VM's entry in the manifest. Its ledger now also has the phases of the restore.
    pub entry: VmEntry,
    /// The VM: live, preserved, or failed if there is no session for it or its process ended when it was resumed.
    pub vm: Guest,
    /// The session, if the VM is live. To be finished when all VMs are live.
    pub session: Option<Incoming>,
    /// Host TSC when the first vCPU entered `KVM_RUN`; `None` if the VM was not resumed, or has
    /// not said so yet.
    pub first_entry_ticks: Option<u64>,
    /// Page frames before and after the live update, of each segment for which the manifest has a digest.
    pub frames: Vec<FrameComparison>,
}

impl RestoredVm {
    /// A VM that cannot be restored now. `held` is what the host has of the VM, and `left` the entry as the last host
    /// left it, for another attempt.
    pub(super) fn preserved(
        entry: VmEntry,
        (held, left): (Held, VmEntry),
        why: Vec<String>,
        confinement: &Arc<Confinement>,
    ) -> Self {
        tracing::error!("VM `{}` is preserved: {}", left.machine.name, why.join(": "));
        let life = Life::Preserved { held, entry: Some(Box::new(left)), why };
        Self::without_process(entry, life, confinement)
    }

    /// A VM that cannot be continued.
    pub(super) fn lost(entry: VmEntry, why: Vec<String>, confinement: &Arc<Confinement>) -> Self {
        Self::without_process(entry, Life::Failed(why), confinement)
    }

    fn without_process(entry: VmEntry, life: Life, confinement: &Arc<Confinement>) -> Self {
        let mut vm = Guest::new(entry.machine.clone(), confinement);
        vm.life = life;
        Self { entry, vm, session: None, first_entry_ticks: None, frames: Vec::new() }
    }
}
