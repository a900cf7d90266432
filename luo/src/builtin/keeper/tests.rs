//! Tests of the keeper through its public interface.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use super::*;
use crate::Token;

fn name(text: &str) -> SessionName {
    SessionName::new(text).unwrap()
}

fn memfd(contents: &str) -> File {
    // Of another program, which has not sealed its size.
    let memfd = memory::executable_memfd("test", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memfd.unwrap());
    file.write_all(contents.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

fn contents(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).unwrap();
    text
}

/// Creates the session `web` and preserves `files` in it, under tokens from 0 on.
fn session(keeper: &Keeper, files: &[&File]) -> Outgoing {
    let session = keeper.create_session(&name("web")).unwrap();
    for (token, file) in (0..).zip(files) {
        session.preserve(file.as_fd(), Token(token)).unwrap();
    }
    session
}

fn handover(files: &[&File]) -> Handover {
    let keeper = Keeper::start();
    let _session = session(&keeper, files);
    keeper.switch().unwrap()
}

/// Whether the file is preserved in some session.
fn is_preserved(keeper: &Keeper, file: &File) -> bool {
    let probe = keeper.create_session(&name("probe")).unwrap();
    match probe.preserve(file.as_fd(), Token(0)) {
        Ok(()) => false,
        Err(error) => {
            assert_eq!(error.errno(), Some(Errno::BUSY), "{error}");
            true
        }
    }
}

#[test]
fn files_are_handed_over_as_the_same_open_files() {
    let mut file = memfd("memory");
    file.seek(SeekFrom::Start(2)).unwrap();
    let mut disk = tempfile::tempfile().unwrap();
    disk.write_all(b"disk").unwrap();
    disk.rewind().unwrap();
    let keeper = Keeper::arrive(handover(&[&file, &disk])).unwrap();
    assert_eq!((keeper.liveupdate_number(), keeper.backend()), (1, Backend::Keeper));
    let web = keeper.retrieve_session(&name("web")).unwrap();
    let again = web.retrieve(Token(0)).unwrap();
    assert_eq!(contents(web.retrieve(Token(0)).unwrap()), "mory");
    assert_eq!(contents(again), "", "both fds share the position");
    assert_eq!(contents(web.retrieve(Token(1)).unwrap()), "disk");
    assert!(web.retrieve(Token(2)).unwrap_err().is_not_found());
    web.finish().unwrap();
    assert!(keeper.retrieve_session(&name("web")).unwrap_err().is_not_found());
    assert!(!is_preserved(&keeper, &file));
}

#[test]
fn a_session_ends_with_the_last_copy_of_its_fd() {
    let (keeper, file) = (Keeper::start(), memfd("memory"));
    let web = session(&keeper, &[&file]);
    let copy = web.as_fd().try_clone_to_owned().unwrap();
    drop(web);
    assert!(is_preserved(&keeper, &file));
    let Ok(Session::Outgoing(web)) = keeper.adopt(copy) else {
        panic!("expected an outgoing session")
    };
    assert_eq!(web.name(), &name("web"));
    let error = web.preserve(file.as_fd(), Token(0)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EXIST), "{error}");
    drop(web);
    assert!(!is_preserved(&keeper, &file));
    drop(keeper.create_session(&name("web")).unwrap());
}

#[test]
fn an_incoming_session_can_be_adopted_too() {
    let keeper = Keeper::arrive(handover(&[&memfd("memory")])).unwrap();
    let web = keeper.retrieve_session(&name("web")).unwrap();
    let copy = web.as_fd().try_clone_to_owned().unwrap();
    drop(web);
    let error = keeper.retrieve_session(&name("web")).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::INVAL), "{error}");
    let Ok(Session::Incoming(web)) = keeper.adopt(copy) else {
        panic!("expected an incoming session")
    };
    assert_eq!(contents(web.retrieve(Token(0)).unwrap()), "memory");
}

#[test]
fn an_fd_that_is_no_session_is_handed_back() {
    let (keeper, other) = (Keeper::start(), Keeper::start());
    let foreign = other.create_session(&name("web")).unwrap();
    for fd in [memfd("x").into(), foreign.as_fd().try_clone_to_owned().unwrap()] {
        let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
        let refused = keeper.adopt(fd).unwrap_err();
        assert_eq!(refused.error, Error::Adopt { fd: number, errno: Errno::NOTTY });
        assert_eq!(std::os::fd::AsRawFd::as_raw_fd(&refused.fd), number);
    }
}

#[test]
fn a_memfd_that_was_resized_cancels_the_switch() {
    let (keeper, file, other) = (Keeper::start(), memfd("memory"), memfd("other"));
    let web = session(&keeper, &[&other, &file]);
    file.set_len(3).unwrap();
    let SwitchError { keeper, error } = keeper.switch().unwrap_err();
    assert_eq!(error, Error::Switch { errno: Errno::INVAL });
    assert!(is_preserved(&keeper, &file) && is_preserved(&keeper, &other));
    file.set_len(6).unwrap();
    let handover = keeper.switch().unwrap();
    assert_eq!(handover.fds.len(), 2, "no fd is left of the first attempt");
    drop(web);
    let web = Keeper::arrive(handover).unwrap().retrieve_session(&name("web")).unwrap();
    assert_eq!(contents(web.retrieve(Token(1)).unwrap()), "mem\0\0\0");
}

