//! The store, tested with a service manager that handles the messages as systemd 262 does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use perennial_doubles::fd_store::{Kept, NotifySocket};

use super::*;

/// A service manager with one service, whose store holds at most `max` fds.
struct Manager {
    directory: tempfile::TempDir,
    thread: Option<JoinHandle<Kept>>,
}

impl Manager {
    fn start(max: usize, mut kept: Kept) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = NotifySocket::bind(&directory.path().join("notify"));
        let thread = std::thread::spawn(move || {
            while let Some(message) = socket.receive() {
                message.obey(&mut kept, max);
            }
            kept
        });
        Self { directory, thread: Some(thread) }
    }

    fn notify(&self) -> Notify {
        Notify::to(self.directory.path().join("notify").as_os_str()).unwrap()
    }

    /// Stops the manager. Returns the fds that it would pass to the service at its next start.
    fn stop(mut self) -> Kept {
        self.notify().send("").unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

fn store(manager: &Manager, max: usize, fds: Kept) -> FdStore {
    FdStore::new(manager.notify(), max, || None, fds).unwrap()
}

fn name(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

fn memfd(contents: &str) -> File {
    let file = File::from(memory::memfd("test", contents.len() as u64).unwrap());
    file.write_all_at(contents.as_bytes(), 0).unwrap();
    file
}

fn contents(fd: OwnedFd) -> String {
    let file = File::from(fd);
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn copy(fds: &[(String, OwnedFd)]) -> Kept {
    fds.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect()
}

fn names(fds: &[(String, OwnedFd)]) -> Vec<&str> {
    fds.iter().map(|(name, _)| name.as_str()).collect()
}

/// Preserves sessions with one file each under token 0. Returns the fds that the next process gets.
fn left_behind(sessions: &[(&str, &str)]) -> Kept {
    let manager = Manager::start(8, Vec::new());
    let store = store(&manager, 8, Vec::new());
    for (session, text) in sessions {
        let session = store.create_session(&name(session)).unwrap();
        session.preserve(memfd(text).as_fd(), Token(0)).unwrap();
        std::mem::forget(session);
    }
    manager.stop()
}

#[test]
fn preserved_files_come_back_under_their_session_and_token() {
    let manager = Manager::start(8, Vec::new());
    let first = store(&manager, 8, Vec::new());
    let session = first.create_session(&name("vm:web")).unwrap();
    session.preserve(memfd("state").as_fd(), Token(0)).unwrap();
    session.preserve(memfd("ram").as_fd(), Token(u64::MAX)).unwrap();
    let mut jumps = 0;
    std::thread::spawn(first.probe().unwrap()).join().unwrap().unwrap();
    first.switch(&mut || jumps += 1).unwrap();
    assert_eq!(jumps, 1);
    std::mem::forget(session);
    let kept = manager.stop();

    let manager = Manager::start(8, copy(&kept));
    let second = store(&manager, 8, kept);
    assert_eq!(second.waiting(), [name("vm:web")]);
    let session = second.retrieve_session(&name("vm:web")).unwrap();
    assert_eq!(contents(session.retrieve(Token(0)).unwrap()), "state");
    assert_eq!(contents(session.retrieve(Token(u64::MAX)).unwrap()), "ram");
    assert_eq!(contents(session.retrieve(Token(0)).unwrap()), "state", "again");
    assert!(session.retrieve(Token(1)).unwrap_err().is_not_found());
    session.finish().unwrap();
    assert_eq!(names(&manager.stop()), [""; 0], "a finished session leaves no fd in the store");
}

#[test]
fn dropping_an_outgoing_session_removes_its_files_and_frees_its_name() {
    let manager = Manager::start(8, Vec::new());
    let store = store(&manager, 8, Vec::new());
    let session = store.create_session(&name("web")).unwrap();
    session.preserve(memfd("ram").as_fd(), Token(1)).unwrap();
    let error = store.create_session(&name("web")).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EXIST));
    drop(session);
    let _again = store.create_session(&name("web")).unwrap();
    assert_eq!(names(&manager.stop()), [""; 0]);
}

#[test]
fn an_incoming_session_is_retrieved_once_and_lost_when_it_is_dropped() {
    let kept = left_behind(&[("web", "w"), ("db", "d")]);
    let manager = Manager::start(8, copy(&kept));
    let store = store(&manager, 8, kept);
    let session = store.retrieve_session(&name("web")).unwrap();
    let errno = || store.retrieve_session(&name("web")).unwrap_err().errno();
    assert_eq!(errno(), Some(Errno::INVAL));
    drop(session);
    assert_eq!(errno(), Some(Errno::NOENT));
    assert_eq!(
        names(&manager.stop()),
        ["db/0"],
        "a session that was not retrieved stays in the store"
    );
}

#[test]
fn a_file_in_the_store_is_refused_until_its_session_is_finished() {
    let kept = left_behind(&[("web", "w")]);
    let manager = Manager::start(8, copy(&kept));
    let store = store(&manager, 8, kept);
    let incoming = store.retrieve_session(&name("web")).unwrap();
    let file = incoming.retrieve(Token(0)).unwrap();
    let outgoing = store.create_session(&name("next")).unwrap();
    let error = outgoing.preserve(file.as_fd(), Token(0)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::BUSY));
    incoming.finish().unwrap();
    outgoing.preserve(file.as_fd(), Token(0)).unwrap();
    let error = outgoing.preserve(file.as_fd(), Token(1)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::BUSY), "under another token, too");
    assert_eq!(names(&manager.stop()), ["next/0"]);
}

