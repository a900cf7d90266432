//! A pool that is full, or read-only.

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::*;

/// A small tmpfs, mounted for one test.
struct SmallFilesystem(TempDir);

impl SmallFilesystem {
    /// Returns `None`, and prints that the test is skipped, if this process may not mount.
    fn new(bytes: u64) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let data = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        match mount("luo", directory.path(), "tmpfs", MountFlags::empty(), Some(data.as_c_str())) {
            Ok(()) => Some(Self(directory)),
            Err(errno) => {
                println!("skipped: cannot mount a small filesystem: {errno}");
                None
            }
        }
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn creating_memory_leaves_the_reserve_for_documents_free() {
    let directory = directory();
    let reserve = Options { reserve_bytes: u64::MAX / 2, ..options() };
    let pool = Pool::start(&directory, &reserve).unwrap();
    let error = pool.create_memory("web", MIB).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC));
    assert!(error.to_string().contains("`web`"), "{error}");
    let session = pool.create_session(&name("web")).unwrap();
    session.preserve(memfd("document").as_fd(), Token(0)).unwrap();
    assert_eq!(pool.create_memory("web", 0).unwrap_err().errno(), Some(Errno::INVAL));
}

#[test]
fn leftovers_are_looked_for_only_when_their_room_is_needed() {
    let Some(mounted) = SmallFilesystem::new(4 * MIB) else { return };
    let pool = start(&mounted.0);
    drop(pool.create_memory("left", 2 * MIB).unwrap());
    let _one = pool.create_memory("one", MIB).unwrap();
    assert_eq!(file_count(&mounted.0), 2, "there was room, so no file was opened");
    let _two = pool.create_memory("two", 2 * MIB).unwrap();
    assert_eq!(file_count(&mounted.0), 2);
    // Documents need room as well.
    let left = pool.create_memory("left", MIB / 2).unwrap();
    drop(left);
    let session = pool.create_session(&name("web")).unwrap();
    let big = memfd("");
    big.set_len(3 * MIB / 4).unwrap();
    session.preserve(big.as_fd(), Token(0)).unwrap();
    assert_eq!(file_count(&mounted.0), 3);
}

#[test]
fn a_full_pool_refuses_early_and_loses_nothing() {
    let Some(mounted) = SmallFilesystem::new(4 * MIB) else { return };
    let pool = start(&mounted.0);
    let (session, memory) = vm(&pool, "web");
    let rest = pool.create_memory("rest", 2 * MIB).unwrap();
    let error = pool.create_memory("more", 2 * MIB).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC), "{error}");
    let big = memfd("");
    big.set_len(MIB).unwrap();
    let error = session.preserve(big.as_fd(), Token(5)).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::NOSPC));
    assert!(error.to_string().contains("the pool is full"), "{error}");
    // Fills the filesystem to the last page: there is no room for the tree either.
    let mut filler = File::create_new(mounted.0.path().join("filler")).unwrap();
    while filler.write(&[1; 4096]).is_ok() {}
    let full = Orchestrator::switch(&pool, &mut || panic!("the tree was not written"));
    assert_eq!(full, Err(Error::Switch { errno: Errno::NOSPC }));
    assert!(full.unwrap_err().to_string().contains("no room"));
    assert!(is_preserved(&pool, &memory));
    std::fs::remove_file(mounted.0.path().join("filler")).unwrap();
    drop(filler);
    leave(pool);
    drop((session, memory, rest));
    take_vm(&start(&mounted.0), "web").unwrap();
}

#[test]
fn unused_memory_is_removed_to_make_room() {
    let Some(mounted) = SmallFilesystem::new(4 * MIB) else { return };
    let pool = start(&mounted.0);
    for _ in 0..4 {
        drop(pool.create_memory("web", 3 * MIB).unwrap());
    }
    assert_eq!(file_count(&mounted.0), 1);
}

#[test]
fn a_pool_that_became_read_only_says_so_and_loses_nothing() {
    let Some(mounted) = SmallFilesystem::new(8 * MIB) else { return };
    let pool = start(&mounted.0);
    let (session, memory) = vm(&pool, "web");
    leave(pool);
    let document = memfd("more");
    drop((session, memory));
    let pool = start(&mounted.0);
    let outgoing = pool.create_session(&name("new")).unwrap();
    mount_remount(mounted.0.path(), MountFlags::RDONLY, "").unwrap();
    let session = pool.retrieve_session(&name("web")).unwrap();
    let refused = [
        session.retrieve(Token(1)).unwrap_err(),
        outgoing.preserve(document.as_fd(), Token(0)).unwrap_err(),
        pool.create_memory("web", MIB).unwrap_err(),
        Orchestrator::switch(&pool, &mut || panic!("the tree was not written")).unwrap_err(),
    ];
    for error in &refused[..3] {
        assert_eq!(error.errno(), Some(Errno::ROFS), "{error}");
        assert!(error.to_string().contains("read-only"), "{error}");
    }
    drop((pool, outgoing, session));
    let attempt = "create a file in";
    let path = mounted.0.path().to_owned();
    let expected = PoolError::Io { path: path.clone(), attempt, errno: Errno::ROFS };
    assert_eq!(Pool::start(&path, &options()).map(drop), Err(expected));
    mount_remount(&path, MountFlags::empty(), "").unwrap();
    take_vm(&start(&mounted.0), "web").unwrap();
}
