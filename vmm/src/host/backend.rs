//! Chooses the LUO backend that carries this host's VMs: the best that is available.
//!
//! ```text
//!   this kernel has a ticket --> that pool, or no LUO: the VMs are in no other backend
//!   otherwise  an fd store of systemd, which owns the device
//!   else       /dev/liveupdate --> the kernel's       else a pool --> the built-in one       else none
//! ```
//!
//! The VMs do not know which backend it is. A host without LUO also runs VMs, but cannot do live updates.

use luo::Orchestrator;
use luo::builtin::pool::{Expect, Options, Pool, PoolError};
use luo::kernel::Device;

use super::service;
use crate::causes::chain;
use crate::config::HostSection;
use crate::live_update::next_kernel::PARAMETER;
use crate::machine::Machine;

/// The LUO of this host, or the reason why it has no LUO.
pub type ChosenLuo = Result<Box<dyn Orchestrator>, NoLuo>;

/// This host has no LUO that it can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoLuo {
    /// The reason.
    pub why: String,
    /// Whether VMs of the last kernel may be preserved in the LUO that this host cannot reach.
    pub may_hold_vms: bool,
}

/// Chooses the LUO. `machines` are the VMs of the configuration. `expect` says whether VMs of the last kernel, or of the
/// last host, are in a pool.
pub fn choose(section: &HostSection, machines: &[Machine], expect: Expect) -> ChosenLuo {
    if expect == Expect::Nothing
        && let Some(store) = service::luo(machines)
    {
        // Sessions stay in the fd store even if this host cannot use it, so VMs may be there.
        return store.map_err(|why| NoLuo { why, may_hold_vms: true });
    }
    let ram_bytes = machines.iter().map(|machine| machine.ram_bytes).sum();
    choose_from(Device::default(), section, ram_bytes, expect)
}

fn choose_from(device: Device, section: &HostSection, ram_bytes: u64, expect: Expect) -> ChosenLuo {
    let none = |why| Err(NoLuo { why, may_hold_vms: expect != Expect::Nothing });
    if expect == Expect::Nothing && device.is_present() {
        tracing::info!("live updates go through the kernel's LUO");
        return Ok(Box::new(device));
    }
    let Some(path) = &section.pool else {
        return none(match expect {
            Expect::Begun(_) => "another host of this kernel began to hand over through a pool, but `[host]` of the \
                                 configuration names no `pool`: add it"
                .to_owned(),
            Expect::Nothing | Expect::Anything => "there is neither /dev/liveupdate nor a pool; the kernel needs LUO and \
                     `liveupdate=on` on its command line, or `[host]` of the configuration a `pool`"
                .to_owned(),
            Expect::Switch(_) => format!(
                "what the last host left is in a pool (`{PARAMETER}=` on this kernel's command line, or the note of a \
                 handover), but `[host]` of the configuration names no `pool`: add it"
            ),
        });
    };
    match open_pool(path, ram_bytes, expect) {
        Ok(pool) => {
            tracing::info!("live updates go through the pool {}", path.display());
            Ok(Box::new(pool))
        }
        Err(why) => none(why),
    }
}

fn open_pool(path: &std::path::Path, ram_bytes: u64, expect: Expect) -> Result<Pool, String> {
    let options = Options {
        expect,
        // The host takes a VM out of its session before the guest runs.
        taken_when_finished: true,
        without_dax: !crate::confine::pools_have_dax(),
        ..Options::default()
    };
    let start = |least_bytes| Pool::start(path, &Options { least_bytes, ..options });
    let pool = start(ram_bytes).or_else(|error| match error {
        // The pool may hold VMs of the last kernel, so it is used. A VM without room in it fails to boot.
        PoolError::TooSmall { .. } => {
            tracing::error!("the pool has no room for all VMs of the configuration: {error}");
            start(0)
        }
        error => Err(error),
    });
    let pool = pool.map_err(|error| chain(&error).join(": "))?;
    match pool.disabled() {
        None => Ok(pool),
        Some(why) => {
            let why = chain(&why).join(": ");
            Err(format!("the pool {} is left as it is: {why}", path.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use luo::Ticket;

    use super::*;

    /// Chooses a LUO on a kernel whose `/dev/liveupdate` is at `device`.
    fn chosen(device: &str, pool: Option<&std::path::Path>, expect: Expect) -> ChosenLuo {
        let section = HostSection { pool: pool.map(Into::into), ..HostSection::default() };
        choose_from(Device::new(device), &section, 1 << 20, expect)
    }

    fn refused(pool: Option<&std::path::Path>) -> NoLuo {
        chosen("/nowhere/liveupdate", pool, Expect::Nothing).err().expect("no LUO here")
    }

    #[test]
    fn the_kernels_luo_is_better_than_a_pool() {
        let luo = chosen("/dev/null", Some("/nowhere".as_ref()), Expect::Nothing)
            .unwrap_or_else(|none| panic!("{none:?}"));
        assert_eq!(luo.backend(), luo::Backend::Kernel);
    }

    #[test]
    fn the_reason_names_what_a_live_update_lacks() {
        let none = refused(None);
        assert!(none.why.contains("/dev/liveupdate") && none.why.contains("`pool`"), "{none:?}");
        assert!(!none.may_hold_vms);
        assert!(refused(Some("/nowhere".as_ref())).why.contains("/nowhere"));
        let directory = tempfile::tempdir().unwrap();
        let none = refused(Some(directory.path()));
        assert!(none.why.contains("without DAX") && !none.may_hold_vms, "{none:?}");
    }

    #[test]
    fn a_host_with_a_ticket_uses_the_pool_or_no_luo() {
        let ticket = Ticket::new([7; 16]);
        let directory = tempfile::tempdir().unwrap();
        // Whether this kernel has LUO makes no difference.
        for device in ["/nowhere/liveupdate", "/dev/null"] {
            for (expect, says) in
                [(Expect::Switch(ticket), PARAMETER), (Expect::Begun(ticket), "to hand over")]
            {
                let refused =
                    |pool| chosen(device, pool, expect).err().expect("they are not there");
                let none = refused(None);
                assert!(none.why.contains(says) && none.may_hold_vms, "{none:?}");
                for pool in ["/nowhere".as_ref(), directory.path()] {
                    let none = refused(Some(pool));
                    assert!(none.why.contains(pool.to_str().unwrap()), "{none:?}");
                    assert!(none.may_hold_vms, "{none:?}");
                }
            }
        }
    }

    #[test]
    fn a_pool_that_is_too_small_is_tried_again_without_a_least_size() {
        // Whatever the least size is, a pool without DAX is refused for the missing DAX, not for its size.
        let directory = tempfile::tempdir().unwrap();
        let why = open_pool(directory.path(), u64::MAX, Expect::Nothing).unwrap_err();
        assert!(why.contains("without DAX") && !why.contains("larger"), "{why}");
    }
}
