//! Makes durable what the guests and the host's other programs have written: ahead of the blackout, and in it.
//!
//! Each VM's process syncs its disks. In the blackout the host syncs the disks of a VM whose process ended after the
//! state of the guest was saved. Nobody waits for a disk or a file system without a deadline.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use super::blackout::{Blackout, collect_within};
use super::file_systems;
use super::leaving::Leaving;
use super::outgoing::{Destination, Plan};
use super::{Step, UpdateError};
use crate::arch::x86_64::tsc;
use crate::causes::chain;
use crate::guests::conversation::{ANSWER_WITHIN, ProcessError, unexpected};
use crate::link::{Reply, Request};
use crate::machine::{Machine, VmName};
use crate::signals;
use crate::work::Work;

/// Most rounds in which the guests' disks are synced before the blackout.
const SYNC_ROUNDS: usize = 5;
/// A round that takes less than this leaves little to write in the blackout.
const SYNC_IS_SHORT: Duration = Duration::from_millis(100);
/// How long the host's file systems may take to be synced before the blackout.
const SYNC_HOST_WITHIN: Duration = Duration::from_secs(20);
/// How long they may take in the blackout. Those that were late before are left out.
const SYNC_HOST_AGAIN_WITHIN: Duration = Duration::from_secs(2);

