//! VMs that arrive side by side, whose processes are played by the other ends of their links.

use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use luo::builtin::keeper::Keeper;
use luo::{Incoming, SessionName};

use super::*;
use crate::config::HostSection;
use crate::guests::entry::tests::sample;
use crate::link::{Channel, Envelope, FromVm};
use crate::live_update::index::{FileKind, IndexedFile};
use crate::machine::VmName;

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

const NAMES: [&str; 3] = ["first", "second", "third"];

fn entries() -> [VmEntry; 3] {
    NAMES.map(|name| {
        let mut entry = sample();
        entry.machine.name = VmName::new(name).unwrap();
        entry
    })
}

fn confinement() -> Arc<Confinement> {
    Confinement::new(&HostSection::default())
}

/// A VM whose memory is retrieved and whose files are open, and the link of its process.
fn arriving(entry: VmEntry) -> (Arriving, Channel) {
    let (process, vm) = VmProcess::idle(&confinement());
    let held = Held::unretrieved(vm_session(&entry.machine.name), session_of(&entry).files);
    let arriving = Arriving {
        began: Instant::now(),
        left: entry.clone(),
        entry,
        held: Some(held),
        backend: Backend::Keeper,
        process,
        segments: Vec::new(),
        frames: Vec::new(),
        state: tempfile::tempfile().unwrap(),
        ram: Ram::Memfd,
        hints: MissingHints::Accept,
        stage: Stage::Confining,
        since: tsc::now(),
        files: Files::default(),
        missing_hints: Vec::new(),
        program: None,
    };
    (arriving, vm)
}

fn say(vm: &Channel, reply: Reply) {
    vm.send(&FromVm::Reply(reply), &[]).unwrap();
}

fn confined() -> Reply {
    Reply::Confined { missing: Vec::new() }
}

fn restored() -> Reply {
    Reply::Restored { missing_hints: Vec::new() }
}

const RESUMED: Reply = Reply::Resumed { first_entry_ticks: 7 };

/// The requests that have come, the last one first.
fn requests(vm: &Channel) -> Vec<Request> {
    vm.set_timeout(Some(Duration::from_millis(1))).unwrap();
    let mut requests = Vec::new();
    while let Ok((Envelope { request, .. }, _)) = vm.receive() {
        requests.insert(0, request);
    }
    requests
}

fn states(vms: &[RestoredVm]) -> Vec<&'static str> {
    vms.iter().map(|vm| vm.vm.state()).collect()
}

fn why(vm: &RestoredVm) -> String {
    vm.vm.life.why().unwrap_or_default().join(": ")
}

/// Lets the VMs arrive whose processes have said this, with a deadline that has passed by then. Returns also the links.
fn arrive_with(said: [&[Reply]; 3]) -> (Vec<RestoredVm>, Vec<Late>, Vec<Channel>) {
    let (mut said, mut vms) = (said.into_iter(), Vec::new());
    let (arrived, late) = arrive(entries(), Duration::ZERO, &confinement(), |entry| {
        let (arriving, vm) = arriving(entry);
        said.next().unwrap().iter().for_each(|reply| say(&vm, reply.clone()));
        vms.push(vm);
        Ok(arriving)
    });
    (arrived, late, vms)
}

#[test]
fn the_most_urgent_vm_runs_before_the_next_one_begins_if_it_can() {
    let mut vms: Vec<Channel> = Vec::new();
    let (arrived, _) = arrive(entries(), Duration::ZERO, &confinement(), |entry| {
        if let Some(last) = vms.last() {
            assert_eq!(requests(last)[0], Request::Resume);
        }
        let (arriving, vm) = arriving(entry);
        [confined(), restored(), RESUMED].into_iter().for_each(|reply| say(&vm, reply));
        vms.push(vm);
        Ok(arriving)
    });
    assert_eq!(states(&arrived), ["running"; 3]);
    assert!(arrived.iter().all(|vm| vm.first_entry_ticks == Some(7)));
    let names: Vec<_> = arrived.iter().map(|vm| vm.entry.machine.name.as_str()).collect();
    assert_eq!(names, NAMES);
    let phases = &arrived[0].entry.ledger.phases;
    assert!(
        ["open", "restore", "resume"].iter().all(|name| phases.iter().any(|p| p.name == *name))
    );
}