#[test]
fn a_file_replaces_an_incoming_one_of_its_name_and_stays_when_that_session_is_finished() {
    let kept = left_behind(&[("host", "old")]);
    let manager = Manager::start(1, copy(&kept));
    let store = store(&manager, 1, kept);
    let old = store.retrieve_session(&name("host")).unwrap();
    let new = store.create_session(&name("host")).unwrap();
    new.preserve(memfd("new").as_fd(), Token(0)).unwrap();
    old.finish().unwrap();
    store.switch(&mut || ()).unwrap();
    let mut kept = manager.stop();
    assert_eq!(names(&kept), ["host/0"]);
    assert_eq!(contents(kept.remove(0).1), "new");
}

#[test]
fn what_a_session_that_was_dropped_had_replaced_is_put_back() {
    let kept = left_behind(&[("host", "old")]);
    let manager = Manager::start(1, copy(&kept));
    let store = store(&manager, 1, kept);
    let old = store.retrieve_session(&name("host")).unwrap();
    old.put_back().unwrap();
    let new = store.create_session(&name("host")).unwrap();
    new.preserve(memfd("new").as_fd(), Token(0)).unwrap();
    drop(new);
    for _ in 0..2 {
        old.put_back().unwrap();
    }
    std::mem::forget(old);
    let mut kept = manager.stop();
    assert_eq!(names(&kept), ["host/0"]);
    assert_eq!(contents(kept.remove(0).1), "old");
}

#[test]
fn files_beyond_the_capacity_are_refused_before_systemd_would_drop_them() {
    let kept = left_behind(&[("web", "w")]);
    let manager = Manager::start(2, copy(&kept));
    let store = store(&manager, 2, kept);
    let session = store.create_session(&name("db")).unwrap();
    session.preserve(memfd("1").as_fd(), Token(1)).unwrap();
    let error = session.preserve(memfd("2").as_fd(), Token(2)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC));
    assert!(error.to_string().contains("FileDescriptorStoreMax="), "{error}");
    assert_eq!(names(&manager.stop()), ["web/0", "db/1"]);
}

#[test]
fn a_file_that_is_not_a_memfd_is_not_stored() {
    let manager = Manager::start(8, Vec::new());
    let store = store(&manager, 8, Vec::new());
    let session = store.create_session(&name("web")).unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    let error = session.preserve(file.as_fd(), Token(1)).unwrap_err();
    assert!(error.is_unsupported(), "{error}");
    assert_eq!(names(&manager.stop()), [""; 0]);
}

#[test]
fn two_files_of_one_name_cannot_be_retrieved() {
    let fds = ["a", "b"].map(|text| ("web/0".to_owned(), OwnedFd::from(memfd(text))));
    let manager = Manager::start(8, Vec::new());
    let store = store(&manager, 8, fds.into());
    let session = store.retrieve_session(&name("web")).unwrap();
    let error = session.retrieve(Token(0)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOTUNIQ), "{error}");
    assert!(error.to_string().contains("systemd-analyze fdstore"), "{error}");
}

#[test]
fn fds_without_the_name_of_a_session_stay_in_the_store() {
    let names_ = ["stored", "", "web/", "/0", "web/+1", "web/01", "web/18446744073709551616"];
    let fds = names_.map(|name| (name.to_owned(), OwnedFd::from(memfd("x"))));
    let manager = Manager::start(8, copy(&fds));
    let store = store(&manager, 8, fds.into());
    assert_eq!(store.waiting(), []);
    assert_eq!(store.strangers(), names_);
    drop(store);
    assert_eq!(names(&manager.stop()), names_);
}

