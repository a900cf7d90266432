//! The state documents with which the VMs came into their processes. They have every node and every binding that the
//! documents of an update will have, and the guests' CPUID, but other values. So a next host can be asked whether it
//! reads them while no VM is paused.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::answers::collect;
use super::conversation::{Conversation, ProcessError, unexpected};
use super::memfd::{read_document, scratch_memfd};
use super::{Guest, Life, Live};
use crate::causes::chain;
use crate::link::{Reply, Request, Role};
use crate::machine::Machine;

/// How long the VMs' processes may take for their documents, all of them together.
const WITHIN: Duration = Duration::from_secs(2);

/// Returns a VM that would go along with an update, unless it is ending.
pub fn travels(vm: &Guest) -> Option<(&Machine, &Live)> {
    match &vm.life {
        Life::Live(live) if !vm.is_ending() => Some((&vm.machine, live)),
        _ => None,
    }
}

/// Asks the processes of all VMs at the same time for the state in which they began. No VM is paused. Returns the
/// documents, or why there is none, in the order of the VMs.
pub fn first_states(vms: &[(&Machine, &Live)]) -> Vec<Result<Vec<u8>, String>> {
    let said = |error: ProcessError| chain(&error).join(": ");
    let mut states: Vec<Result<Vec<u8>, String>> =
        vms.iter().map(|_| Err("the VM's process has not answered".to_owned())).collect();
    let mut asked = Vec::new();
    for (index, (_, live)) in vms.iter().enumerate() {
        // A process of an earlier program would end at a request that it does not know.
        if let Some(program) = &live.program {
            states[index] = Err(format!("its process is an earlier program, {program}"));
            continue;
        }
        let file = match scratch_memfd("first-state") {
            Ok(file) => file,
            Err(error) => {
                states[index] = Err(error.to_string());
                continue;
            }
        };
        live.process.stop_waiting();
        match live.process.send(Request::SaveFirst, &[(Role::State, file.as_fd())]) {
            Ok(()) => asked.push((index, file)),
            Err(error) => states[index] = Err(said(error)),
        }
    }
    let conversations: Vec<&Conversation> =
        asked.iter().map(|(index, _)| &*vms[*index].1.process).collect();
    let answered = collect(&conversations, Instant::now() + WITHIN, |at, reply| {
        let (index, file) = &asked[at];
        states[*index] = match reply {
            Ok(Reply::Saved { bytes }) => {
                read_document(file, bytes).map_err(|error| error.to_string())
            }
            Ok(other) => Err(said(unexpected("tell its first state", &other))),
            Err(error) => Err(said(error)),
        };
        Ok::<(), std::convert::Infallible>(())
    });
    // A VM that is late keeps its error.
    let Ok(_late) = answered;
    states
}
