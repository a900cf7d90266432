//! Guest RAM that requests to the VM's disks use while it is preserved.
//!
//! The kernel's LUO moves pages out of its scratch area when it preserves them. It cannot move a page that a disk reads
//! or writes at that moment (`direct=on`), and then says that it is out of memory. So the host waits for such requests,
//! and names the disks whose storage does not answer them.

use std::os::fd::BorrowedFd;
use std::thread;
use std::time::{Duration, Instant};

use luo::{Outgoing, Token};
use rustix::io::Errno;

use super::{Step, UpdateError};
use crate::devices::storage::STALLED_AFTER;
use crate::guests::Live;
use crate::guests::storage::{DiskReport, disk_reports_of};
use crate::machine::Machine;

/// Time between two attempts to preserve the same memory.
const PAUSE: Duration = Duration::from_millis(200);

/// Preserves memory of a VM in its session. If requests to the VM's disks stand in the way, tries again until they are
/// stalled.
pub(super) fn preserve(
    session: &Outgoing,
    (memory, token): (BorrowedFd<'_>, Token),
    (machine, live): (&Machine, &Live),
    step: Step,
) -> Result<(), UpdateError> {
    let in_flight = || {
        let mut disks = disk_reports_of(machine, live);
        disks.retain(|disk| disk.report.in_flight > 0);
        disks
    };
    let preserved = patiently(|| session.preserve(memory, token), in_flight, STALLED_AFTER);
    preserved.map_err(|(source, disks)| {
        let vm = machine.name.clone();
        match source.errno() == Some(Errno::NOMEM) && !disks.is_empty() {
            false => UpdateError::Luo { step, vm: Some(vm), source },
            true => {
                let (disks, source) = (shown(&disks), Box::new(source));
                UpdateError::InFlight { step, vm, disks, source }
            }
        }
    })
}

/// Calls `preserve` until it succeeds or fails for another reason than a want of memory, and for at most `within`.
/// Gives up earlier if the requests of a disk are stalled, or if no disk had requests `in_flight` after two failures: one
/// may have ended just before the look. Returns the disks that had some after the last failure.
fn patiently(
    preserve: impl Fn() -> Result<(), luo::Error>,
    in_flight: impl Fn() -> Vec<DiskReport>,
    within: Duration,
) -> Result<(), (luo::Error, Vec<DiskReport>)> {
    let deadline = Instant::now() + within;
    let mut idle = 0;
    loop {
        let error = match preserve() {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let disks = in_flight();
        idle += u32::from(disks.is_empty());
        let hangs = disks.iter().any(|disk| disk.report.stalled > 0);
        let may_help = error.errno() == Some(Errno::NOMEM) && idle < 2 && !hangs;
        if !may_help || Instant::now() >= deadline {
            return Err((error, disks));
        }
        thread::sleep(PAUSE);
    }
}

fn shown(disks: &[DiskReport]) -> String {
    let disks = disks.iter().map(|DiskReport { path, report, .. }| {
        let (count, seconds) = (report.in_flight, report.waiting_s);
        format!("{} (operations: {count}, the oldest for {seconds} s)", path.display())
    });
    disks.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use luo::SessionName;

    use super::*;
    use crate::devices::storage::{Engine, StorageReport};

    fn failed(errno: Errno) -> Result<(), luo::Error> {
        let session = SessionName::new("perennial-vm-db").unwrap();
        Err(luo::Error::Preserve { session, token: Token(1), errno })
    }

    fn disk(in_flight: u32) -> Vec<DiskReport> {
        let report = StorageReport {
            engine: Engine::Threads,
            direct: true,
            queues: 1,
            bytes: 512,
            errors: 0,
            last_error: None,
            in_flight,
            stalled: 0,
            waiting_s: 7,
        };
        let (device, path) = ("virtio-blk@1".to_owned(), "/dev/vdc".into());
        vec![DiskReport { device, path, report, age: Duration::ZERO }]
    }

    #[test]
    fn memory_that_disks_use_is_preserved_when_they_have_answered() {
        let attempts = Cell::new(0);
        let preserve = || {
            attempts.set(attempts.get() + 1);
            if attempts.get() < 3 { failed(Errno::NOMEM) } else { Ok(()) }
        };
        patiently(preserve, || disk(1), Duration::from_secs(60)).unwrap();
        assert_eq!(attempts.get(), 3);
    }

    #[test]
    fn disks_that_do_not_answer_in_time_are_named() {
        let (error, disks) =
            patiently(|| failed(Errno::NOMEM), || disk(3), Duration::ZERO).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOMEM));
        assert_eq!(shown(&disks), "/dev/vdc (operations: 3, the oldest for 7 s)");
    }

    #[test]
    fn nobody_waits_where_that_cannot_help() {
        let attempts = Cell::new(0);
        let patience = Duration::from_secs(60);
        let preserve = |errno| {
            attempts.set(attempts.get() + 1);
            failed(errno)
        };
        patiently(|| preserve(Errno::BUSY), || disk(1), patience).unwrap_err();
        assert_eq!(attempts.replace(0), 1);
        patiently(|| preserve(Errno::NOMEM), Vec::new, patience).unwrap_err();
        assert_eq!(attempts.replace(0), 2);
        let hangs = || {
            let mut disks = disk(1);
            disks[0].report.stalled = 1;
            disks
        };
        let (_, disks) = patiently(|| preserve(Errno::NOMEM), hangs, patience).unwrap_err();
        assert_eq!((attempts.get(), disks.len()), (1, 1), "the disk hangs");
    }
}
