//! The sync in the blackout, with VMs whose processes the test plays.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use luo::{Errno, Outgoing, Preserve, Token};

use super::*;
use crate::config::HostSection;
use crate::guests::Live;
use crate::guests::confinement::Confinement;
use crate::guests::process::VmProcess;
use crate::link::{Channel, FromVm};
use crate::live_update::carry::Carried;
use crate::live_update::leaving::{Kept, Paused, Saved, SavedState};
use crate::live_update::manifest::vm_session;
use crate::live_update::outgoing::Destination;
use crate::machine::{VmName, place, tests as machine};

const LONG: Duration = Duration::from_secs(600);

#[derive(Debug)]
struct Session(File);

impl Preserve for Session {
    fn preserve(&self, _: BorrowedFd<'_>, _: Token) -> Result<(), Errno> {
        Ok(())
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

/// A VM with one disk, and the link of its process.
struct Vm {
    machine: Machine,
    live: Live,
    link: Option<Channel>,
}

fn vm(name: &str, disk: &str, confinement: &Arc<Confinement>) -> Vm {
    let (process, link) = VmProcess::idle(confinement);
    link.send(&FromVm::Reply(Reply::Confined { missing: Vec::new() }), &[]).unwrap();
    process.confined(process.reply().unwrap()).unwrap();
    let machine = Machine {
        name: VmName::new(name).unwrap(),
        devices: place(vec![machine::disk(disk, false)]),
        ..machine::sample()
    };
    Vm { machine, live: Live::without_ram(process), link: Some(link) }
}

/// What a process does when it is asked to sync.
enum Does {
    Syncs,
    Refuses,
    /// Sends an answer to something else.
    Babbles,
    Ends,
    Hangs,
}

/// Syncs VMs that have saved their state, for `within`, and undoes everything if that fails.
fn sync_them(
    vms: &mut [Vm],
    does: &[Does],
    within: Duration,
    is_last_chance: bool,
) -> (Result<Vec<bool>, UpdateError>, Kept) {
    let plan = Plan {
        destination: Destination::Service { lock: None, waits: true },
        stop_before: None,
        verify_frames: false,
        without: Vec::new(),
        budget: within,
        number: 1,
        config: String::new(),
        pool: None,
        carried: &Carried::default(),
        keeps_programs: true,
        observer: &|_| {},
    };
    for (vm, does) in vms.iter_mut().zip(does) {
        let answer = match does {
            Does::Syncs => Some(Reply::Synced),
            Does::Refuses => Some(Reply::Failed(vec!["EIO".to_owned()])),
            Does::Babbles => Some(Reply::Built),
            Does::Ends => {
                vm.link = None;
                None
            }
            Does::Hangs => None,
        };
        let link = vm.link.as_ref();
        answer.iter().zip(link).for_each(|(answer, link)| {
            link.send(&FromVm::Reply(answer.clone()), &[]).unwrap();
        });
    }
    let mut leaving: Vec<_> = vms
        .iter()
        .map(|vm| {
            let session = Box::new(Session(tempfile::tempfile().unwrap()));
            let session = Outgoing::new(vm_session(&vm.machine.name), session);
            let mut leaving = Leaving::new(&vm.machine, &vm.live, session, &plan);
            let file = tempfile::tempfile().unwrap();
            leaving.state = Some(SavedState { file, bytes: 0, digest: 0 });
            leaving
        })
        .collect();
    let (mut kept, blackout) = (Kept::default(), Blackout::begins(within, true));
    let paused = Paused::of(&mut leaving, &mut kept);
    let synced = sync(&plan, paused.vms, &blackout, is_last_chance);
    let synced = synced.map(|()| paused.vms.iter().map(|vm| vm.ended.is_some()).collect());
    drop(paused);
    drop(leaving);
    (synced, kept)
}

fn names(saved: &[Saved]) -> Vec<&str> {
    saved.iter().map(|vm| vm.entry.machine.name.as_str()).collect()
}

fn vms(disks: [&str; 3]) -> (tempfile::TempDir, Vec<Vm>) {
    let directory = tempfile::tempdir().unwrap();
    let confinement = Confinement::new(&HostSection::default());
    let vms = ["one", "two", "three"].into_iter().zip(disks).map(|(name, disk)| {
        let path = directory.path().join(disk);
        vm(name, path.to_str().unwrap(), &confinement)
    });
    let vms = vms.collect();
    ["a", "b", "c"].iter().for_each(|disk| drop(File::create(directory.path().join(disk))));
    (directory, vms)
}

#[test]
fn a_vm_whose_process_has_ended_goes_along_when_the_host_has_synced_its_disks() {
    let (_directory, mut vms) = vms(["a", "b", "c"]);
    let does = [Does::Ends, Does::Syncs, Does::Babbles];
    let (synced, kept) = sync_them(&mut vms, &does, LONG, false);
    assert_eq!(synced.unwrap(), [true, false, true]);
    // The jump then fails.
    assert_eq!(names(&kept.saved), ["one", "three"]);
    assert_eq!(names(&kept.resuming), ["two"]);
    assert_eq!(kept.saved[0].held.name(), &vm_session(&VmName::new("one").unwrap()));
}

#[test]
fn a_disk_that_the_host_cannot_sync_either_is_named_and_no_vm_is_lost() {
    let (_directory, mut vms) = vms(["a", "nowhere", "c"]);
    let does = [Does::Syncs, Does::Ends, Does::Syncs];
    let (synced, kept) = sync_them(&mut vms, &does, LONG, false);
    let error = synced.unwrap_err();
    assert!(error.to_string().contains("VM `two`") && error.to_string().contains("nowhere"));
    assert_eq!(names(&kept.saved), ["two"]);
}

#[test]
fn an_error_of_another_vm_undoes_the_update_and_saves_the_one_that_ended() {
    let (_directory, mut vms) = vms(["a", "b", "c"]);
    let does = [Does::Babbles, Does::Refuses, Does::Syncs];
    let (synced, kept) = sync_them(&mut vms, &does, LONG, false);
    let error = synced.unwrap_err();
    assert_eq!(error.vm().map(VmName::as_str), Some("two"), "{error}");
    assert_eq!(names(&kept.saved), ["one"]);
    assert_eq!(names(&kept.resuming), ["two", "three"]);
}

#[test]
fn a_process_that_hangs_is_late_unless_there_is_no_way_back() {
    let (_directory, mut vms) = vms(["a", "b", "c"]);
    let does = [Does::Hangs, Does::Syncs, Does::Syncs];
    let (synced, kept) = sync_them(&mut vms, &does, Duration::from_millis(1), false);
    assert_eq!(synced.unwrap_err().vm().map(VmName::as_str), Some("one"));
    assert_eq!(names(&kept.saved), [""; 0]);
    let (_directory, mut vms) = self::vms(["a", "b", "c"]);
    let does = [Does::Refuses, Does::Syncs, Does::Syncs];
    sync_them(&mut vms, &does, LONG, true).0.unwrap();
}

#[test]
fn the_disks_are_synced_again_until_a_round_is_short_or_there_were_enough() {
    let rounds = |took_ms: &[u64]| {
        let mut took = took_ms.iter();
        in_rounds(|| took.next().map(|ms| Duration::from_millis(*ms)).ok_or("one more"))
    };
    let after = |count, ms| Ok(Rounds { count, last: Duration::from_millis(ms) });
    assert_eq!(rounds(&[99]), after(1, 99));
    assert_eq!(rounds(&[900, 100, 20]), after(3, 20));
    assert_eq!(rounds(&[900, 800, 700, 600, 500]), after(5, 500));
    assert_eq!(rounds(&[900]), Err("one more"));
}
