//! Which LUO carries this host's VMs: the best one that is there.
//!
//! ```text
//!   /dev/liveupdate --> the kernel's       else a pool --> the built-in one       else none
//! ```
//!
//! The VMs do not know which. A host without one runs VMs, too, and updates nothing.

use luo::Orchestrator;
use luo::builtin::pool::{Options, Pool, PoolError};

use crate::api::chain;
use crate::config::HostSection;

/// The LUO, or why there is none.
pub type Chosen = Result<Box<dyn Orchestrator>, String>;

/// Chooses. `ram_bytes` is what the VMs of the configuration need.
pub fn choose(section: &HostSection, ram_bytes: u64) -> Chosen {
    let device = luo::kernel::Device::default();
    if device.is_present() {
        tracing::info!("live updates go through the kernel's LUO");
        return Ok(Box::new(device));
    }
    let Some(path) = &section.pool else {
        return Err("there is neither /dev/liveupdate nor a pool; the kernel needs LUO and \
                    `liveupdate=on` on its command line, or `[host]` of the configuration a `pool`"
            .to_owned());
    };
    let start = |least_bytes| Pool::start(path, &Options { least_bytes, ..Options::default() });
    let pool = start(ram_bytes).or_else(|error| match error {
        // It may hold the VMs of the last kernel. Those for which there is no room will say so.
        PoolError::TooSmall { .. } => {
            tracing::error!("not all VMs have room: {error}");
            start(0)
        }
        error => Err(error),
    });
    let pool = pool.map_err(|error| chain(&error).join(": "))?;
    if let Some(why) = pool.disabled() {
        let why = chain(&why).join(": ");
        return Err(format!("the pool {} is left as it is: {why}", path.display()));
    }
    tracing::info!("live updates go through the pool {}", path.display());
    Ok(Box::new(pool))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(pool: Option<&std::path::Path>) -> String {
        let section = HostSection { pool: pool.map(Into::into), ..HostSection::default() };
        choose(&section, 1 << 20).err().expect("no LUO here")
    }

    #[test]
    fn what_is_missing_for_a_live_update_is_named() {
        if luo::kernel::Device::default().is_present() {
            eprintln!("SKIPPED: this kernel has LUO");
            return;
        }
        let text = refused(None);
        assert!(text.contains("/dev/liveupdate") && text.contains("`pool`"), "{text}");
        assert!(refused(Some("/nowhere".as_ref())).contains("/nowhere"));
        let directory = tempfile::tempdir().unwrap();
        assert!(refused(Some(directory.path())).contains("without DAX"));
    }

    #[test]
    fn a_pool_that_is_too_small_is_taken_for_the_vms_that_it_may_hold() {
        // Whatever the least is, a pool without DAX is refused for that and not for its size.
        let directory = tempfile::tempdir().unwrap();
        let section = HostSection { pool: Some(directory.path().into()), ..HostSection::default() };
        if let Err(text) = choose(&section, u64::MAX) {
            assert!(!text.contains("larger"), "{text}");
        }
    }
}
