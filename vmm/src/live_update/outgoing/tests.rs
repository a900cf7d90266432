//! An update that fails at the jump, with a VM whose process a thread plays.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use luo::{Backend, Errno, Preserve, Room, SessionName, Ticket, Token};

use super::*;
use crate::config::HostSection;
use crate::guests::confinement::Confinement;
use crate::guests::entry::tests::sample;
use crate::guests::process::VmProcess;
use crate::link::{Channel, Envelope, FromVm};
use crate::mutex::lock;

/// The thread that plays the VM's process, and returns the link when it has answered all that comes before the jump.
type Player = Arc<Mutex<Option<JoinHandle<Channel>>>>;

/// A LUO whose sessions outlive this process, and whose switch fails.
#[derive(Debug)]
struct Stays {
    player: Player,
    /// What the VM's process was asked for after the last step, when the manifest had gone.
    asked: Arc<Mutex<Option<Vec<Request>>>>,
    /// What the host's session had, with the start of each when it was dropped.
    documents: Documents,
}

type Documents = Arc<Mutex<Vec<(File, Vec<u8>)>>>;

#[derive(Debug)]
struct Session {
    is_hosts: bool,
    player: Player,
    asked: Arc<Mutex<Option<Vec<Request>>>>,
    documents: Documents,
    file: File,
}

impl Preserve for Session {
    fn preserve(&self, fd: BorrowedFd<'_>, _: Token) -> Result<(), Errno> {
        if self.is_hosts {
            let file = fd.try_clone_to_owned().unwrap().into();
            lock(&self.documents).push((file, Vec::new()));
        }
        Ok(())
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(player) = lock(&self.player).take_if(|_| self.is_hosts) {
            for (file, start) in lock(&self.documents).iter_mut() {
                start.resize(UNDONE.len(), 0);
                file.read_exact_at(start, 0).unwrap();
            }
            *lock(&self.asked) = Some(requests(&player.join().unwrap()));
        }
    }
}

impl Orchestrator for Stays {
    fn backend(&self) -> Backend {
        Backend::Systemd
    }
    fn create_session(&self, name: &SessionName) -> Result<Outgoing, luo::Error> {
        let session = Session {
            is_hosts: *name == host_session(),
            player: self.player.clone(),
            asked: self.asked.clone(),
            documents: self.documents.clone(),
            file: tempfile::tempfile().unwrap(),
        };
        Ok(Outgoing::new(name.clone(), Box::new(session)))
    }
    fn retrieve_session(&self, name: &SessionName) -> Result<Incoming, luo::Error> {
        Err(luo::Error::RetrieveSession { session: name.clone(), errno: Errno::NOENT })
    }
    fn create_memory(&self, _: &str, _: u64) -> Result<OwnedFd, luo::Error> {
        // The program does not go along.
        Err(luo::Error::Switch { errno: Errno::NOMEM })
    }
    fn ticket(&self) -> Option<Ticket> {
        None
    }
    fn room(&self) -> Room {
        Room::default()
    }
    fn switch(&self, _: &mut dyn FnMut()) -> Result<(), luo::Error> {
        Err(luo::Error::Switch { errno: Errno::TIMEDOUT })
    }
}

/// The requests that have come and nobody has taken.
fn requests(vm: &Channel) -> Vec<Request> {
    vm.set_timeout(Some(Duration::from_millis(1))).unwrap();
    std::iter::from_fn(|| vm.receive::<Envelope>().ok())
        .map(|(Envelope { request, .. }, _)| request)
        .collect()
}

/// Answers up to the sync that follows the save, with a document of `bytes` bytes that is none.
fn play(vm: Channel, bytes: u64) -> Channel {
    let mut has_saved = false;
    loop {
        let (Envelope { request, .. }, _) = vm.receive().unwrap();
        let is_last = has_saved && request == Request::Sync;
        let reply = match request {
            Request::Confine { .. } => Reply::Confined { missing: Vec::new() },
            Request::Sync => Reply::Synced,
            Request::Pause => Reply::Paused { last_exit_ticks: 1 },
            Request::Save => {
                has_saved = true;
                Reply::Saved { bytes }
            }
            other => panic!("{other:?}"),
        };
        vm.send(&FromVm::Reply(reply), &[]).unwrap();
        if is_last || bytes > 0 && has_saved {
            return vm;
        }
    }
}

/// Leaves to systemd with a VM that saves a document of `bytes` bytes. Returns why that fails, and what the VM's process
/// was asked for until the manifest had gone, and after that.
fn leave(bytes: u64) -> (UpdateError, Vec<Request>, Vec<Request>) {
    leave_with(bytes, &Documents::default())
}

fn leave_with(bytes: u64, documents: &Documents) -> (UpdateError, Vec<Request>, Vec<Request>) {
    let confinement = Confinement::new(&HostSection::default());
    let (process, link) = VmProcess::idle(&confinement);
    let fd = link.into_fd();
    let (copy, link) = (Channel::from_fd(fd.try_clone().unwrap()), Channel::from_fd(fd));
    let player = Arc::new(Mutex::new(Some(thread::spawn(move || play(link, bytes)))));
    process.confined(process.reply().unwrap()).unwrap();
    let mut vm = Guest::new(sample().machine, &confinement);
    vm.life = Life::Live(Live::without_ram(process));
    let asked = Arc::default();
    let luo = Stays { player, asked: Arc::clone(&asked), documents: Arc::clone(documents) };
    let plan = Plan {
        destination: Destination::Service { lock: None, waits: true },
        stop_before: None,
        verify_frames: false,
        number: 1,
        without: Vec::new(),
        budget: Duration::from_secs(600),
        config: String::new(),
        pool: None,
        carried: &Carried::default(),
        keeps_programs: true,
        observer: &|_| {},
    };
    let Undone { error, kept } =
        run(&luo, std::slice::from_ref(&vm), &[], &plan).map_err(|undone| *undone).unwrap_err();
    assert!(kept.saved.is_empty(), "its process goes on");
    let before = lock(&asked).take().expect("the manifest has gone");
    (error, before, requests(&copy))
}

#[test]
fn after_a_failed_jump_the_manifest_goes_before_any_guest_runs_on() {
    let (error, before, after) = leave(0);
    assert!(error.to_string().contains("jump"), "{error}");
    assert_eq!(before, []);
    assert_eq!(after, [Request::Resume]);
}

#[test]
fn a_process_that_lies_about_its_document_is_named() {
    let (error, _, _) = leave(u64::MAX);
    assert_eq!(error.vm(), Some(&sample().machine.name), "{error}");
}

#[test]
fn what_a_later_host_could_read_of_a_stop_that_was_undone_says_so_before_any_guest_runs_on() {
    let documents = Documents::default();
    let (error, before, _) = leave_with(0, &documents);
    assert!(error.is_unanswered(), "{error}");
    assert_eq!(before, []);
    let said: Vec<_> = lock(&documents).iter().map(|(_, start)| start.clone()).collect();
    assert_eq!(said, [UNDONE; 2], "the index and the manifest");
}