/// A session that was retrieved from a LUO, without files.
fn retrieved(name: &SessionName) -> (Keeper, Incoming) {
    let keeper = Keeper::start();
    let session = keeper.create_session(name).unwrap();
    let keeper = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    drop(session);
    let session = keeper.retrieve_session(name).unwrap();
    (keeper, session)
}

#[test]
fn a_session_that_would_come_again_is_finished_before_its_guest_runs() {
    for backend in [Backend::Systemd, Backend::Pool] {
        let [entry, ..] = entries();
        let name = vm_session(&entry.machine.name);
        let (keeper, session) = retrieved(&name);
        let (mut vm, link) = arriving(entry);
        (vm.backend, vm.stage) = (backend, Stage::Restoring);
        vm.held = Some(Held::new(session, Vec::new()));
        say(&link, restored());
        let Next::GoesOn(mut vm) = vm.go_on(&confinement()) else { panic!("it does not go on") };
        assert_eq!(requests(&link)[0], Request::Resume);
        assert!(vm.held.take().unwrap().into_session().is_none(), "{backend}");
        assert!(keeper.retrieve_session(&name).unwrap_err().is_not_found());
    }
}

#[test]
fn a_guest_whose_session_cannot_be_finished_before_does_not_run() {
    let [entry, ..] = entries();
    let (mut vm, link) = arriving(entry);
    // Not all of its files were retrieved.
    (vm.backend, vm.stage) = (Backend::Systemd, Stage::Restoring);
    say(&link, restored());
    let Next::Failed(vm, _) = vm.go_on(&confinement()) else { panic!("it goes on") };
    assert_eq!(vm.vm.state(), "preserved");
    assert!(!requests(&link).contains(&Request::Resume));
}

#[test]
fn a_vm_whose_process_ends_before_it_reads_that_it_is_to_resume_is_preserved_and_otherwise_lost() {
    for (reads, state) in [(false, "preserved"), (true, "failed")] {
        let [entry, ..] = entries();
        let (mut vm, link) = arriving(entry);
        vm.stage = Stage::Restoring;
        let _ = requests(&link);
        say(&link, restored());
        let Next::GoesOn(vm) = vm.go_on(&confinement()) else { panic!("it does not go on") };
        if reads {
            assert_eq!(requests(&link), [Request::Resume]);
        }
        drop(link);
        let Next::Failed(vm, _) = vm.go_on(&confinement()) else { panic!("it goes on") };
        assert_eq!(vm.vm.state(), state);
    }
}

#[test]
fn a_vm_that_is_late_is_given_up_if_its_session_outlives_the_host() {
    let (vm, link) = arriving(entries()[0].clone());
    let (vm, late) =
        Arriving { backend: Backend::Systemd, ..vm }.falls_behind(LONG, &confinement());
    assert_eq!((vm.vm.state(), late.is_none()), ("preserved", true));
    assert!(!requests(&link).contains(&Request::Resume));
}

#[test]
fn a_late_vm_whose_session_would_come_again_goes_on_only_if_that_is_finished() {
    for is_whole in [true, false] {
        let [entry, ..] = entries();
        let name = vm_session(&entry.machine.name);
        let (keeper, session) = retrieved(&name);
        let (mut vm, _link) = arriving(entry);
        let missing = IndexedFile { token: 7, kind: FileKind::Ram, bytes: 1, digest: 0 };
        let files = if is_whole { Vec::new() } else { vec![missing] };
        (vm.backend, vm.held) = (Backend::Pool, Some(Held::new(session, files)));
        let (vm, late) = vm.falls_behind(LONG, &confinement());
        assert_eq!((vm.vm.state(), late.is_some()), ("preserved", is_whole));
        let Life::Preserved { held, .. } = vm.vm.life else { panic!() };
        assert_eq!(held.into_session().is_none(), is_whole);
        assert!(keeper.retrieve_session(&name).is_err());
    }
}

