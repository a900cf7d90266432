//! A pool that is full, or read-only.

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::*;

/// A small filesystem of its own. `None`: this process may not mount, which is said.
struct Mounted(TempDir);

impl Mounted {
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

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn memory_leaves_the_room_that_documents_need() {
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
fn a_full_pool_refuses_early_and_loses_nothing() {
    let Some(mounted) = Mounted::new(4 * MIB) else { return };
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
    // To the last page: not even the tree has room.
    let mut filler = File::create_new(mounted.0.path().join("filler")).unwrap();
    while filler.write(&[1; 4096]).is_ok() {}
    let full = Orchestrator::switch(&pool, &mut || panic!("there is no tree"));
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
fn memory_that_nobody_has_makes_room_for_other_memory() {
    let Some(mounted) = Mounted::new(4 * MIB) else { return };
    let pool = start(&mounted.0);
    for _ in 0..4 {
        drop(pool.create_memory("web", 3 * MIB).unwrap());
    }
    assert_eq!(file_count(&mounted.0), 1);
}

#[test]
fn a_pool_that_became_read_only_says_so_and_loses_nothing() {
    let Some(mounted) = Mounted::new(8 * MIB) else { return };
    let pool = start(&mounted.0);
    let (session, memory) = vm(&pool, "web");
    leave(pool);
    let document = memfd("more");
    drop((session, memory));
    let pool = start(&mounted.0);
    let outgoing = pool.create_session(&name("new")).unwrap();
    mount_remount(mounted.0.path(), MountFlags::RDONLY, "").unwrap();
    let refused = [
        pool.retrieve_session(&name("web")).unwrap_err(),
        outgoing.preserve(document.as_fd(), Token(0)).unwrap_err(),
        pool.create_memory("web", MIB).unwrap_err(),
        Orchestrator::switch(&pool, &mut || panic!("there is no tree")).unwrap_err(),
    ];
    for error in &refused[..3] {
        assert_eq!(error.errno(), Some(Errno::ROFS), "{error}");
        assert!(error.to_string().contains("read-only"), "{error}");
    }
    drop((pool, outgoing));
    let attempt = "create a file in";
    let path = mounted.0.path().to_owned();
    let expected = PoolError::Io { path: path.clone(), attempt, errno: Errno::ROFS };
    assert_eq!(Pool::start(&path, &options()).map(drop), Err(expected));
    mount_remount(&path, MountFlags::empty(), "").unwrap();
    take_vm(&start(&mounted.0), "web").unwrap();
}