#[test]
fn a_successor_that_fails_to_take_over_changes_nothing() {
    let (keeper, file) = (Keeper::start(), memfd("memory"));
    let web = session(&keeper, &[&file]);
    let error = keeper.hand_over(|handover| {
        assert_eq!(handover.fds.len(), 1);
        Err::<(), _>(Errno::PIPE)
    });
    assert!(matches!(error, Err(HandOverError::NotTaken(Errno::PIPE))));
    assert!(is_preserved(&keeper, &file));
    web.preserve(memfd("more").as_fd(), Token(9)).unwrap();
    assert_eq!(keeper.switch().unwrap().fds.len(), 2);
}

#[test]
fn calls_after_a_handover_fail_with_eshutdown() {
    let (keeper, file) = (Keeper::start(), memfd("memory"));
    let web = session(&keeper, &[&file]);
    let handover = keeper.clone().switch().unwrap();
    for errno in [
        keeper.create_session(&name("new")).unwrap_err().errno(),
        web.preserve(file.as_fd(), Token(7)).unwrap_err().errno(),
        keeper.clone().switch().unwrap_err().error.errno(),
    ] {
        assert_eq!(errno, Some(Errno::SHUTDOWN));
    }
    drop(web);
    let web = Keeper::arrive(handover).unwrap().retrieve_session(&name("web")).unwrap();
    assert_eq!(contents(web.retrieve(Token(0)).unwrap()), "memory");
}

#[test]
fn fds_that_were_mixed_up_cannot_be_retrieved() {
    let mut handover = handover(&[&memfd("one"), &memfd("two")]);
    handover.fds.reverse();
    let keeper = Keeper::arrive(handover).unwrap();
    let web = keeper.retrieve_session(&name("web")).unwrap();
    for token in [0, 1, 0] {
        let error = web.retrieve(Token(token)).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::STALE));
        assert!(error.is_final(), "{error}");
    }
    web.finish().unwrap();
}

#[test]
fn fds_that_are_missing_or_too_many_are_handed_back() {
    let mut handover = handover(&[&memfd("one"), &memfd("two")]);
    let extra = memfd("three").into();
    handover.fds.push(extra);
    let refused = Keeper::arrive(handover).unwrap_err();
    assert_eq!(refused.problem, Problem::Fds { expected: 2, found: 3 });
    let mut handover = refused.handover;
    let extra = handover.fds.pop();
    let last = handover.fds.pop().unwrap();
    let refused = Keeper::arrive(handover).unwrap_err();
    assert_eq!(refused.problem, Problem::Fds { expected: 2, found: 1 });
    let mut handover = refused.handover;
    handover.fds.push(last);
    drop(extra);
    let keeper = Keeper::arrive(handover).unwrap();
    let web = keeper.retrieve_session(&name("web")).unwrap();
    assert_eq!(contents(web.retrieve(Token(1)).unwrap()), "two");
}

#[test]
fn every_cut_and_every_flipped_byte_of_the_tree_is_refused_with_nothing_lost() {
    let mut handover = handover(&[&memfd("memory")]);
    let good = handover.tree.clone();
    let cuts = (0..good.len()).map(|end| good[..end].to_vec());
    let flips = (0..good.len()).map(|at| {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        bad
    });
    for bad in cuts.chain(flips) {
        handover.tree = bad;
        let refused = Keeper::arrive(handover).unwrap_err();
        assert!(matches!(refused.problem, Problem::Tree(_)), "{}", refused.problem);
        assert_eq!(refused.handover.fds.len(), 1);
        handover = refused.handover;
    }
    handover.tree = good;
    drop(Keeper::arrive(handover).unwrap());
}

#[test]
fn a_keeper_refuses_a_kexec() {
    let keeper = Keeper::start();
    let refused = Orchestrator::switch(&keeper, &mut || panic!("a kexec would lose all sessions"));
    assert_eq!(refused, Err(Error::Switch { errno: Errno::OPNOTSUPP }));
}

#[test]
fn memory_of_a_keeper_can_be_preserved() {
    let keeper = Keeper::start();
    let file = File::from(keeper.create_memory("vm", 1 << 20).unwrap());
    let web = session(&keeper, &[&file]);
    assert!(is_preserved(&keeper, &file));
    drop(web);
}

#[test]
fn a_file_of_an_unknown_format_makes_all_sessions_unreadable() {
    let foreign = crate::builtin::tree::Handover {
        number: 1,
        sessions: vec![tree::SessionRecord {
            name: (&name("web")).into(),
            files: vec![tree::FileRecord {
                compatible: Compatible::new("other-v1").unwrap(),
                data: 0,
                token: Token(0),
            }],
        }],
        flbs: Vec::new(),
    };
    let tree = v1::encode(&foreign).unwrap();
    let keeper = Keeper::arrive(Handover { tree, fds: Vec::new() }).unwrap();
    for error in [
        keeper.retrieve_session(&name("web")).unwrap_err(),
        keeper.create_session(&name("new")).unwrap_err(),
    ] {
        assert_eq!(error, Error::Unreadable { errno: Errno::NOENT });
        assert!(error.is_final() && !error.is_not_found());
    }
}

#[test]
fn sessions_and_the_keeper_cross_threads() {
    let keeper = Keeper::start();
    std::thread::scope(|scope| {
        let make = |index: usize| keeper.create_session(&name(&format!("web-{}", index % 4)));
        let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || make(index))).collect();
        let made: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 4);
        let taken = made.iter().filter_map(|made| made.as_ref().err());
        assert!(taken.into_iter().all(|error| error.errno() == Some(Errno::EXIST)));
    });
}