#[test]
fn a_stopped_manager_is_an_error_without_a_wait() {
    let manager = Manager::start(8, Vec::new());
    let store = store(&manager, 8, Vec::new());
    let session = store.create_session(&name("web")).unwrap();
    drop(manager.stop());
    let error = session.preserve(memfd("ram").as_fd(), Token(1)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::CONNREFUSED), "{error}");
    let mut jumps = 0;
    let error = store.switch(&mut || jumps += 1).unwrap_err();
    assert_eq!(error, Error::Switch { errno: Errno::CONNREFUSED });
    assert_eq!(jumps, 0);
    assert!(store.probe().unwrap()().unwrap_err().is_unanswered());
}

#[test]
fn waiting_for_a_silent_manager_ends_after_the_given_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let _deaf = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let notify = Notify::to(path.as_os_str()).unwrap();
    assert_eq!(notify.barrier(Duration::from_millis(10)), Err(Errno::TIMEDOUT));
}

#[test]
fn no_other_file_takes_the_room_that_is_reserved() {
    let manager = Manager::start(3, Vec::new());
    let store = store(&manager, 3, Vec::new());
    let host = store.create_session(&name("host")).unwrap();
    host.reserve(Token(0)).unwrap();
    host.reserve(Token(0)).unwrap();
    let vm = store.create_session(&name("vm")).unwrap();
    vm.reserve(Token(0)).unwrap();
    assert_eq!(store.room().files, Some(1));
    vm.preserve(memfd("ram").as_fd(), Token(1)).unwrap();
    let full = |result: Result<(), Error>| result.unwrap_err().errno() == Some(Errno::NOSPC);
    assert!(full(vm.preserve(memfd("more").as_fd(), Token(2))) && full(host.reserve(Token(1))));
    vm.preserve(memfd("state").as_fd(), Token(0)).unwrap();
    host.preserve(memfd("manifest").as_fd(), Token(0)).unwrap();
    assert_eq!(store.room().files, Some(0));
    drop(vm);
    let other = store.create_session(&name("other")).unwrap();
    other.reserve(Token(0)).unwrap();
    other.reserve(Token(1)).unwrap();
    drop(other);
    assert_eq!(store.room().files, Some(2), "the room of a session that is dropped is free again");
    assert_eq!(names(&manager.stop()), ["host/0"]);
}

#[test]
fn what_systemd_says_of_its_store_counts() {
    let manager = Manager::start(8, Vec::new());
    let start = |ask| FdStore::new(manager.notify(), 8, ask, Vec::new()).unwrap();
    let smaller = start(|| Some(Count { files: 0, most: 2 }));
    assert_eq!(smaller.room().files, Some(8));
    smaller.confirm().unwrap();
    assert_eq!(smaller.room().files, Some(2), "an operator has made it smaller since");
    let shared = start(|| Some(Count { files: 5, most: 8 }));
    shared.confirm().unwrap();
    assert_eq!(shared.room().files, Some(3), "another process has five files there");
}

#[test]
fn files_that_systemd_has_dropped_are_noticed_before_the_jump() {
    let manager = Manager::start(8, Vec::new());
    let store = FdStore::new(manager.notify(), 8, || Some(Count { files: 0, most: 8 }), Vec::new())
        .unwrap();
    store.confirm().unwrap();
    let session = store.create_session(&name("web")).unwrap();
    session.preserve(memfd("ram").as_fd(), Token(1)).unwrap();
    let lost = Err(Error::Switch { errno: Errno::XFULL });
    assert_eq!(store.confirm(), lost);
    let mut jumps = 0;
    assert_eq!((store.switch(&mut || jumps += 1), jumps), (lost, 0));
    drop(session);
    store.confirm().unwrap();
}

#[test]
fn a_manager_that_does_not_read_is_an_error_and_holds_nobody_up_a_second_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let deaf = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let notify = Notify::to(path.as_os_str()).unwrap().waiting(Duration::from_millis(10));
    let sent = std::iter::from_fn(|| notify.send("READY=1").ok()).count();
    assert!(sent > 0);
    assert_eq!(notify.send("READY=1"), Err(Errno::TIMEDOUT));
    deaf.recv(&mut [0; 64]).unwrap();
    notify.send("READY=1").unwrap();
}

#[test]
fn a_hint_waits_for_no_room_and_the_next_message_still_does() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let deaf = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    // Whatever waits for room would wait this long.
    let notify = Notify::to(path.as_os_str()).unwrap().waiting(Duration::from_secs(1000));
    let sent = std::iter::from_fn(|| notify.hint("STATUS=full").ok()).count();
    assert!(sent > 0);
    assert_eq!(notify.hint("STATUS=full"), Err(Errno::TIMEDOUT));
    let reads = std::thread::spawn(move || {
        deaf.recv(&mut [0; 64]).unwrap();
        deaf
    });
    notify.send("READY=1").unwrap();
    drop(reads.join().unwrap());
}
