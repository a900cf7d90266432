//! Crashes before each change on disk, and failures of each change.

use super::*;

/// Creates the sessions of two VMs, `a` and `b`.
fn two_vms(pool: &Pool) -> [(Outgoing, File); 2] {
    ["a", "b"].map(|session| vm(pool, session))
}

/// Retrieves the VMs that the pool has, checks them, and returns their names.
fn found(pool: &Pool) -> Vec<&'static str> {
    let found = |session: &&str| take_vm(pool, session).is_some();
    ["a", "b", "c"].into_iter().filter(found).collect()
}

/// Calls `act` with 0, 1, 2, ..: the number of the change that is to fail. Ends when `act` returns
/// `false`: it made fewer changes.
fn at_each_change(mut act: impl FnMut(usize) -> bool) {
    let mut number = 0;
    while act(number) {
        number += 1;
    }
    assert!(number > 1, "the operation makes changes");
}

/// A pool that a host has left two VMs in.
fn left_two_vms() -> TempDir {
    let directory = directory();
    let pool = start(&directory);
    let vms = two_vms(&pool);
    leave(pool);
    drop(vms);
    directory
}

#[test]
fn a_crash_in_the_switch_leaves_this_generation_or_the_next() {
    let mut left = Vec::new();
    at_each_change(|number| {
        let directory = directory();
        let pool = start(&directory);
        let vms = two_vms(&pool);
        let (_, reached) = Fault::From(number).during(|| {
            let handed = pool.hand_over(|| Ok::<_, Infallible>(()));
            drop((vms, pool));
            handed.is_ok()
        });
        let pool = start(&directory);
        let found = found(&pool);
        assert!(found.is_empty() || found == ["a", "b"], "{found:?}");
        assert_eq!(pool.liveupdate_number(), u64::from(!found.is_empty()));
        left.push(!found.is_empty());
        pool.collect();
        assert_eq!(file_count(&directory), 0, "no file is left over");
        reached
    });
    assert!(left.is_sorted() && left.contains(&false) && left.contains(&true), "{left:?}");
}

#[test]
fn a_crash_in_the_second_switch_never_brings_the_first_back() {
    at_each_change(|number| {
        let directory = left_two_vms();
        let pool = start(&directory);
        let a = take_vm(&pool, "a").unwrap();
        // The guest of `a` runs (a write to its memory); `b` is not retrieved.
        a.write_all_at(b"x", 0).unwrap();
        let c = vm(&pool, "c");
        let (handed, reached) = Fault::From(number).during(|| {
            let handed = pool.hand_over(|| Ok::<_, Infallible>(()));
            drop((a, c, pool));
            handed.is_ok()
        });
        let pool = start(&directory);
        let number = pool.liveupdate_number();
        let found = found(&pool);
        match number {
            1 => assert_eq!(found, ["b"]),
            2 => assert_eq!(found, ["c"]),
            _ => panic!("{number}"),
        }
        assert!(!handed || number == 2);
        reached
    });
}

#[test]
fn a_crash_at_the_start_loses_nothing() {
    at_each_change(|number| {
        let directory = directory();
        let pool = start(&directory);
        let vms = two_vms(&pool);
        let leftover = guest(&pool, "leftover");
        leave(pool);
        drop((vms, leftover));
        let start_again = || drop(Pool::start(directory.path(), &options()));
        let ((), reached) = Fault::From(number).during(start_again);
        let pool = start(&directory);
        assert_eq!(found(&pool), ["a", "b"]);
        reached
    });
}

#[test]
fn a_crash_while_a_vm_is_retrieved_gives_it_out_once_or_not_at_all() {
    at_each_change(|number| {
        let directory = left_two_vms();
        let pool = start(&directory);
        let (had_memory, reached) = Fault::From(number).during(|| {
            let had_memory = pool.retrieve_session(&name("a")).is_ok_and(|session| {
                let memory = session.retrieve(Token(1));
                let state = session.retrieve(Token(0));
                drop(session);
                memory.is_ok() && state.is_ok()
            });
            drop(pool);
            had_memory
        });
        let pool = start(&directory);
        let found = found(&pool);
        assert!(found.contains(&"b"), "`b` was not retrieved");
        assert!(!(had_memory && found.contains(&"a")), "the guest of `a` may have run");
        reached
    });
}

