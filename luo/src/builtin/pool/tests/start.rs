//! Which directories can be a pool, and which trees a start takes its sessions from.

use super::*;

fn refused(path: impl AsRef<Path>, options: &Options) -> PoolError {
    Pool::start(path, options).map(drop).unwrap_err()
}

#[test]
fn a_pool_has_one_host() {
    let directory = directory();
    let pool = start(&directory);
    let path = directory.path().to_owned();
    assert_eq!(refused(&path, &options()), PoolError::InUse { path: path.clone() });
    let session = pool.create_session(&name("web")).unwrap();
    drop(pool);
    assert_eq!(refused(&path, &options()), PoolError::InUse { path }, "the session keeps the lock");
    drop(session);
    start(&directory);
}

#[test]
fn a_pool_is_a_directory() {
    let directory = directory();
    let path = directory.path().join("file");
    std::fs::write(&path, b"").unwrap();
    assert_eq!(refused(&path, &options()), PoolError::NotADirectory { path: path.clone() });
    let path = directory.path().join("absent");
    let attempt = "open";
    let expected = PoolError::Io { path: path.clone(), attempt, errno: Errno::NOENT };
    assert_eq!(refused(&path, &options()), expected);
}

#[test]
fn a_filesystem_without_dax_is_refused_unless_the_options_allow_it() {
    let directory = directory();
    let path = directory.path().to_owned();
    let error = refused(&path, &Options { without_dax: false, ..options() });
    assert_eq!(error, PoolError::NoDax { path });
    assert!(error.to_string().contains("`dax=always`"), "{error}");
    assert!(!Options::default().without_dax);
    start(&directory);
}

#[test]
fn a_pool_that_is_too_small_says_both_sizes() {
    let directory = directory();
    let error = refused(&directory, &Options { least_bytes: u64::MAX, ..options() });
    let PoolError::TooSmall { found, least, .. } = error else { panic!("{error}") };
    assert!(found > 0 && least == u64::MAX);
    drop(Pool::start(&directory, &Options { least_bytes: found, ..options() }).unwrap());
}

#[test]
fn a_pool_of_another_version_or_without_an_identity_is_refused() {
    let directory = directory();
    let path = directory.path().to_owned();
    drop(start(&directory));
    let file = path.join("pool");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, b"luo-pool-v2\nwhat\never\n").unwrap();
    let (found, known) = ("luo-pool-v2".to_owned(), "luo-pool-v1");
    let version = PoolError::Version { path: path.clone(), found, known };
    assert_eq!(refused(&path, &options()), version);
    for end in 0..good.len() {
        std::fs::write(&file, &good[..end]).unwrap();
        let error = refused(&path, &options());
        let expected = matches!(error, PoolError::Version { .. } | PoolError::Identity { .. });
        assert!(expected, "{end}: {error}");
    }
    std::fs::write(&file, &good).unwrap();
    drop(start(&directory));
    assert_eq!(std::fs::read(&file).unwrap(), good, "the pool keeps its identity");
}

#[test]
fn a_pool_can_be_made_after_a_crash_while_making_it() {
    let mut number = 0;
    loop {
        let directory = directory();
        let make = || drop(Pool::start(directory.path(), &options()));
        let ((), reached) = Fault::From(number).during(make);
        drop(start(&directory));
        if !reached {
            break;
        }
        number += 1;
    }
    assert!(number > 3);
}

#[test]
fn files_that_are_not_the_pools_are_left_alone() {
    let directory = directory();
    drop(start(&directory));
    let (strange, leftover) = ("files/notes.txt", "files/00000000000000aa");
    for file in [strange, leftover, "notes"] {
        std::fs::write(directory.path().join(file), b"x").unwrap();
    }
    drop(start(&directory));
    let exists = |file: &str| directory.path().join(file).exists();
    assert_eq!([strange, leftover, "notes"].map(exists), [true, false, true]);
}

/// Starts a pool with `expect`. Returns the VMs that the pool has, or why live update is disabled.
fn expecting(directory: &TempDir, expect: Expect) -> Result<Vec<&'static str>, TreeError> {
    let pool = Pool::start(directory.path(), &Options { expect, ..options() }).unwrap();
    match pool.disabled() {
        Some(Disabled::Pool(why)) => Err(why),
        Some(other) => panic!("{other}"),
        None => {
            let found = |session: &&str| take_vm(&pool, session).is_some();
            Ok(["web", "db"].into_iter().filter(found).collect())
        }
    }
}

/// Hands over a VM, and returns the ticket of the switch.
fn hand_over_vm(directory: &TempDir, session: &str) -> Ticket {
    let pool = start(directory);
    let vm = vm(&pool, session);
    let ticket = pool.ticket().unwrap();
    assert_eq!(pool.ticket(), Some(ticket), "each attempt has the same ticket");
    leave(pool);
    drop(vm);
    ticket
}