#[test]
fn a_vm_that_is_slow_at_every_step_delays_no_other() {
    // The first one answers when both others run.
    let (run, runs) = channel::<()>();
    let mut runs = Some(runs);
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let (arrived, _) = arrive(entries(), LONG, &confinement(), |entry| {
        let (arriving, vm) = arriving(entry);
        let (run, runs) = (run.clone(), runs.take());
        threads.push(thread::spawn(move || {
            if let Some(runs) = runs {
                (0..2).for_each(|_| runs.recv().unwrap());
            }
            for reply in [confined(), restored(), RESUMED] {
                let _ = vm.receive::<Envelope>().unwrap();
                say(&vm, reply);
            }
            let _ = run.send(());
        }));
        Ok(arriving)
    });
    assert_eq!(states(&arrived), ["running"; 3]);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_vm_that_does_not_answer_is_preserved_as_it_came_and_the_others_run() {
    let good = [confined(), restored(), RESUMED];
    for (said, waits_for) in
        [(vec![], "its process confines itself"), (vec![confined()], "its process restores it")]
    {
        let (arrived, late, _vms) = arrive_with([&good, &said, &good]);
        assert_eq!(states(&arrived), ["running", "preserved", "running"]);
        assert!(why(&arrived[1]).contains(waits_for), "{}", why(&arrived[1]));
        let Life::Preserved { held, entry: Some(entry), .. } = &arrived[1].vm.life else {
            panic!("{:?}", arrived[1].vm)
        };
        assert_eq!(**entry, entries()[1]);
        assert_eq!(held.files(), session_of(entry).files);
        let late: Vec<_> = late.iter().map(|late| late.name().as_str()).collect();
        assert_eq!(late, ["second"]);
    }
}

#[test]
fn all_vms_that_do_not_answer_have_one_deadline() {
    let (arrived, late, _vms) = arrive_with([&[], &[], &[]]);
    assert_eq!((states(&arrived), late.len()), (vec!["preserved"; 3], 3));
}

#[test]
fn a_vm_that_is_late_goes_on_when_its_process_does() {
    let (_, mut late, vms) = arrive_with([&[], &[], &[]]);
    let (mut late, vm) = (late.remove(0), &vms[0]);
    let go_on = |late: Late, is_ready| match late.go_on(is_ready, &confinement()) {
        LateNext::Waits(late) => late,
        _ => panic!("it does not wait"),
    };
    late = go_on(late, false);
    say(vm, confined());
    late = go_on(late, true);
    say(vm, restored());
    let LateNext::Live(vm) = late.go_on(true, &confinement()) else { panic!("it is not live") };
    assert_eq!(vm.vm.state(), "running");
    assert!(vm.session.is_none(), "the host has it");
    assert_eq!(requests(&vms[0])[0], Request::Resume);
    // Nobody waits for the answer.
    say(&vms[0], RESUMED);
    let Life::Live(live) = &vm.vm.life else { panic!("{:?}", vm.vm) };
    assert_eq!(live.process.events().unwrap(), []);
}

#[test]
fn a_vm_that_is_too_late_or_fails_later_stays_preserved() {
    let failed = |late: Late, is_ready| match late.go_on(is_ready, &confinement()) {
        LateNext::Failed(why) => why.join(": "),
        _ => panic!("it has not failed"),
    };
    let (_, mut late, mut vms) = arrive_with([&[], &[], &[]]);
    late[0].deadline = Instant::now();
    let said = failed(late.remove(0), false);
    assert!(said.contains("hangs") && said.contains("`restore`"), "{said}");
    say(&vms[1], Reply::Synced);
    assert!(failed(late.remove(0), true).contains("no answer to the request (confine itself)"));
    drop(vms.pop());
    failed(late.remove(0), true);
}

#[test]
fn a_guest_that_was_told_to_resume_counts_as_running_although_its_process_is_late() {
    let (arrived, late, _vms) = arrive_with([&[confined(), restored()], &[], &[]]);
    assert_eq!((states(&arrived)[0], late.len()), ("running", 2));
    assert_eq!(arrived[0].first_entry_ticks, None);
}

#[test]
fn a_process_that_says_anything_else_ends_and_costs_its_vm_nothing_until_the_guest_may_have_run() {
    let good = [confined(), restored(), RESUMED];
    let failed = || Reply::Failed(vec!["on purpose".to_owned()]);
    let cases: [(&[Reply], &str); 7] = [
        (&[Reply::Synced], "preserved"),
        (&[failed()], "preserved"),
        (&[confined(), confined()], "preserved"),
        (&[confined(), RESUMED], "preserved"),
        (&[confined(), failed()], "preserved"),
        (&[confined(), restored(), restored()], "failed"),
        (&[confined(), restored(), failed()], "failed"),
    ];
    for (said, state) in cases {
        let (arrived, late, _vms) = arrive_with([said, &good, &good]);
        assert!(late.is_empty(), "{said:?}");
        assert_eq!(states(&arrived), [state, "running", "running"], "{said:?}");
        assert_eq!(why(&arrived[0]).contains("outdated"), state == "failed", "{said:?}");
    }
}

#[test]
fn garbage_and_the_end_of_a_process_are_no_more_than_that() {
    for garbage in [true, false] {
        let (arrived, _) = arrive(entries(), LONG, &confinement(), |entry| {
            let (arriving, vm) = arriving(entry);
            if garbage {
                vm.send(&"garbage", &[]).unwrap();
            }
            Ok(arriving)
        });
        assert_eq!(states(&arrived), ["preserved"; 3]);
    }
}

#[test]
fn a_process_that_only_sends_events_keeps_no_other_from_beginning() {
    let mut vms = Vec::new();
    let (stop, stopped) = channel::<()>();
    let mut stopped = Some(stopped);
    let mut talker = None;
    let (arrived, _) = arrive(entries(), Duration::ZERO, &confinement(), |entry| {
        let (arriving, vm) = arriving(entry);
        match stopped.take() {
            Some(stopped) => {
                let link = || crate::link::Event::Link {
                    device: "virtio-net@1".to_owned(),
                    link: crate::devices::network::Link::Up,
                };
                vm.send(&FromVm::Event(link()), &[]).unwrap();
                talker = Some(thread::spawn(move || {
                    while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty)
                        && vm.send(&FromVm::Event(link()), &[]).is_ok()
                    {}
                }));
            }
            None => {
                [confined(), restored(), RESUMED].into_iter().for_each(|reply| say(&vm, reply));
                vms.push(vm);
            }
        }
        Ok(arriving)
    });
    drop(stop);
    assert_eq!(states(&arrived), ["preserved", "running", "running"]);
    talker.unwrap().join().unwrap();
}

#[test]
fn a_vm_that_was_paused_stays_paused() {
    let mut entry = sample();
    entry.running = false;
    let mut vms = Vec::new();
    let (arrived, _) = arrive([entry], Duration::ZERO, &confinement(), |entry| {
        let (arriving, vm) = arriving(entry);
        [confined(), restored()].into_iter().for_each(|reply| say(&vm, reply));
        vms.push(vm);
        Ok(arriving)
    });
    assert_eq!(states(&arrived), ["paused"]);
    assert!(matches!(requests(&vms[0])[0], Request::Restore { .. }));
}