#[test]
fn a_session_that_is_taken_when_it_is_finished_comes_again_until_then_and_never_after() {
    let again = Options { taken_when_finished: true, ..options() };
    let mut fates = Vec::new();
    at_each_change(|number| {
        let directory = left_two_vms();
        let begin = || Pool::start(directory.path(), &again).unwrap();
        // One that is killed with the memory in its hands changes nothing.
        let pool = begin();
        let ((), _) = Fault::From(0).during(|| {
            let session = pool.retrieve_session(&name("a")).unwrap();
            assert_eq!(word(&session.retrieve(Token(1)).unwrap(), 1), "a");
            drop((session, pool));
        });
        let pool = begin();
        let (finished, reached) = Fault::From(number).during(|| {
            let session = pool.retrieve_session(&name("a")).unwrap();
            let memory = session.retrieve(Token(1)).unwrap();
            let finished = session.finish().is_ok();
            drop((memory, pool));
            finished
        });
        let pool = begin();
        let found = found(&pool);
        assert!(found.contains(&"b"), "`b` was not retrieved");
        assert!(!(finished && found.contains(&"a")), "the guest of `a` may have run");
        fates.push(found.contains(&"a"));
        drop(pool);
        drop(begin());
        assert_eq!(file_count(&directory), 0, "nothing is left over");
        reached
    });
    assert!(fates.contains(&true) && fates.contains(&false), "{fates:?}");
}

#[test]
fn a_crash_while_vms_are_made_and_preserved_leaves_nothing() {
    at_each_change(|number| {
        let directory = directory();
        let pool = start(&directory);
        let ((), reached) = Fault::From(number).during(|| {
            let Ok(session) = pool.create_session(&name("a")) else { return };
            let memory = pool.create_memory("guest", MIB);
            if let Ok(memory) = &memory {
                let _ = session.preserve(memory.as_fd(), Token(1));
            }
            let _ = session.preserve(memfd("document").as_fd(), Token(0));
            drop((session, memory));
            drop(pool);
        });
        let pool = start(&directory);
        assert_eq!(file_count(&directory), 0, "leftovers are collected at the start");
        assert_eq!((found(&pool).len(), pool.liveupdate_number()), (0, 0));
        reached
    });
}

#[test]
fn a_switch_that_fails_anywhere_is_undone_and_can_be_made_again() {
    for errno in [Errno::NOSPC, Errno::IO, Errno::ROFS] {
        at_each_change(|number| {
            let directory = directory();
            let pool = start(&directory);
            let vms = two_vms(&pool);
            let (handed, reached) = Fault::At(number, errno).during(|| {
                let mut jumped = false;
                Orchestrator::switch(&pool, &mut || jumped = true).map(|()| jumped)
            });
            if reached {
                // The failed change is part of the switch, or of undoing it after the jump
                // returned.
                let failed = handed.unwrap_or_else(|error| {
                    assert_eq!(error, Error::Switch { errno });
                    true
                });
                assert!(failed);
            }
            let handover = std::fs::metadata(directory.path().join("handover"));
            assert!(handover.is_err() || handover.is_ok_and(|file| file.len() == 0));
            for (session, memory) in &vms {
                assert!(is_preserved(&pool, memory));
                session.preserve(memfd("more").as_fd(), Token(9)).unwrap();
            }
            leave(pool);
            drop(vms);
            assert_eq!(found(&start(&directory)), ["a", "b"]);
            reached
        });
    }
}

#[test]
fn a_tree_that_cannot_be_removed_is_reported() {
    let directory = directory();
    let pool = start(&directory);
    let vms = two_vms(&pool);
    let changes = {
        let mut changes = 0;
        at_each_change(|number| {
            changes = number;
            Fault::At(number, Errno::IO).during(|| Orchestrator::switch(&pool, &mut || ())).1
        });
        changes
    };
    // The last of these changes removes the tree; if that fails, the tree is truncated.
    let from = Fault::From(changes - 1);
    let (switched, _) = from.during(|| Orchestrator::switch(&pool, &mut || ()));
    let error = switched.unwrap_err();
    assert_eq!(error, Error::Switch { errno: Errno::NOTRECOVERABLE });
    assert!(error.to_string().contains("remove `handover`"), "{error}");
    drop(vms);
}

