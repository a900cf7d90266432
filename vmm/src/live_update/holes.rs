//! Holes of guest RAM: pages without memory, to which the kernel's LUO gives memory when it preserves a segment.

use guest_mem::Segment;

use super::UpdateError;
use super::outgoing::Plan;
use crate::causes::chain;
use crate::guests::{Guest, ram};
use crate::machine::Machine;

/// Errors if the host has too little memory to preserve these segments of VMs: the kernel's LUO allocates every page
/// of a preserved segment. With too little memory, the kernel would kill processes, VMs first.
pub(super) fn refuse_too_many_holes<'a, S: Iterator<Item = &'a Segment>>(
    vms: impl Iterator<Item = (&'a Machine, S)>,
) -> Result<(), UpdateError> {
    let mut holes = 0;
    for (machine, segments) in vms {
        for segment in segments {
            let examine = |source| UpdateError::Ram { vm: machine.name.clone(), source };
            holes += ram::filled_bytes(segment).map_err(examine)?;
        }
    }
    if holes == 0 {
        return Ok(());
    }
    let available = ram::available_bytes().map_err(UpdateError::Meminfo)?;
    match holes > available {
        true => Err(UpdateError::NoRoomForHoles { holes, available }),
        false => Ok(()),
    }
}

/// Fills the holes of the segments that will be preserved, because LUO would fill them with small pages, whose retrieval
/// is in the blackout.
pub(super) fn fill_holes(vms: &[Guest], plan: &Plan<'_>) {
    for (machine, live) in vms.iter().filter_map(|vm| plan.leaves(vm)) {
        for segment in &live.segments {
            // LUO reports what stands in the way of preserving the segment.
            if guest_mem::is_touched(segment).unwrap_or(false)
                && let Err(error) = guest_mem::fill_holes(segment)
            {
                let (name, why) = (&machine.name, chain(&error).join(": "));
                tracing::debug!("VM {name}: its RAM may be preserved in small pages: {why}");
            }
        }
    }
}
