//! A host takes over from a LUO of which any call can fail.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::{Expect, Options as PoolOptions, Pool};
use luo::{Backend, Errno, Error, Outgoing, Retrieve, Token};

use super::*;
use crate::config::Config;
use crate::guests::Live;
use crate::guests::answers::readable;
use crate::guests::entry::VmEntry;
use crate::guests::entry::tests::sample;
use crate::guests::memfd::document_memfd;
use crate::guests::process::VmProcess;
use crate::host::kernel_entry::{KernelEntry, KernelEntryError};
use crate::host::recover::{Recoveries, Wanted};
use crate::live_update::Outcome;
use crate::live_update::carry;
use crate::live_update::index::Index;
use crate::live_update::leaving::Saved;
use crate::live_update::manifest::{INDEX_TOKEN, MANIFEST_TOKEN, host_session};
use crate::live_update::next_kernel::PARAMETER;
use crate::mutex::lock;
use crate::state::document::write_document;

/// A LUO with a predecessor's sessions. The call with this number fails, counted from 0.
#[derive(Debug, Clone)]
struct Fragile {
    keeper: Keeper,
    backend: Backend,
    fault: Arc<Mutex<Option<(usize, Errno)>>>,
}

impl Fragile {
    /// Errors if it is the turn of this call.
    fn call(&self) -> Result<(), Errno> {
        let mut fault = lock(&self.fault);
        match *fault {
            Some((0, errno)) => {
                *fault = None;
                Err(errno)
            }
            Some((left, errno)) => {
                *fault = Some((left - 1, errno));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

#[derive(Debug)]
struct FragileSession(Incoming, Fragile);

impl Retrieve for FragileSession {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, Errno> {
        self.1.call()?;
        self.0.retrieve(token).map_err(|error| error.errno().unwrap_or(Errno::IO))
    }

    fn keeps(&self, _: Token) -> bool {
        false
    }

    // The session is finished when this value is dropped.
    fn finish(&self) -> Result<(), Errno> {
        self.1.call()
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Orchestrator for Fragile {
    fn backend(&self) -> Backend {
        self.backend
    }
    fn create_session(&self, name: &SessionName) -> Result<Outgoing, Error> {
        self.keeper.create_session(name)
    }
    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, Error> {
        let error = |errno| Error::RetrieveSession { session: name.clone(), errno };
        self.call().map_err(error)?;
        let session = self.keeper.retrieve_session(name)?;
        Ok(Incoming::new(name.clone(), Box::new(FragileSession(session, self.clone()))))
    }
    fn create_memory(&self, name: &str, len: u64) -> Result<OwnedFd, Error> {
        self.keeper.create_memory(name, len)
    }
    fn ticket(&self) -> Option<luo::Ticket> {
        None
    }
    fn room(&self) -> luo::Room {
        luo::Room::default()
    }
    fn switch(&self, jump: &mut dyn FnMut()) -> Result<(), Error> {
        Orchestrator::switch(&self.keeper, jump)
    }
}

/// The two VMs, in the configuration too.
const CONFIG: &str = "[[vm]]\nname = \"db\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n\
                      [[vm]]\nname = \"web-1\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n";

/// Leaves two VMs with a manifest that nobody can read.
fn leave() -> Keeper {
    let keeper = Keeper::start();
    let _sessions = leave_in(&keeper);
    Keeper::arrive(keeper.switch().unwrap()).unwrap()
}

/// The same in any LUO, which has yet to switch.
fn leave_in(luo: &dyn Orchestrator) -> Vec<Outgoing> {
    let mut manifest = crate::live_update::manifest::tests::sample();
    let mut db = sample();
    db.machine.name = VmName::new("db").unwrap();
    manifest.vms.push(db);
    let mut sessions = Vec::new();
    let mut leave = |name: SessionName, files: &[(Token, &[u8])]| {
        let session = luo.create_session(&name).unwrap();
        for (token, bytes) in files {
            session.preserve(document_memfd("a", bytes).unwrap().as_fd(), *token).unwrap();
        }
        sessions.push(session);
    };
    for vm in &manifest.vms {
        let name = vm.machine.name.as_str();
        leave(vm_session(&vm.machine.name), &[(Token(0), b"state"), (Token(1), name.as_bytes())]);
    }
    let unreadable = b"a manifest";
    let index = write_document(&Index::of(&manifest, unreadable)).unwrap();
    leave(host_session(), &[(INDEX_TOKEN, &index), (MANIFEST_TOKEN, unreadable)]);
    sessions
}

fn arrive(fragile: &Fragile) -> Host {
    let config = Config::parse(CONFIG).unwrap();
    let mut host = Host::alone(config, CONFIG.to_owned());
    host.vms.clear();
    host.luo = Ok(Box::new(fragile.clone()));
    host.populate(Found { arrival: arrival::look(fragile), keeper: None });
    host
}

/// Asserts that a later host finds all that the host holds.
fn assert_all_goes_along(host: &Host) {
    let next = Keeper::start();
    let sessions = carry::preserve(&next, &host.vms, &host.carried).unwrap();
    assert_eq!(sessions.len(), 2);
    let indexed = carry::indexed(&host.vms, &host.carried);
    let kinds: Vec<Vec<_>> = indexed
        .iter()
        .map(|session| session.files.iter().map(|file| (file.token, file.kind)).collect())
        .collect();
    let vm = vec![(0, FileKind::State), (1, FileKind::Ram)];
    assert_eq!(kinds, [vec![(2, FileKind::Manifest)], vm.clone(), vm]);
    let next = Keeper::arrive(next.switch().unwrap()).unwrap();
    for vm in &host.vms {
        let session = next.retrieve_session(&vm_session(&vm.machine.name)).unwrap();
        let ram = session.retrieve(Token(1)).unwrap();
        let mut contents = [0; 16];
        let read = rustix::io::pread(ram, &mut contents, 0).unwrap();
        assert_eq!(&contents[..read], vm.machine.name.as_str().as_bytes());
    }
    drop(sessions);
}

#[test]
fn a_failure_of_any_call_to_luo_loses_nothing_and_passes() {
    let errnos = [Errno::MFILE, Errno::BUSY, Errno::NOMEM];
    for (backend, errno) in
        errnos.map(|e| (Backend::Keeper, e)).into_iter().chain([(Backend::Systemd, Errno::MFILE)])
    {
        let mut unharmed = false;
        for number in 0..40 {
            let fault = Arc::new(Mutex::new(Some((number, errno))));
            let fragile = Fragile { keeper: leave(), backend, fault: fault.clone() };
            let mut host = arrive(&fragile);
            let states: Vec<_> = host.vms.iter().map(|vm| vm.state()).collect();
            let withheld = ["withheld"; 2];
            assert!(states == ["preserved"; 2] || states == withheld, "{number}: {states:?}");
            unharmed = lock(&fault).take().is_some();
            host.settle(Destiny::NextProgram).unwrap();
            assert!(host.unfinished.is_empty() && host.last_host.unseen.is_none());
            assert_all_goes_along(&host);
            if unharmed {
                break;
            }
        }
        assert!(unharmed, "not all calls were tried");
    }
}

#[test]
fn a_vm_whose_session_cannot_be_retrieved_now_is_preserved_and_one_without_a_session_is_lost() {
    let entry = crate::live_update::manifest::tests::sample().vms.remove(0);
    let config = Config::parse("").unwrap();
    let confinement = crate::guests::confinement::Confinement::new(&config.host);
    for errno in [Errno::MFILE, Errno::NOMEM, Errno::BUSY, Errno::NFILE, Errno::ROFS, Errno::NOENT]
    {
        let fault = Arc::new(Mutex::new(Some((0, errno))));
        let fragile = Fragile { keeper: leave(), backend: Backend::Keeper, fault };
        let (arrived, _) = incoming::resume_all(
            &fragile,
            std::slice::from_ref(&entry),
            &confinement,
            crate::link::MissingHints::Accept,
        );
        let expected = if errno == Errno::NOENT { "failed" } else { "preserved" };
        assert_eq!(arrived[0].vm.state(), expected, "{errno}");
    }
}

/// The kernel's LUO after a host that was killed when it had retrieved the manifest: that has ended with its process.
fn left_by_killed_host(fault: Option<(usize, Errno)>) -> Fragile {
    let keeper = Keeper::start();
    let sessions = leave_in(&keeper);
    let _vms: Vec<_> = sessions.into_iter().filter(|s| *s.name() != host_session()).collect();
    let keeper = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    Fragile { keeper, backend: Backend::Kernel, fault: Arc::new(Mutex::new(fault)) }
}

fn states(host: &Host) -> Vec<&'static str> {
    host.vms.iter().map(|vm| vm.state()).collect()
}

/// A kernel with this command line, and a way to read how it was entered.
fn kernel(line: &str) -> (tempfile::TempDir, impl Fn(Option<luo::Ticket>) -> KernelEntry + use<>) {
    let root = tempfile::tempdir().unwrap();
    write_command_line(root.path(), line);
    let path = root.path().to_owned();
    (root, move |left| KernelEntry::read(&path, left, None).unwrap())
}

#[test]
fn a_vm_that_a_killed_host_has_left_without_a_manifest_is_preserved_and_not_booted() {
    let new = "[[vm]]\nname = \"new\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n";
    for (fault, expected, is_marked) in [
        (None, ["preserved", "preserved", "failed"], true),
        // The first call is that for the first VM.
        (Some((0, Errno::BUSY)), ["withheld", "preserved", "failed"], true),
        // Its state document, and its RAM.
        (Some((1, Errno::IO)), ["preserved", "preserved", "failed"], true),
        (Some((2, Errno::IO)), ["preserved", "preserved", "failed"], true),
        // Another host has looked for them since, and may have booted them.
        (None, ["failed"; 3], false),
    ] {
        let luo = left_by_killed_host(fault);
        let (_root, entry) = kernel(if is_marked { "perennial.update=7-x" } else { "quiet" });
        let config = Config::parse(&format!("{CONFIG}{new}")).unwrap();
        let mut host = Host::alone(config, String::new());
        host.vms.clear();
        host.luo = Ok(Box::new(luo.clone()));
        host.kernel_entry = entry(None);
        host.boot_vms();
        host.redeem_if_none_is_withheld();
        assert_eq!(states(&host), expected, "{fault:?}");
        let is_withheld = expected.contains(&"withheld");
        assert_eq!(entry(None).is_marked(), is_withheld, "nothing can come but that");
        if !is_marked {
            continue;
        }
        let Life::Preserved { held, entry: Some(found), .. } = &host.vms[1].life else { panic!() };
        assert_eq!(held.files().len(), 2, "the state and the RAM");
        assert_eq!((found.state_bytes, found.segments.len()), (5, 1));
        assert!(found.segments[0].preserved && found.running);
        assert_eq!(found.machine, host.config.machines[1]);
        // What could not be looked at then is found later.
        if is_withheld {
            host.vms.truncate(1);
            host.restores = Default::default();
            *lock(&luo.fault) = Some((0, Errno::BUSY));
            host.settle(Destiny::NextKernel).unwrap_err();
            host.find_orphans().unwrap();
            // It goes along if an update is about to take place, and is restored otherwise.
            assert_eq!(states(&host), ["preserved"]);
            host.check_free(&VmName::new("db").unwrap()).unwrap_err();
            assert!(!entry(None).is_marked());
        }
        host.complete_orphan(0);
        let Life::Preserved { held, entry: Some(_), .. } = &host.vms[0].life else { panic!() };
        assert!(held.file(Token(0)).is_ok() && held.file(Token(1)).is_ok(), "{fault:?}");
    }
}

#[test]
fn what_a_killed_host_has_left_is_found_after_a_look_that_failed_too() {
    for (busy, expected) in [(0, ["preserved", "preserved"]), (1, ["withheld", "preserved"])] {
        let (_root, entry) = kernel("perennial.update=7-x");
        // The look for the manifest, and that for the first VM.
        let luo = left_by_killed_host(Some((0, Errno::BUSY)));
        let mut host = Host::alone(Config::parse(CONFIG).unwrap(), CONFIG.to_owned());
        host.vms.clear();
        host.luo = Ok(Box::new(luo.clone()));
        host.kernel_entry = entry(None);
        host.populate(Found { arrival: arrival::look(&luo), keeper: None });
        assert_eq!(states(&host), ["withheld"; 2]);
        // The second look finds that there is no manifest.
        *lock(&luo.fault) = (busy > 0).then_some((busy, Errno::BUSY));
        host.look_again().unwrap();
        assert_eq!(states(&host), expected);
        assert_eq!(entry(None).is_marked(), busy > 0);
        // Of what is about to be restored by itself, `recover` does not say that it cannot be restored now.
        let all = host.begin_to_recover_all().unwrap();
        assert_eq!(all.len(), 2);
        for (name, begun) in all {
            let said = begun.err().map_or(String::new(), |error| chain(&error).join(": "));
            assert!(!said.contains("is being restored"), "{name}: {said}");
        }
    }
}

#[test]
fn a_vm_that_was_given_up_is_not_restored_although_a_killed_host_has_left_it() {
    let (_root, entry) = kernel("perennial.update=7-x");
    let luo = left_by_killed_host(None);
    let mut host = Host::alone(Config::parse(CONFIG).unwrap(), CONFIG.to_owned());
    host.vms.clear();
    host.luo = Ok(Box::new(luo.clone()));
    host.kernel_entry = entry(None);
    host.kernel_entry.give_up(&VmName::new("db").unwrap()).unwrap();
    host.populate(Found { arrival: arrival::look(&luo), keeper: None });
    assert_eq!(states(&host), ["failed", "preserved"], "its kernel is missing");
    let of_db = vm_session(&VmName::new("db").unwrap());
    assert!(luo.keeper.retrieve_session(&of_db).unwrap_err().is_not_found());
    assert!(!entry(None).is_marked(), "the next host has nothing to look for");
}

#[test]
fn what_was_given_up_after_a_handover_does_not_come_from_the_pool_and_before_it_counts_no_more() {
    for by_exec in [false, true] {
        let (_root, entry) = kernel("quiet");
        let (ticket, db) = (luo::Ticket::new([7; 16]), VmName::new("db").unwrap());
        entry(None).give_up(&db).unwrap();
        entry(None).note_handover(ticket);
        assert!(!entry(None).is_given_up(&db), "that was about an older state");
        entry(None).give_up(&db).unwrap();
        let luo = Fragile { keeper: leave(), backend: Backend::Pool, fault: Arc::default() };
        let mut host = Host::alone(Config::parse(CONFIG).unwrap(), CONFIG.to_owned());
        host.vms.clear();
        host.luo = Ok(Box::new(luo.clone()));
        host.replaced = Some(Replaced::Program);
        host.kernel_entry = entry(by_exec.then_some(ticket));
        host.populate(Found { arrival: arrival::look(&luo), keeper: None });
        let expected = if by_exec { ["preserved"; 2] } else { ["stopped", "preserved"] };
        assert_eq!(states(&host), expected);
        assert!(entry(None).ticket().is_none() && !entry(None).is_given_up(&db));
    }
}

#[test]
fn a_vm_that_was_given_up_meanwhile_is_not_taken_over_later() {
    let fault = Arc::new(Mutex::new(Some((0, Errno::MFILE))));
    let mut host = arrive(&Fragile { keeper: leave(), backend: Backend::Keeper, fault });
    assert_eq!(host.vms[0].state(), "withheld");
    host.vms[0].stop();
    host.finish_the_rest();
    host.settle(Destiny::NextKernel).unwrap();
    let states: Vec<_> = host.vms.iter().map(|vm| (vm.machine.name.as_str(), vm.state())).collect();
    assert_eq!(states, [("db", "stopped"), ("web-1", "preserved")]);
}

#[test]
fn a_vm_that_was_to_boot_again_and_that_an_operator_booted_meanwhile_runs_on() {
    let keeper = Keeper::start();
    let mut manifest = crate::live_update::manifest::tests::sample();
    manifest.vms.clear();
    for name in ["db", "web-1"] {
        manifest.boots.push(Machine { name: VmName::new(name).unwrap(), ..sample().machine });
    }
    let bytes = write_document(&manifest).unwrap();
    let index = write_document(&Index::of(&manifest, &bytes)).unwrap();
    let session = keeper.create_session(&host_session()).unwrap();
    for (token, bytes) in [(INDEX_TOKEN, &index), (MANIFEST_TOKEN, &bytes)] {
        session.preserve(document_memfd("a", bytes).unwrap().as_fd(), token).unwrap();
    }
    let keeper = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    let fault = Arc::new(Mutex::new(Some((0, Errno::MFILE))));
    let mut host = arrive(&Fragile { keeper, backend: Backend::Keeper, fault });
    assert_eq!(host.vms[0].state(), "withheld");
    let (process, _link) = VmProcess::idle(&host.confinement);
    let pid = process.pid();
    host.vms[0].life = Life::Live(Live::without_ram(process));
    host.look_again().unwrap();
    let states: Vec<_> = host.vms.iter().map(|vm| (vm.machine.name.as_str(), vm.state())).collect();
    assert_eq!(states, [("db", "running"), ("web-1", "restarting")]);
    assert_eq!(host.vms[0].pid(), Some(pid));
}

#[test]
fn a_vm_whose_process_ends_after_an_update_was_undone_is_restored_when_the_process_is_gone() {
    let fault = Arc::new(Mutex::new(None));
    let fragile = Fragile { keeper: leave(), backend: Backend::Keeper, fault };
    let mut host = arrive(&fragile);
    let name = VmName::new("db").unwrap();
    let (process, _link) = VmProcess::idle(&host.confinement);
    let vm = &mut host.vms[0];
    let live = Life::Live(Live::without_ram(process));
    let Life::Preserved { held, .. } = std::mem::replace(&mut vm.life, live) else { panic!() };
    let entry = VmEntry { machine: vm.machine.clone(), ..sample() };
    host.keep(Saved { held, entry, why: vec!["killed".to_owned()] });
    // The process ends on a thread, and has the VM's disks until then.
    assert!(!host.vms[0].is_gone());
    host.restore_when_gone(&name);
    assert_eq!(host.vms[0].state(), "preserved");
    let refused = host.check_free(&name).unwrap_err().to_string();
    assert!(refused.contains("is being restored"), "{refused}");
    assert!(host.end_of_restore(&name).is_none());
    while !host.vms[0].is_gone() {
        let long = std::time::Instant::now() + std::time::Duration::from_secs(600);
        readable(&host.vms[0].ending_fds().collect::<Vec<_>>(), long);
        host.vms[0].note_ends();
    }
    host.go_on_with_restores();
    // There is no state document that could be restored from.
    assert!(host.end_of_restore(&name).is_none_or(|ended| ended.is_err()));
    let is_new = host.vms[0].life.why().is_none_or(|why| why != ["killed"]);
    assert!(is_new || host.vms[0].state() == "restoring", "its restore has not begun");
}

#[test]
fn when_all_is_given_up_nothing_is_left_of_the_last_host() {
    let fault = Arc::new(Mutex::new(None));
    let mut host = arrive(&Fragile { keeper: leave(), backend: Backend::Systemd, fault });
    assert!(host.last_host.session.is_some() && host.carried.manifests.len() == 1);
    for name in ["db", "web-1"] {
        assert!(host.last_host.session.is_some());
        let name = VmName::new(name).unwrap();
        host.give_up_preserved(&name);
        find(&mut host.vms, &name).unwrap().stop();
        host.finish_the_rest();
    }
    assert!(host.last_host.session.is_none() && host.carried.manifests.is_empty());
}

#[test]
fn a_pool_that_could_not_be_reached_is_looked_for_again() {
    let directory = tempfile::tempdir().unwrap();
    let start = |expect| {
        let options =
            PoolOptions { without_dax: true, reserve_bytes: 0, expect, ..PoolOptions::default() };
        Pool::start(directory.path(), &options).unwrap()
    };
    let pool = start(Expect::Nothing);
    let (sessions, ticket) = (leave_in(&pool), Orchestrator::ticket(&pool).unwrap());
    pool.hand_over(|| Ok::<_, std::convert::Infallible>(())).unwrap();
    drop((sessions, pool));

    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("proc")).unwrap();
    std::fs::write(root.path().join("proc/cmdline"), format!("{PARAMETER}={ticket}")).unwrap();
    let config = Config::parse(CONFIG).unwrap();
    let mut host = Host::alone(config, CONFIG.to_owned());
    host.vms.clear();
    host.kernel_entry = KernelEntry::read(root.path(), None, None).unwrap();
    host.pool = Some("/nowhere/pool".into());
    let expect = Expect::Switch(ticket);
    let (luo, arrival) =
        start::look_into(backend::choose(&HostSection::default(), &[], expect), expect);
    host.luo = luo;
    host.populate(Found { arrival, keeper: None });
    assert_eq!(states(&host), ["withheld"; 2]);

    let db = VmName::new("db").unwrap();
    let error = chain(&host.begin_restore(&db, false).unwrap_err()).join(": ");
    assert!(error.contains("/nowhere/pool"), "{error}");
    assert_eq!(states(&host), ["withheld"; 2]);

    // A host that was killed after it had looked leaves all to the next one.
    let killed = start(Expect::Switch(ticket));
    let seen = arrival::look(&killed).unwrap().unwrap();
    assert_eq!(seen.index.sessions.len(), 3);
    std::mem::forget((seen, killed));
    // The lock of a process ends with it.
    std::fs::remove_file(directory.path().join("lock")).unwrap();
    // This one looks a second time.
    let choose = |section: &HostSection, machines: &[Machine], expected: Expect| {
        assert_eq!(section.pool.as_deref(), Some(Path::new("/nowhere/pool")));
        assert_eq!((machines.len(), expected), (2, Expect::Switch(ticket)));
        Ok(Box::new(start(Expect::Switch(ticket))) as Box<dyn Orchestrator>)
    };
    host.reach_again_by(choose).unwrap();
    assert_eq!(states(&host), ["preserved"; 2]);
    assert_eq!(host.kernel_entry.ticket(), None);
    // Nothing is out of reach now.
    host.reach_again_by(|_, _, _| panic!("it looks a third time")).unwrap();
}

/// A host that cannot read the command line of its kernel, with its VMs, each with this disk below `root`.
fn unread_with(root: &Path, disks: [&str; 2]) -> Host {
    let mut text = format!("[host]\nlock = '{}/lock'\n", root.display());
    for (name, disk) in ["db", "web-1"].into_iter().zip(disks) {
        let path = root.join(disk);
        text += &format!(
            "[[vm]]\nname = '{name}'\nmemory = 'size=64M'\nkernel = '/k'\ndisk = 'path={}'\n",
            path.display()
        );
    }
    let config = Config::parse(&text).unwrap();
    let mut host = Host::alone(config, text);
    host.vms.clear();
    host.kernel_entry = KernelEntry::unread(root, None);
    host.luo = Err(backend::NoLuo { why: "unread".to_owned(), may_hold_vms: true });
    host.populate(Found { arrival: Ok(None), keeper: None });
    assert!(host.vms.iter().all(|vm| vm.state() == "withheld"));
    host
}

fn unread(root: &Path) -> Host {
    unread_with(root, ["a", "b"])
}

fn write_command_line(root: &Path, line: &str) {
    std::fs::create_dir(root.join("proc")).unwrap();
    std::fs::write(root.join("proc/cmdline"), line).unwrap();
}

#[test]
fn a_host_that_reads_the_command_line_after_a_handover_chooses_its_luo_then() {
    let keeper = leave();
    let path = "/proc/cmdline".into();
    let unread = KernelEntryError::CommandLine { path, source: std::io::Error::other("no memory") };
    let section = HostSection::default();
    let (kernel_entry, luo, arrival) = start::find_vms(&section, &[], Err(unread), Some(&keeper));
    assert!(kernel_entry.is_unread());
    // Nothing is out of reach, so a handover goes by another keeper.
    let none = luo.as_ref().err().expect("none is chosen yet");
    assert!(none.why.contains("cannot read /proc/cmdline") && !none.may_hold_vms, "{none:?}");

    let root = tempfile::tempdir().unwrap();
    let config = Config::parse(CONFIG).unwrap();
    let mut host = Host::alone(config, CONFIG.to_owned());
    host.vms.clear();
    (host.luo, host.replaced) = (luo, Some(Replaced::Program));
    host.kernel_entry = KernelEntry::unread(root.path(), None);
    host.populate(Found { arrival, keeper: Some(keeper) });
    assert_eq!(states(&host), ["preserved"; 2]);
    host.reach_again_by(|_, _, _| panic!("the command line is still unread")).unwrap();
    assert!(host.luo.is_err());

    write_command_line(root.path(), "quiet");
    let fault = Arc::new(Mutex::new(None));
    let luo = Fragile { keeper: Keeper::start(), backend: Backend::Kernel, fault };
    host.reach_again_by(|_, _, _| Ok(Box::new(luo))).unwrap();
    assert!(host.luo.is_ok() && !host.kernel_entry.is_unread());
    assert_eq!(states(&host), ["preserved"; 2]);
    assert_all_goes_along(&host);
}

#[test]
fn what_is_no_ticket_is_not_read_again() {
    let root = tempfile::tempdir().unwrap();
    write_command_line(root.path(), &format!("{PARAMETER}=7"));
    let malformed = KernelEntry::read(root.path(), None, None);
    let (kernel_entry, luo, arrival) =
        start::find_vms(&HostSection::default(), &[], malformed, None);
    assert!(!kernel_entry.is_unread() && matches!(arrival, Ok(None)));
    let none = luo.err().expect("its pool is not known");
    assert!(none.why.contains("is not a ticket") && none.why.contains("`stop`"), "{none:?}");
    assert!(none.may_hold_vms, "{none:?}");
}

#[test]
fn a_restore_that_finds_a_cold_start_says_that_the_vms_boot() {
    let (db, web) = (VmName::new("db").unwrap(), VmName::new("web-1").unwrap());
    let asks = |host: &mut Host, wanted| {
        let mut recoveries = Recoveries::<u8>::default();
        recoveries.begin(host, (0, 7), wanted)?;
        let (_, line) = recoveries.round(host).pop().expect("nothing is restored");
        Ok::<_, HostError>(serde_json::to_value(line).unwrap())
    };
    let earlier = include_bytes!("../../../golden/left/cf5ffc4f3ee7/report.json");
    for (wanted, boots) in [
        (Wanted::Restore(db.clone(), false), vec!["db"]),
        (Wanted::Recover(Some(web)), vec!["web-1"]),
        (Wanted::Recover(None), vec!["db", "web-1"]),
    ] {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("lock.report.json"), earlier).unwrap();
        let mut host = unread(root.path());
        let told = |host: &Host| host.report.as_ref().map(|report| report.vms[0].outcome);
        assert_eq!(told(&host), Some(Outcome::Preserved));
        let kept = || std::fs::read(root.path().join("lock.report.json")).unwrap();
        assert_eq!(kept(), earlier, "it may be of this kernel");
        write_command_line(root.path(), "quiet");
        let answer = asks(&mut host, wanted).unwrap();
        assert_eq!(answer["ok"], serde_json::json!({"recovered": [], "boots": boots}));
        assert!(host.vms.iter().all(Guest::boots_at_start));
        assert_eq!(host.report, report::kept(&host.config.host));
        assert_eq!(kept(), earlier);
    }
    // A live update entered this kernel, and nothing came over.
    let root = tempfile::tempdir().unwrap();
    let mut host = unread(root.path());
    write_command_line(root.path(), "perennial.update=1");
    let error = asks(&mut host, Wanted::Restore(db, false)).unwrap_err();
    let said = chain(&error).join(": ");
    assert!(said.contains("VM `db` was not restored, and is lost"), "{said}");
    assert!(said.contains("It boots anew") && host.vms[0].boots_at_start(), "{said}");
    assert_eq!(error.outcome(), Some(Outcome::Lost));
    let kept = report::kept(&host.config.host).unwrap();
    assert!(kept.vms.iter().all(|vm| vm.outcome == Outcome::Lost), "{kept:?}");
}

#[test]
fn two_vms_that_boot_late_do_not_get_one_disk() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a"), "").unwrap();
    std::fs::hard_link(root.path().join("a"), root.path().join("b")).unwrap();
    let mut host = unread_with(root.path(), ["a", "b"]);
    write_command_line(root.path(), "quiet");
    host.reach_again().unwrap();
    let states: Vec<_> = host.vms.iter().map(|vm| vm.state()).collect();
    assert_eq!(states, ["booting", "failed"]);
    let why = host.vms[1].life.why().unwrap().join(": ");
    assert!(why.contains("VM `web-1` cannot be booted") && why.contains("same disk"), "{why}");
}

#[test]
fn a_kernel_whose_command_line_is_read_late_withholds_no_vm_for_ever() {
    let db = VmName::new("db").unwrap();
    for (line, lost) in [("quiet", false), ("perennial.update=1", true)] {
        let root = tempfile::tempdir().unwrap();
        let mut host = unread(root.path());
        let error = chain(&host.begin_restore(&db, false).unwrap_err()).join(": ");
        assert!(error.contains("proc/cmdline") && states(&host) == ["withheld"; 2], "{error}");
        std::fs::create_dir(root.path().join("proc")).unwrap();
        std::fs::write(root.path().join("proc/cmdline"), line).unwrap();
        // Nothing was left: as at a cold start, the VMs boot.
        let fault = Arc::new(Mutex::new(None));
        let nothing = Fragile { keeper: Keeper::start(), backend: Backend::Kernel, fault };
        host.reach_again_by(|_, _, _| Ok(Box::new(nothing))).unwrap();
        assert_eq!(states(&host), ["booting"; 2]);
        assert_eq!(host.last_host.lost.is_some(), lost);
        assert!(!host.kernel_entry.is_marked());
    }
    // Something was left.
    let root = tempfile::tempdir().unwrap();
    let mut host = unread(root.path());
    std::fs::create_dir(root.path().join("proc")).unwrap();
    std::fs::write(root.path().join("proc/cmdline"), "perennial.update=1").unwrap();
    let fault = Arc::new(Mutex::new(None));
    let luo = Fragile { keeper: leave(), backend: Backend::Kernel, fault };
    host.reach_again_by(|_, _, _| Ok(Box::new(luo))).unwrap();
    assert_eq!(states(&host), ["preserved"; 2]);
}
