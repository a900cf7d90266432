//! What a directory has to be.

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
    assert_eq!(refused(&path, &options()), PoolError::InUse { path }, "a session has it");
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
fn a_filesystem_without_dax_is_refused_unless_it_is_asked_for() {
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
    assert_eq!(std::fs::read(&file).unwrap(), good, "it stays which pool it is");
}

#[test]
fn a_crash_while_a_pool_is_made_leaves_a_directory_that_can_be_made_one() {
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