#[test]
fn sessions_are_given_out_for_the_ticket_of_their_switch_only() {
    let directory = directory();
    let ticket = hand_over_vm(&directory, "web");
    let other = Ticket::new([7; 16]);
    let refused = TreeError::Ticket { wanted: other, found: Some(ticket) };
    assert_eq!(expecting(&directory, Expect::Switch(other)), Err(refused.clone()));
    let text = refused.to_string();
    assert!(text.contains(&ticket.to_string()) && text.contains(&other.to_string()), "{text}");
    assert_eq!(expecting(&directory, Expect::Switch(ticket)), Ok(vec!["web"]));
    // A host that is restarted under the same kernel has the same ticket.
    assert_eq!(expecting(&directory, Expect::Switch(ticket)), Ok(vec![]));
    assert_eq!(
        expecting(&directory, Expect::Switch(other)),
        Err(refused),
        "also after its sessions were retrieved"
    );
}

#[test]
fn an_empty_pool_has_no_ticket() {
    let directory = directory();
    let wanted = Ticket::new([7; 16]);
    let refused = TreeError::Ticket { wanted, found: None };
    assert!(refused.to_string().contains("the pool has no tree"), "{refused}");
    assert_eq!(expecting(&directory, Expect::Switch(wanted)), Err(refused));
}

#[test]
fn a_host_that_was_killed_in_a_switch_leaves_all_or_nothing() {
    let directory = directory();
    let first = hand_over_vm(&directory, "web");
    let begun = |ticket| Expect::Begun(ticket);
    assert_eq!(expecting(&directory, begun(first)), Ok(vec!["web"]));
    assert_eq!(expecting(&directory, begun(first)), Ok(vec![]), "it was taken");
    // Killed before the tree was written: that of the last switch is another one.
    hand_over_vm(&directory, "db");
    assert_eq!(expecting(&directory, begun(Ticket::new([7; 16]))), Ok(vec![]));
    assert_eq!(file_count(&directory), 0);
    // What cannot be read may be what was written.
    for tree in ["handover", "incoming"] {
        let ticket = hand_over_vm(&directory, "web");
        let path = directory.path().join("handover");
        let good = std::fs::read(&path).unwrap();
        let (damaged, place) = ([&good[..], b"x"].concat(), directory.path().join(tree));
        std::fs::remove_file(path).unwrap();
        std::fs::write(&place, damaged).unwrap();
        expecting(&directory, begun(ticket)).unwrap_err();
        std::fs::write(&place, good).unwrap();
        assert_eq!(expecting(&directory, begun(ticket)), Ok(vec!["web"]), "{tree}");
        assert_eq!(expecting(&directory, Expect::Nothing), Ok(vec![]));
    }
}

#[test]
fn trees_of_another_boot_are_removed_valid_or_not() {
    for damage in [None, Some(&b"nonsense"[..]), Some(&b""[..])] {
        let directory = directory();
        let ticket = hand_over_vm(&directory, "web");
        drop(start(&directory));
        // Nobody retrieved a session of the first generation. This makes the second.
        hand_over_vm(&directory, "db");
        for tree in ["handover", "incoming"] {
            if let Some(damage) = damage {
                std::fs::write(directory.path().join(tree), damage).unwrap();
            }
        }
        assert_eq!(expecting(&directory, Expect::Nothing), Ok(vec![]));
        assert_eq!(file_count(&directory), 0, "its memory is removed");
        assert_eq!(
            expecting(&directory, Expect::Anything),
            Ok(vec![]),
            "a later start finds no sessions either"
        );
        assert!(expecting(&directory, Expect::Switch(ticket)).is_err());
        // The live update number starts at 1 again.
        let next = hand_over_vm(&directory, "web");
        assert_eq!(expecting(&directory, Expect::Switch(next)), Ok(vec!["web"]));
    }
}

#[test]
fn a_crash_while_trees_are_removed_never_brings_a_session_back() {
    let mut number = 0;
    loop {
        let directory = directory();
        let first = hand_over_vm(&directory, "web");
        drop(start(&directory));
        let second = hand_over_vm(&directory, "db");
        let path = directory.path().to_owned();
        let give_up = Options { expect: Expect::Nothing, ..options() };
        let ((), reached) =
            Fault::From(number).during(|| drop(Pool::start(&path, &give_up).unwrap()));
        // No switch started the kernel after the crash either.
        assert_eq!(expecting(&directory, Expect::Nothing), Ok(vec![]));
        for ticket in [first, second] {
            assert!(expecting(&directory, Expect::Switch(ticket)).is_err());
        }
        if !reached {
            break;
        }
        number += 1;
    }
    assert!(number > 2);
}

#[test]
fn a_failed_switch_that_could_not_be_undone_does_not_hide_the_incoming_sessions() {
    for damage in [None, Some(&b""[..])] {
        let directory = directory();
        let ticket = hand_over_vm(&directory, "web");
        let expect = Expect::Switch(ticket);
        let pool = Pool::start(directory.path(), &Options { expect, ..options() }).unwrap();
        let db = vm(&pool, "db");
        leave(pool);
        drop(db);
        if let Some(damage) = damage {
            std::fs::write(directory.path().join("handover"), damage).unwrap();
        }
        assert_eq!(expecting(&directory, expect), Ok(vec!["web"]));
        assert!(!directory.path().join("handover").exists());
    }
}
