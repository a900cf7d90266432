//! Damaged, exchanged and stale trees and files.

use std::path::PathBuf;

use super::*;

/// Makes a pool that handed over the VM `web`.
fn handed_over() -> TempDir {
    let directory = directory();
    let pool = start(&directory);
    let vm = vm(&pool, "web");
    leave(pool);
    drop(vm);
    directory
}

/// Returns why the pool disabled live update.
fn why(pool: &Pool) -> TreeError {
    match pool.disabled() {
        Some(Disabled::Pool(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// Returns the path of the guest memory in the pool, or of the document.
fn file(directory: &TempDir, is_memory: bool) -> PathBuf {
    let files = std::fs::read_dir(directory.path().join("files")).unwrap();
    let mut files = files.map(|file| file.unwrap().path());
    files.find(|file| (file.metadata().unwrap().len() == MIB) == is_memory).unwrap()
}

/// Returns the errnos of retrieving the guest memory and the document; `None` for success.
fn refusals(directory: &TempDir) -> [Option<Errno>; 2] {
    let pool = start(directory);
    let session = pool.retrieve_session(&name("web")).unwrap();
    let refusals = [Token(1), Token(0)].map(|token| {
        let error = session.retrieve(token).err()?;
        assert!(error.is_final(), "{error}");
        error.errno()
    });
    session.finish().unwrap();
    refusals
}

const STALE: Option<Errno> = Some(Errno::STALE);

#[test]
fn every_cut_and_every_flipped_byte_of_the_tree_disables_live_update_and_loses_nothing() {
    let directory = handed_over();
    let path = directory.path().join("handover");
    let good = std::fs::read(&path).unwrap();
    let files = file_count(&directory);
    let cuts = (0..good.len()).map(|end| good[..end].to_vec());
    let flips = (0..good.len()).map(|at| {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        bad
    });
    let longer = [good.clone(), vec![0]].concat();
    for bad in cuts.chain(flips).chain([longer]) {
        std::fs::write(&path, &bad).unwrap();
        let pool = Pool::start(directory.path(), &options()).unwrap();
        let why = why(&pool);
        assert!(matches!(why, TreeError::Tree(_) | TreeError::Sessions(_)), "{why}");
        let error = pool.retrieve_session(&name("web")).unwrap_err();
        assert!(error.is_final() && !error.is_not_found(), "{error}");
        pool.collect();
        assert_eq!(file_count(&directory), files);
    }
    std::fs::write(&path, &good).unwrap();
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn a_pool_with_a_bad_tree_still_creates_memory_and_says_why_live_update_is_disabled() {
    let directory = handed_over();
    std::fs::write(directory.path().join("handover"), b"nonsense").unwrap();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    drop(guest(&pool, "web"));
    assert_eq!(pool.liveupdate_number(), 0);
    let errors = [
        pool.create_session(&name("web")).unwrap_err(),
        Orchestrator::switch(&pool, &mut || panic!("the jump would lose a VM")).unwrap_err(),
    ];
    for error in errors {
        let source = std::error::Error::source(&error).unwrap();
        assert!(matches!(error, Error::Disabled { .. }), "{error}");
        let tree = std::error::Error::source(source).unwrap().to_string();
        assert_eq!(tree, "cannot decode the tree in the pool");
    }
}

#[test]
fn a_tree_with_wrong_file_records_or_of_another_pool_is_refused() {
    let directory = handed_over();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    let identity = pool.files.state().directory.identity;
    drop(pool);
    let path = directory.path().join("incoming");
    let tree = record::decode(&std::fs::read(&path).unwrap(), identity).unwrap();
    let id = *tree.files.keys().next().unwrap();
    let refused = |tree: &Tree| {
        std::fs::write(&path, record::encode(tree).unwrap()).unwrap();
        why(&Pool::start(directory.path(), &options()).unwrap())
    };
    let mut missing = tree.clone();
    missing.files.remove(&id);
    assert_eq!(refused(&missing), TreeError::Files { id });
    let mut extra = tree.clone();
    extra.files.insert(1, tree.files[&id]);
    assert_eq!(refused(&extra), TreeError::Files { id: 1 });
    let mut twice = tree.clone();
    let double = twice.luo.sessions[0].files[0];
    twice.luo.sessions[0].files.push(double);
    assert_eq!(refused(&twice), TreeError::Files { id: double.data });
    let mut foreign = tree.clone();
    foreign.pool[0] ^= 1;
    assert_eq!(refused(&foreign), TreeError::Foreign);
    std::fs::write(&path, record::encode(&tree).unwrap()).unwrap();
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn a_tree_that_is_too_large_or_not_a_regular_file_is_refused() {
    let directory = handed_over();
    let path = directory.path().join("handover");
    File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    assert_eq!(why(&pool), TreeError::Io { errno: Errno::FBIG });
    drop(pool);
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    assert_eq!(why(&pool), TreeError::Io { errno: Errno::LOOP });
}

#[test]
fn a_stale_copy_of_a_tree_is_refused() {
    let directory = handed_over();
    let (handover, incoming) =
        (directory.path().join("handover"), directory.path().join("incoming"));
    let kept = std::fs::read(&handover).unwrap();
    let pool = start(&directory);
    let memory = take_vm(&pool, "web").unwrap();
    memory.write_all_at(b"the guest ran", 0).unwrap();
    drop(pool);
    std::fs::write(&handover, &kept).unwrap();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    assert_eq!(why(&pool), TreeError::Generation { found: 1, latest: 1 });
    drop(pool);
    // Without the tree `incoming` and its marks, the files still do not match the stale tree.
    std::fs::remove_file(&incoming).unwrap();
    std::fs::remove_dir_all(directory.path().join("taken")).unwrap();
    assert_eq!(refusals(&directory), [STALE; 2]);
    assert_eq!(word(&memory, 13), "the guest ran");
}

#[test]
fn a_tree_of_another_pool_is_foreign() {
    let (directory, other) = (handed_over(), handed_over());
    let (from, to) = (other.path().join("handover"), directory.path().join("handover"));
    std::fs::copy(from, to).unwrap();
    let pool = Pool::start(directory.path(), &options()).unwrap();
    assert_eq!(why(&pool), TreeError::Foreign);
}

#[test]
fn the_files_of_a_copied_pool_are_refused() {
    let (directory, copy) = (handed_over(), directory());
    for part in ["pool", "handover"] {
        std::fs::copy(directory.path().join(part), copy.path().join(part)).unwrap();
    }
    std::fs::create_dir(copy.path().join("files")).unwrap();
    for is_memory in [true, false] {
        let from = file(&directory, is_memory);
        let to = copy.path().join("files").join(from.file_name().unwrap());
        // Both pools can be on filesystems that count inodes separately: make the copies' differ.
        std::fs::write(copy.path().join(format!("spacer-{is_memory}")), b"").unwrap();
        std::fs::copy(from, to).unwrap();
    }
    assert_eq!(refusals(&copy), [STALE; 2]);
    take_vm(&start(&directory), "web").unwrap();
}

#[test]
fn only_files_that_are_missing_resized_or_replaced_are_lost() {
    type Harm = fn(&TempDir, PathBuf);
    let harms: [Harm; 4] = [
        |_, file| std::fs::remove_file(file).unwrap(),
        |_, file| File::options().write(true).open(file).unwrap().set_len(5).unwrap(),
        |directory, file| {
            let other = directory.path().join("other");
            std::fs::copy(&file, &other).unwrap();
            std::fs::rename(other, file).unwrap();
        },
        |_, file| {
            std::fs::remove_file(&file).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", file).unwrap();
        },
    ];
    for harm in harms {
        for is_memory in [true, false] {
            let directory = handed_over();
            harm(&directory, file(&directory, is_memory));
            let expected = if is_memory { [STALE, None] } else { [None, STALE] };
            assert_eq!(refusals(&directory), expected);
        }
    }
}

#[test]
fn files_that_were_exchanged_cannot_be_retrieved() {
    let directory = directory();
    let pool = start(&directory);
    let (session, memory) = vm(&pool, "web");
    let other = guest(&pool, "other");
    session.preserve(other.as_fd(), Token(2)).unwrap();
    leave(pool);
    drop((session, memory, other));
    let files = std::fs::read_dir(directory.path().join("files")).unwrap();
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    let memory: Vec<_> = files.iter().filter(|f| f.metadata().unwrap().len() == MIB).collect();
    let aside = directory.path().join("aside");
    for (from, to) in [(memory[0], &aside), (memory[1], memory[0]), (&aside, memory[1])] {
        std::fs::rename(from, to).unwrap();
    }
    let session = start(&directory).retrieve_session(&name("web")).unwrap();
    for token in [1, 2] {
        assert_eq!(session.retrieve(Token(token)).unwrap_err().errno(), STALE);
    }
}

#[test]
fn a_document_whose_contents_changed_is_lost() {
    let directory = handed_over();
    File::options()
        .write(true)
        .open(file(&directory, false))
        .unwrap()
        .write_all_at(b"S", 0)
        .unwrap();
    assert_eq!(refusals(&directory), [None, STALE]);
}
