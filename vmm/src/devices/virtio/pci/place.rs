//! Builds a virtio device for its place in the machine: a function in a slot, with its BAR.

use std::sync::{Arc, Mutex};

use super::{BAR_SIZE, PciResources, VirtioPci, VirtioState};
use crate::devices::DeviceError;
use crate::devices::kind::{Built, Site};
use crate::devices::virtio::VirtioDevice;
use crate::state::Persist;

impl<D: VirtioDevice<Error: Send + Sync>> VirtioPci<D> {
    /// Builds the function at `site`: restored from `state` if given, otherwise in the reset state,
    /// with the device that `fresh` creates.
    pub fn build(
        site: &Site,
        state: Option<VirtioState<D::State>>,
        device: D::Resources,
        fresh: impl FnOnce(D::Resources) -> Result<D, D::Error>,
    ) -> Result<Built<VirtioState<D::State>>, DeviceError> {
        let resources = PciResources {
            slot: site.slot,
            bar: site.bar,
            memory: site.memory.clone(),
            interrupts: site.interrupts.clone(),
            doorbells: site.doorbells.clone(),
        };
        let function = match state {
            Some(state) => Self::restore(state, (resources, device))
                .map_err(|error| site.error("restore it", error))?,
            None => {
                let device = fresh(device).map_err(|error| site.error("create it", error))?;
                Self::new(device, resources)
                    .map_err(|error| site.error("connect its interrupts", error))?
            }
        };
        let worker = Box::new(function.worker());
        let more_workers = function.more_workers();
        let network_port = function.network_port();
        let storage = function.device.storage();
        let function = Arc::new(Mutex::new(function));
        let mut built = Built::new(&site.node, function.clone(), worker);
        built.parts.mmio = Some((site.bar.into(), BAR_SIZE.into(), function.clone()));
        built.parts.function = Some(function);
        built.parts.network_port = network_port;
        for worker in more_workers {
            built.parts.workers.push(Box::new(worker));
        }
        built.parts.storage = storage;
        Ok(built)
    }
}
