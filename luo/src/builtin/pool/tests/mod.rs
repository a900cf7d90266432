//! Tests of a pool through its public interface, on a filesystem without DAX: the contents of the
//! directory do not depend on DAX.

mod crash;
mod damage;
mod room;
mod start;

use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, SealFlags, memfd_create};
use tempfile::TempDir;

use super::fault::Fault;
use super::*;
use crate::{Token, memory};

const MIB: u64 = 1 << 20;

pub(super) fn options() -> Options {
    Options { reserve_bytes: 0, without_dax: true, ..Options::default() }
}

/// Makes an empty directory, on tmpfs if possible.
pub(super) fn directory() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

pub(super) fn start(directory: &TempDir) -> Pool {
    let pool = Pool::start(directory.path(), &options()).unwrap();
    assert_eq!(pool.disabled(), None);
    pool
}

/// Hands over, as before a successful kexec. The caller then drops the fds that a kexec would
/// close.
pub(super) fn leave(pool: Pool) {
    pool.hand_over(|| Ok::<_, Infallible>(())).unwrap();
}

pub(super) fn name(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

pub(super) fn memfd(contents: &str) -> File {
    // Of another program, which has not sealed its size.
    let memfd = memory::executable_memfd("test", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memfd.unwrap());
    file.write_all(contents.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

pub(super) fn contents(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).unwrap();
    text
}

/// Creates guest memory that starts with a word.
pub(super) fn guest(pool: &Pool, word: &str) -> File {
    let memory = File::from(pool.create_memory("guest", MIB).unwrap());
    memory.write_all_at(word.as_bytes(), 0).unwrap();
    memory
}

/// Reads the word that guest memory starts with.
pub(super) fn word(fd: &impl AsFd, length: usize) -> String {
    let mut bytes = vec![0; length];
    rustix::io::pread(fd, &mut bytes, 0).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Creates a session with guest memory under token 1 and a document under token 0.
pub(super) fn vm(pool: &Pool, session: &str) -> (Outgoing, File) {
    let memory = guest(pool, session);
    let outgoing = pool.create_session(&name(session)).unwrap();
    outgoing.preserve(memory.as_fd(), Token(1)).unwrap();
    let document = memfd(&format!("state of {session}"));
    outgoing.preserve(document.as_fd(), Token(0)).unwrap();
    (outgoing, memory)
}

/// Retrieves a session of [`vm`], checks its files, and finishes it. Returns the guest memory, or
/// `None` if there is no such session.
pub(super) fn take_vm(pool: &Pool, session: &str) -> Option<File> {
    let incoming = match pool.retrieve_session(&name(session)) {
        Err(error) if error.is_not_found() => return None,
        incoming => incoming.unwrap(),
    };
    let memory = File::from(incoming.retrieve(Token(1)).unwrap());
    assert_eq!(word(&memory, session.len()), session);
    assert_eq!(memory.metadata().unwrap().len(), MIB);
    assert_eq!(contents(incoming.retrieve(Token(0)).unwrap()), format!("state of {session}"));
    incoming.finish().unwrap();
    Some(memory)
}

/// The number of files in the pool.
pub(super) fn file_count(directory: &TempDir) -> usize {
    std::fs::read_dir(directory.path().join("files")).unwrap().count()
}

pub(super) fn is_preserved(pool: &Pool, file: &File) -> bool {
    let probe = pool.create_session(&name("probe")).unwrap();
    match probe.preserve(file.as_fd(), Token(0)) {
        Ok(()) => false,
        Err(error) => {
            assert_eq!(error.errno(), Some(Errno::BUSY), "{error}");
            true
        }
    }
}

#[test]
fn guest_memory_stays_in_place_and_documents_are_copied_at_the_switch() {
    let directory = directory();
    let pool = start(&directory);
    assert_eq!((pool.liveupdate_number(), pool.backend()), (0, Backend::Pool));
    let (session, memory) = vm(&pool, "web");
    let mut document = memfd("before");
    session.preserve(document.as_fd(), Token(2)).unwrap();
    document.write_all(b"after").unwrap();
    let inode = memory.metadata().unwrap().ino();
    memory.write_all_at(b"late", 4096).unwrap();
    leave(pool);
    drop((session, memory));

    let pool = start(&directory);
    assert_eq!(pool.liveupdate_number(), 1);
    let session = pool.retrieve_session(&name("web")).unwrap();
    let memory = File::from(session.retrieve(Token(1)).unwrap());
    assert_eq!(memory.metadata().unwrap().ino(), inode);
    let mut late = [0; 4];
    memory.read_exact_at(&mut late, 4096).unwrap();
    assert_eq!((word(&memory, 3).as_str(), &late), ("web", b"late"));
    let mut document = File::from(session.retrieve(Token(2)).unwrap());
    assert_eq!(document.stream_position().unwrap(), 5);
    document.rewind().unwrap();
    assert_eq!(contents(document.into()), "aftere");
    session.finish().unwrap();
}

#[test]
fn memory_survives_several_switches() {
    let directory = directory();
    let (session, memory) = vm(&start(&directory), "web");
    drop((session, memory));
    let pool = start(&directory);
    let (mut session, mut memory) = vm(&pool, "web");
    leave(pool);
    for number in 1..4 {
        drop((session, memory));
        let pool = start(&directory);
        assert_eq!(pool.liveupdate_number(), number);
        memory = take_vm(&pool, "web").unwrap();
        session = pool.create_session(&name("web")).unwrap();
        session.preserve(memory.as_fd(), Token(1)).unwrap();
        session.preserve(memfd("state of web").as_fd(), Token(0)).unwrap();
        leave(pool);
    }
}

#[test]
fn a_memfd_comes_back_with_its_seals() {
    let directory = directory();
    let pool = start(&directory);
    let session = pool.create_session(&name("web")).unwrap();
    let (all, none) = (SealFlags::SHRINK | SealFlags::GROW, SealFlags::empty());
    let open = MemfdFlags::ALLOW_SEALING;
    let cases = [
        (MemfdFlags::EXEC, none),
        (open | MemfdFlags::EXEC, none),
        (open | MemfdFlags::EXEC, all | SealFlags::SEAL),
        (open | MemfdFlags::EXEC, SealFlags::WRITE),
        (open | MemfdFlags::NOEXEC_SEAL, all),
    ];
    let mut expected = Vec::new();
    for (token, (flags, seals)) in (0..).zip(cases) {
        let Ok(fd) = memfd_create("sealed", MemfdFlags::CLOEXEC | flags) else {
            println!("skipped: this kernel does not know {flags:?}");
            continue;
        };
        rustix::io::write(&fd, b"data").unwrap();
        if !seals.is_empty() {
            rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        }
        session.preserve(fd.as_fd(), Token(token)).unwrap();
        let mode = rustix::fs::fstat(&fd).unwrap().st_mode;
        expected.push((token, rustix::fs::fcntl_get_seals(&fd).unwrap(), mode));
    }
    leave(pool);
    drop(session);
    let pool = start(&directory);
    let session = pool.retrieve_session(&name("web")).unwrap();
    for (token, seals, mode) in expected {
        let fd = session.retrieve(Token(token)).unwrap();
        assert_eq!(rustix::fs::fcntl_get_seals(&fd).unwrap(), seals);
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_mode, mode);
        assert_eq!((word(&fd, 4).as_str(), rustix::fs::tell(&fd).unwrap()), ("data", 4));
    }
}

#[test]
fn a_memfd_above_the_copy_limit_is_refused() {
    let directory = directory();
    let pool = start(&directory);
    let session = pool.create_session(&name("web")).unwrap();
    let file = memfd("");
    file.set_len(MOST_COPIED + 1).unwrap();
    let error = session.preserve(file.as_fd(), Token(0)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::TOOBIG));
    assert!(error.to_string().contains("create it in the pool"), "{error}");
    assert_eq!(file_count(&directory), 0);
    file.set_len(MOST_COPIED).unwrap();
    session.preserve(file.as_fd(), Token(0)).unwrap();
    leave(pool);
    drop(session);
    let session = start(&directory).retrieve_session(&name("web")).unwrap();
    let back = File::from(session.retrieve(Token(0)).unwrap());
    assert_eq!(back.metadata().unwrap().len(), MOST_COPIED);
}

#[test]
fn files_from_elsewhere_are_not_preserved() {
    let (directory, other) = (directory(), directory());
    let pool = start(&directory);
    let session = pool.create_session(&name("web")).unwrap();
    let foreign = File::create_new(other.path().join("file")).unwrap();
    let gone = guest(&pool, "gone");
    std::fs::read_dir(directory.path().join("files"))
        .unwrap()
        .for_each(|file| std::fs::remove_file(file.unwrap().path()).unwrap());
    let null = File::open("/dev/null").unwrap();
    for (what, file) in [("foreign", &foreign), ("null", &null)] {
        let error = session.preserve(file.as_fd(), Token(0)).unwrap_err();
        assert!(error.is_unsupported(), "{what}: {error}");
    }
    // On tmpfs, the removed file counts as a small memfd, and can be preserved.
    if let Err(error) = session.preserve(gone.as_fd(), Token(0)) {
        assert!(error.is_unsupported(), "{error}");
    }
}

#[test]
fn a_file_that_was_resized_cancels_the_switch() {
    let directory = directory();
    let pool = start(&directory);
    let (session, memory) = vm(&pool, "web");
    let document = memfd("document");
    session.preserve(document.as_fd(), Token(2)).unwrap();
    for (file, length) in [(&memory, MIB), (&document, 8)] {
        file.set_len(length - 1).unwrap();
        let refused = Orchestrator::switch(&pool, &mut || panic!("the switch was not cancelled"));
        assert_eq!(refused, Err(Error::Switch { errno: Errno::INVAL }));
        assert!(is_preserved(&pool, file));
        file.set_len(length).unwrap();
    }
    leave(pool);
    drop((session, memory));
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn a_jump_that_returns_changes_nothing() {
    let directory = directory();
    let pool = start(&directory);
    let (session, memory) = vm(&pool, "web");
    let handover = directory.path().join("handover");
    let mut jumps = 0;
    Orchestrator::switch(&pool, &mut || {
        assert!(handover.exists(), "the next kernel would find it");
        jumps += 1;
    })
    .unwrap();
    assert_eq!((jumps, handover.exists()), (1, false));
    assert!(is_preserved(&pool, &memory));
    session.preserve(memfd("more").as_fd(), Token(7)).unwrap();
    drop(session);
    assert!(!is_preserved(&pool, &memory));
    let error = pool.hand_over(|| Err::<(), _>("no kernel"));
    assert!(matches!(error, Err(HandOverError::NotTaken("no kernel"))));
}

#[test]
fn calls_after_a_handover_fail_with_eshutdown() {
    let directory = directory();
    let pool = start(&directory);
    let (session, memory) = vm(&pool, "web");
    pool.hand_over(|| Ok::<_, Infallible>(())).unwrap();
    let refused = [
        pool.create_session(&name("new")).unwrap_err(),
        session.preserve(memory.as_fd(), Token(9)).unwrap_err(),
        Orchestrator::switch(&pool, &mut || ()).unwrap_err(),
    ];
    assert_eq!(refused.map(|error| error.errno()), [Some(Errno::SHUTDOWN); 3]);
    drop((session, memory, pool));
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn a_restarted_host_gets_only_the_sessions_that_were_not_retrieved() {
    let directory = directory();
    let pool = start(&directory);
    let vms = ["a", "b", "c"].map(|session| vm(&pool, session));
    leave(pool);
    drop(vms);
    let pool = start(&directory);
    let b = pool.retrieve_session(&name("b")).unwrap();
    // The guest runs (a write to its memory), then the host crashes.
    let memory = File::from(b.retrieve(Token(1)).unwrap());
    memory.write_all_at(b"x", 0).unwrap();
    drop((b, memory, pool));
    let pool = start(&directory);
    assert_eq!(pool.liveupdate_number(), 1);
    assert!(take_vm(&pool, "b").is_none());
    take_vm(&pool, "c").unwrap();
    drop(pool);
    let pool = start(&directory);
    assert!(take_vm(&pool, "b").is_none() && take_vm(&pool, "c").is_none());
    take_vm(&pool, "a").unwrap();
    drop(pool);
    let pool = start(&directory);
    assert_eq!((pool.liveupdate_number(), file_count(&directory)), (1, 0));
}

#[test]
fn incoming_sessions_do_not_survive_the_next_switch() {
    let directory = directory();
    let pool = start(&directory);
    let vms = ["a", "b"].map(|session| vm(&pool, session));
    leave(pool);
    drop(vms);
    let pool = start(&directory);
    let a = pool.retrieve_session(&name("a")).unwrap();
    let memory = a.retrieve(Token(1)).unwrap();
    let (c, other) = vm(&pool, "c");
    leave(pool);
    drop((a, memory, c, other));
    let pool = start(&directory);
    assert_eq!(pool.liveupdate_number(), 2);
    assert!(take_vm(&pool, "a").is_none() && take_vm(&pool, "b").is_none());
    assert_eq!(file_count(&directory), 2, "only the files of c");
    take_vm(&pool, "c").unwrap();
}

#[test]
fn memory_without_fd_or_session_is_removed() {
    let directory = directory();
    let pool = start(&directory);
    let memory = guest(&pool, "web");
    let copy = memory.try_clone().unwrap();
    drop(memory);
    pool.collect();
    assert_eq!(file_count(&directory), 1);
    let session = pool.create_session(&name("web")).unwrap();
    session.preserve(copy.as_fd(), Token(1)).unwrap();
    drop(copy);
    pool.collect();
    assert_eq!(file_count(&directory), 1, "a session has it");
    drop(session);
    pool.collect();
    assert_eq!(file_count(&directory), 0);
}

#[test]
fn memory_of_finished_and_closed_sessions_is_removed() {
    let directory = directory();
    let pool = start(&directory);
    let vms = ["never", "one", "all", "closed"].map(|session| vm(&pool, session));
    leave(pool);
    drop(vms);
    let pool = start(&directory);
    assert_eq!(file_count(&directory), 8, "unfinished sessions own them");
    let memory = take_vm(&pool, "all").unwrap();
    pool.collect();
    assert_eq!(file_count(&directory), 7, "its document is gone");
    let one = pool.retrieve_session(&name("one")).unwrap();
    one.finish().unwrap();
    assert_eq!(file_count(&directory), 5, "files that were not retrieved are removed");
    drop(pool.retrieve_session(&name("closed")).unwrap());
    pool.collect();
    assert_eq!(file_count(&directory), 3);
    drop(memory);
    pool.collect();
    assert_eq!(file_count(&directory), 2, "a session that was not retrieved stays");
    take_vm(&pool, "never").unwrap();
}

#[test]
fn memory_with_an_open_fd_survives_a_host_restart() {
    let directory = directory();
    let pool = start(&directory);
    let memory = guest(&pool, "web");
    drop(pool);
    let pool = start(&directory);
    assert_eq!(file_count(&directory), 1);
    let session = pool.create_session(&name("web")).unwrap();
    session.preserve(memory.as_fd(), Token(1)).unwrap();
    session.preserve(memfd("state of web").as_fd(), Token(0)).unwrap();
    leave(pool);
    drop((session, memory));
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn a_session_can_be_adopted() {
    let directory = directory();
    let pool = start(&directory);
    let (session, memory) = vm(&pool, "web");
    let copy = session.as_fd().try_clone_to_owned().unwrap();
    drop(session);
    let Ok(Session::Outgoing(session)) = pool.adopt(copy) else {
        panic!("expected an outgoing session")
    };
    assert!(is_preserved(&pool, &memory));
    drop(session);
    assert!(!is_preserved(&pool, &memory));
}

#[test]
fn a_file_position_survives_the_switch() {
    let directory = directory();
    let pool = start(&directory);
    let (session, mut memory) = vm(&pool, "web");
    memory.seek(SeekFrom::Start(77)).unwrap();
    leave(pool);
    drop((session, memory));
    let session = start(&directory).retrieve_session(&name("web")).unwrap();
    let mut memory = File::from(session.retrieve(Token(1)).unwrap());
    assert_eq!(memory.stream_position().unwrap(), 77);
}