/// Syncs while the guests run, so that little is left to write in the blackout. Returns the ticks at the beginning and the
/// end of the last round: about as much is left as it has written.
pub(super) fn sync_ahead(
    plan: &Plan<'_>,
    vms: &mut [Leaving<'_>],
) -> Result<(u64, u64), UpdateError> {
    let step = Step::PreserveRam;
    let mut last = (tsc::now(), tsc::now());
    let rounds = in_rounds(|| {
        let (start, began) = (tsc::now(), Instant::now());
        ask_to_sync(step, vms)?;
        collect_within(ANSWER_WITHIN, step, vms, |vm, answer| {
            synced(answer).map_err(vm.process_error(step))
        })?;
        last = (start, tsc::now());
        Ok::<_, UpdateError>(began.elapsed())
    })?;
    tracing::info!(
        "the guests' disks were synced {} times while the guests run; the last time took {:?}",
        rounds.count,
        rounds.last
    );
    sync_host(plan, step, SYNC_HOST_WITHIN)?;
    Ok(last)
}

/// How the rounds ended.
#[derive(Debug, PartialEq, Eq)]
struct Rounds {
    count: usize,
    /// How long the last one took.
    last: Duration,
}

/// Does rounds, each of which returns how long it took, until one is short: the next one writes what the guests have
/// written during this one.
fn in_rounds<E>(mut round: impl FnMut() -> Result<Duration, E>) -> Result<Rounds, E> {
    let mut count = 0;
    loop {
        let last = round()?;
        count += 1;
        if last < SYNC_IS_SHORT || count == SYNC_ROUNDS {
            return Ok(Rounds { count, last });
        }
    }
}

/// Syncs in the blackout. The guests' states are saved, and no guest writes any more, so the host can sync the disks of
/// a VM whose process has ended. If all VMs end that do not go along (`is_last_chance`), it also does so for those whose
/// process cannot.
pub(super) fn sync(
    plan: &Plan<'_>,
    vms: &mut [Leaving<'_>],
    blackout: &Blackout,
    is_last_chance: bool,
) -> Result<(), UpdateError> {
    match sync_by_processes(vms, blackout) {
        Ok(()) => sync_for_ended(vms, blackout)?,
        Err(error) if is_last_chance => {
            tracing::warn!("{}: the host syncs all disks", chain(&error).join(": "));
            sync_disks(vms.iter().map(|vm| vm.machine), blackout.left())?;
        }
        Err(error) => return Err(error),
    }
    // The host's own files, such as logs. The guests' disks are durable already.
    sync_host(plan, Step::Sync, SYNC_HOST_AGAIN_WITHIN)
}

fn sync_by_processes(vms: &mut [Leaving<'_>], blackout: &Blackout) -> Result<(), UpdateError> {
    let (start, step) = (tsc::now(), Step::Sync);
    ask_to_sync(step, vms)?;
    blackout.collect(step, vms, |vm, answer| match synced(answer) {
        Ok(()) => {
            vm.ledger.enter("sync", start, tsc::now());
            vm.has_done(step);
            Ok(())
        }
        Err(error) => vm.goes_on_without_process(step, error),
    })
}

/// Asks all VMs at the same time to make durable what their guests have written to their disks.
fn ask_to_sync(step: Step, vms: &mut [Leaving<'_>]) -> Result<(), UpdateError> {
    let sent = vms.iter_mut().try_for_each(|vm| {
        let sent = vm.live.process.send(Request::Sync, &[]);
        sent.or_else(|error| vm.goes_on_without_process(step, error))
    });
    if sent.is_err() {
        vms.iter().for_each(|vm| vm.live.process.stop_waiting());
    }
    sent
}

fn synced(answer: Result<Reply, ProcessError>) -> Result<(), ProcessError> {
    match answer? {
        Reply::Synced => Ok(()),
        other => Err(unexpected("sync", &other)),
    }
}

/// Syncs the disks of the VMs whose process has ended.
fn sync_for_ended(vms: &[Leaving<'_>], blackout: &Blackout) -> Result<(), UpdateError> {
    let ended = || vms.iter().filter_map(|vm| Some((vm, vm.ended.as_ref()?)));
    for (vm, error) in ended() {
        let (name, why) = (&vm.machine.name, chain(error).join(": "));
        tracing::warn!(
            "VM `{name}` goes along, because its state is saved. The host syncs its disks: {why}"
        );
    }
    sync_disks(ended().map(|(vm, _)| vm.machine), blackout.left())?;
    ended().for_each(|(vm, _)| vm.has_done(Step::Sync));
    Ok(())
}

/// Syncs the disks of these VMs by the host, all at the same time. Errors, and names a disk, if that takes longer than
/// `within`.
fn sync_disks<'a>(
    machines: impl Iterator<Item = &'a Machine>,
    within: Duration,
) -> Result<(), UpdateError> {
    let paths = |machine: &'a Machine| {
        let paths = machine.devices.iter().filter_map(|device| device.options.stored_at());
        paths.map(|path| (machine.name.clone(), path.to_owned()))
    };
    let mut unsynced: Vec<(VmName, PathBuf)> = machines.flat_map(paths).collect();
    let failed = |(vm, path), source| UpdateError::SyncDisk { vm, path, source };
    let deadline = Instant::now() + within;
    let (sender, results) = channel();
    for disk in &unsynced {
        let (sender, of_thread) = (sender.clone(), disk.clone());
        let work = Work::begins(format!("syncing {} of VM `{}`", disk.1.display(), disk.0));
        // Opening a disk on a server that is gone may never end.
        let sync = move || {
            signals::leave_to_main_thread();
            let _work = work;
            let synced = File::open(&of_thread.1).and_then(|file| file.sync_data());
            // If the send fails, nobody waits any more.
            let _ = sender.send((of_thread, synced));
        };
        let thread = thread::Builder::new().name("sync".to_owned()).spawn(sync);
        thread.map_err(|source| failed(disk.clone(), source))?;
    }
    while let Some(next) = unsynced.first() {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((disk, Ok(()))) => unsynced.retain(|other| *other != disk),
            Ok((disk, Err(source))) => return Err(failed(disk, source)),
            Err(_) => return Err(failed(next.clone(), io::ErrorKind::TimedOut.into())),
        }
    }
    Ok(())
}

/// Makes the host's own files durable, such as logs. The VMs do not need them, so a file system that hangs does not
/// stop the update. At a stop by systemd this does nothing: systemd syncs all file systems before it enters another kernel,
/// and a thread that hangs would keep this process from ending.
fn sync_host(plan: &Plan<'_>, step: Step, within: Duration) -> Result<(), UpdateError> {
    if let Destination::Service { .. } = plan.destination {
        return Ok(());
    }
    let late = file_systems::sync(plan.pool.as_deref(), within);
    for path in late.map_err(|source| UpdateError::Sync { step, source })? {
        let (path, seconds) = (path.display(), within.as_secs());
        tracing::warn!(
            "the file system {path} was not synced within {seconds} s: what programs wrote there last may be lost"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
