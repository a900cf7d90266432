//! What the processes of VMs tell the host's main loop: their events, and their end.

use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};

use crate::causes::chain;
use crate::guests::Life;
use crate::guests::conversation::ProcessError;
use crate::host::Host;
use crate::link::{Event, LinkError};

/// Reaps every child that has ended: processes of VMs and, as PID 1, orphaned processes.
pub(super) fn reap(host: &mut Host) {
    while let Some((pid, status)) = next_ended(host) {
        let ended = host
            .vms
            .iter()
            .position(|vm| matches!(&vm.life, Life::Live(l) if l.process.pid() == pid));
        if let Some(index) = ended {
            // The last event of the process explains its end.
            let last = match &host.vms[index].life {
                Life::Live(live) => live.process.last_words(),
                _ => None,
            };
            let how = match (status.terminating_signal(), status.exit_status()) {
                (Some(signal), _) => format!("signal {signal} ended its process"),
                (None, code) => format!("its process ended with exit code {}", code.unwrap_or(0)),
            };
            host.on_event(index, last.or(Some(Event::Crashed(how))));
        }
    }
}

/// Returns a child that has ended. While threads wait for programs that they have started, which are children as well, only
/// a process of a VM.
fn next_ended(host: &Host) -> Option<(Pid, WaitStatus)> {
    if !host.restores.asks_programs() {
        return wait(WaitOptions::NOHANG).ok()?;
    }
    let processes = host.vms.iter().filter_map(|vm| match &vm.life {
        Life::Live(live) => Some(live.process.pid()),
        _ => None,
    });
    let mut ended = processes.filter_map(|pid| waitpid(Some(pid), WaitOptions::NOHANG).ok()?);
    ended.next()
}

/// Handles the events of the process of VM `index`. An error on the link counts as the end of the process.
pub(super) fn handle_events(host: &mut Host, index: usize) {
    let Life::Live(live) = &host.vms[index].life else { return };
    match live.process.events() {
        Ok(events) => events.into_iter().for_each(|event| host.on_event(index, Some(event))),
        // How it ended is known when it is reaped, unless that has taken place.
        Err(ProcessError::Link { source: LinkError::Closed, .. }) => host.on_event(index, None),
        Err(error) => {
            let why = chain(&error).join(": ");
            host.on_event(index, Some(Event::Crashed(why)));
        }
    }
}