#[test]
fn a_failure_while_preserving_changes_nothing() {
    at_each_change(|number| {
        let directory = directory();
        let pool = start(&directory);
        let (session, memory) = (pool.create_session(&name("a")).unwrap(), guest(&pool, "a"));
        let document = memfd("state of a");
        let (failed, reached) = Fault::At(number, Errno::NOSPC).during(|| {
            let one = session.preserve(memory.as_fd(), Token(1));
            let other = session.preserve(document.as_fd(), Token(0));
            (one.err(), other.err())
        });
        for (error, file, token) in [(failed.0, &memory, 1), (failed.1, &document, 0)] {
            if let Some(error) = error {
                assert_eq!(error.errno(), Some(Errno::NOSPC), "{error}");
                session.preserve(file.as_fd(), Token(token)).unwrap();
            }
        }
        leave(pool);
        drop((session, memory, document));
        assert_eq!(found(&start(&directory)), ["a"]);
        reached
    });
}

#[test]
fn memory_of_a_session_that_cannot_be_marked_as_taken_can_be_retrieved_later() {
    // The mark cannot be written, or cannot be brought to the disk.
    for (change, errno) in [(0, Errno::NOSPC), (1, Errno::IO), (1, Errno::NOMEM)] {
        let directory = left_two_vms();
        let pool = start(&directory);
        let session = pool.retrieve_session(&name("a")).unwrap();
        let retrieve = || session.retrieve(Token(1));
        let (refused, _) = Fault::At(change, errno).during(retrieve);
        let error = refused.unwrap_err();
        assert_eq!(error.errno(), Some(errno));
        assert!(!error.is_final() && error.to_string().contains("try again"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path().join("taken")).unwrap().count(), 0);
        assert_eq!(word(&session.retrieve(Token(1)).unwrap(), 1), "a");
        drop(session);
        assert_eq!(found(&pool), ["b"]);
    }
}

#[test]
fn a_host_that_ends_after_a_look_leaves_everything_to_the_next_one() {
    let directory = directory();
    let pool = start(&directory);
    let vms = two_vms(&pool);
    leave(pool);
    drop(vms);
    for _ in 0..3 {
        let pool = start(&directory);
        // As if the machine stopped: nothing on disk changes when the sessions and the pool are dropped.
        let (seen, reached) = Fault::From(0).during(|| {
            let sessions = ["a", "b"].map(|vm| pool.retrieve_session(&name(vm)).unwrap());
            let seen = sessions.each_ref().map(|s| contents(s.retrieve(Token(0)).unwrap()));
            drop((sessions, pool));
            seen
        });
        assert!(reached, "dropping the sessions finishes them");
        assert_eq!(seen, ["state of a", "state of b"]);
    }
    let pool = start(&directory);
    assert_eq!(found(&pool), ["a", "b"]);
    drop(pool);
    assert_eq!(found(&start(&directory)), [""; 0], "each was given out once");
}

#[test]
fn all_documents_are_written_before_the_first_is_waited_for() {
    let directory = directory();
    let pool = start(&directory);
    let session = pool.create_session(&name("web")).unwrap();
    let documents = ["one", "two", "three"].map(memfd);
    for (token, document) in documents.iter().enumerate() {
        session.preserve(document.as_fd(), Token(token as u64)).unwrap();
    }
    // The change after three writes is the first wait. One for each write would be one for each VM of a blackout.
    let waits = Fault::At(documents.len(), Errno::IO);
    let (left, reached) = waits.during(|| pool.hand_over(|| Ok::<_, Infallible>(())));
    assert!(left.is_err() && reached);
    let files = std::fs::read_dir(directory.path().join("files")).unwrap();
    let written = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap());
    let mut written: Vec<String> = written.collect();
    written.sort();
    assert_eq!(written, ["one", "three", "two"]);
    leave(pool);
    drop(session);
    let pool = start(&directory);
    let session = pool.retrieve_session(&name("web")).unwrap();
    assert_eq!(contents(session.retrieve(Token(2)).unwrap()), "three");
}
