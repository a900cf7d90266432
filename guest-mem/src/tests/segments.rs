//! Segments that are created, and fds that are checked before they become segments.

use super::*;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::io::Read;
use std::os::unix::fs::FileExt;

const LEN: u64 = HUGE_PAGE + PAGE;

fn refused(index: usize, fd: OwnedFd, expected_len: u64) -> String {
    check_segment(index, fd, expected_len).map(drop).unwrap_err().to_string()
}

/// A memfd that can be sealed, as another program may create it.
fn sealable(more: MemfdFlags) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("other", MemfdFlags::ALLOW_SEALING | more)?;
    rustix::fs::ftruncate(&fd, LEN)?;
    Ok(fd)
}

fn touched(act: impl FnOnce(&Segment)) -> bool {
    let segment = create_segment("a test", LEN).unwrap();
    act(&segment);
    is_touched(&segment).unwrap()
}

#[test]
fn a_new_segment_is_an_empty_executable_memfd_whose_size_and_seals_stay() {
    let segment = create_segment("vm-a-0", LEN).unwrap();
    assert_eq!((segment.len(), segment.is_empty(), allocated(&segment)), (LEN, false, 0));
    let name = std::fs::read_link(path_of(segment.file())).unwrap();
    assert_eq!(name.to_str().unwrap(), "/memfd:vm-a-0 (deleted)");
    let metadata = segment.file().metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o111), (LEN, 0o111));
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    assert_eq!(rustix::fs::fcntl_get_seals(segment.file()).unwrap(), seals);
    for len in [LEN - PAGE, LEN + PAGE] {
        rustix::fs::ftruncate(segment.file(), len).unwrap_err();
    }
    segment.file().write_all_at(b"x", LEN).unwrap_err();
    rustix::fs::fcntl_add_seals(segment.file(), SealFlags::WRITE).unwrap_err();
    let flags = rustix::io::fcntl_getfd(segment.file()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "no other program inherits it");
}

#[test]
fn a_segment_that_cannot_be_made_is_named() {
    for (name, len, step) in [
        ("x".repeat(250), PAGE, "cannot create the memfd `xxx"),
        ("a\0b".to_owned(), PAGE, "cannot create the memfd `a\0b` of 4096 bytes"),
        ("big".to_owned(), u64::MAX, "cannot size the memfd `big` of 18446744073709551615 bytes"),
    ] {
        let error = create_segment(&name, len).map(drop).unwrap_err();
        assert!(error.to_string().starts_with(step), "{error}");
        assert!(std::error::Error::source(&error).is_some(), "{error}: without a cause");
    }
    create_segment(&"x".repeat(249), PAGE).unwrap();
}

#[test]
fn a_host_that_forbids_executable_memfds_is_told_what_to_change() {
    let error = |errno| Error::Create {
        name: "vm".to_owned(),
        len: 1,
        attempt: "create",
        source: std::io::Error::from_raw_os_error(errno),
    };
    let denied = error(libc::EACCES).to_string();
    assert!(denied.ends_with("is vm.memfd_noexec 2?)"), "{denied}");
    assert_eq!(error(libc::ENOMEM).to_string(), "cannot create the memfd `vm` of 1 bytes");
}

#[test]
fn checking_a_segment_accepts_it_and_touches_no_page() {
    let made = create_segment("vm-a-0", LEN).unwrap();
    made.file().write_all_at(b"guest", HUGE_PAGE).unwrap();
    let before = allocated(&made);
    let back = check_segment(7, reopen(&made), LEN).unwrap();
    assert_eq!((back.len(), allocated(&back)), (LEN, before));
    let mut bytes = [0; 5];
    back.file().read_exact_at(&mut bytes, HUGE_PAGE).unwrap();
    assert_eq!(&bytes, b"guest");
    let clone = back.try_clone().unwrap();
    assert_eq!(clone.len(), LEN);
    check_segment(7, clone.into(), LEN).unwrap();
}

#[test]
fn what_is_not_shared_memory_is_refused() {
    let (pipe, _end) = std::io::pipe().unwrap();
    let (socket, _end) = std::os::unix::net::UnixStream::pair().unwrap();
    let cases: [(OwnedFd, &str); 5] = [
        (File::open("/proc/self/status").unwrap().into(), "a file on a filesystem of type 0x9fa0"),
        (File::open("/proc").unwrap().into(), "a directory on a filesystem of type 0x9fa0"),
        (File::open("/dev/null").unwrap().into(), "a device on a filesystem of type"),
        (pipe.into(), "a pipe on a filesystem of type"),
        (socket.into(), "a socket on a filesystem of type"),
    ];
    for (fd, expected) in cases {
        let error = refused(3, fd, LEN);
        assert!(error.starts_with(&format!("segment 3: it is {expected}")), "{error}");
        assert!(error.ends_with("not a file in shared memory (type 0x1021994)"), "{error}");
    }
}

#[test]
fn shared_memory_with_a_name_is_refused() {
    let file = match tempfile::NamedTempFile::new_in("/dev/shm") {
        Ok(file) => file,
        Err(error) => return eprintln!("skipped: no tmpfs at /dev/shm: {error}"),
    };
    file.as_file().set_len(LEN).unwrap();
    let error = refused(0, file.reopen().unwrap().into(), LEN);
    assert_eq!(error, "segment 0: it has a name in a directory, so it is not a memfd");
}

#[test]
fn another_size_is_refused_with_both_numbers() {
    let segment = create_segment("vm", LEN).unwrap();
    for expected in [0, PAGE, LEN - 1, LEN + 1, u64::MAX] {
        let error = refused(2, reopen(&segment), expected);
        assert_eq!(error, format!("segment 2: it has {LEN} bytes, the layout says {expected}"));
    }
}

#[test]
fn an_fd_that_cannot_both_read_and_write_is_refused() {
    let segment = create_segment("vm", LEN).unwrap();
    let path = path_of(segment.file());
    let read_only = File::open(&path).unwrap();
    let write_only = File::options().write(true).open(&path).unwrap();
    let flags = rustix::fs::OFlags::PATH;
    let neither = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    for fd in [read_only.into(), write_only.into(), neither] {
        let error = refused(1, fd, LEN);
        assert_eq!(error, "segment 1: its fd is not open for both reading and writing");
    }
}

#[test]
fn seals_that_would_stop_the_guest_are_refused_by_their_names() {
    let (plain, no_exec) = (MemfdFlags::empty(), MemfdFlags::NOEXEC_SEAL);
    // Linux seals an executable memfd against writing along with execution.
    let all = "F_SEAL_WRITE and F_SEAL_FUTURE_WRITE and F_SEAL_EXEC";
    for (flags, seals, names) in [
        (plain, SealFlags::WRITE, "F_SEAL_WRITE"),
        (plain, SealFlags::FUTURE_WRITE, "F_SEAL_FUTURE_WRITE"),
        (plain, SealFlags::EXEC, all),
        (no_exec, SealFlags::SEAL, "F_SEAL_EXEC"),
    ] {
        let fd = sealable(flags);
        let fd = fd.and_then(|fd| rustix::fs::fcntl_add_seals(&fd, seals).map(|()| fd));
        let fd = match fd {
            Ok(fd) => fd,
            Err(error) => {
                eprintln!("skipped: this kernel does not seal with {names}: {error}");
                continue;
            }
        };
        let error = refused(4, fd, LEN);
        assert_eq!(error, format!("segment 4: it is sealed with {names}, guest RAM must not be"));
    }
    // The seals that LUO itself sets, which fix the size of a memfd.
    let fd = sealable(plain).unwrap();
    let fixed = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, fixed).unwrap();
    check_segment(0, fd, LEN).unwrap();
}

#[test]
fn a_segment_is_touched_by_whatever_gives_it_a_page() {
    assert!(!touched(|_| {}));
    assert!(touched(|s| s.file().write_all_at(&[0], 0).unwrap()), "also by zeroes");
    assert!(touched(|s| s.file().write_all_at(&[1], LEN - 1).unwrap()), "also at the end");
    let some = FallocateFlags::empty();
    assert!(touched(|s| rustix::fs::fallocate(s.file(), some, HUGE_PAGE, PAGE).unwrap()));
}

#[test]
fn a_segment_is_not_touched_by_being_read_as_a_file_or_looked_at() {
    assert!(!touched(|s| {
        s.file().read_exact_at(&mut [0; 8192], 0).unwrap();
    }));
    assert!(!touched(|s| assert!(!is_touched(s).unwrap())));
    assert!(!touched(|s| drop(check_segment(0, reopen(s), LEN).unwrap())));
}

#[test]
fn a_segment_whose_pages_were_given_back_is_untouched_again() {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert!(!touched(|s| {
        s.file().write_all_at(&[1; 8192], 0).unwrap();
        rustix::fs::fallocate(s.file(), punch, 0, LEN).unwrap();
    }));
}

#[test]
fn untouched_bytes_are_the_bytes_without_pages() {
    let segment = create_segment("test", 8 << 20).unwrap();
    assert_eq!(untouched_bytes(&segment).unwrap(), 8 << 20);
    segment.file().write_all_at(&[1], 3 << 20).unwrap();
    // The host's kernel decides how large the folio is.
    let left = untouched_bytes(&segment).unwrap();
    assert!([PAGE, HUGE_PAGE].contains(&((8 << 20) - left)), "{left}");
    segment.file().write_all_at(&vec![1; 8 << 20], 0).unwrap();
    assert_eq!(untouched_bytes(&segment).unwrap(), 0);
}

#[test]
fn is_touched_does_not_move_the_position_of_another_open_file() {
    let segment = create_segment("vm", LEN).unwrap();
    segment.file().write_all_at(b"guest", 0).unwrap();
    assert!(is_touched(&segment).unwrap());
    let mut bytes = [0; 5];
    // This is another open file, with its own position.
    File::from(reopen(&segment)).read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"guest");
}

#[test]
fn is_touched_errors_for_a_pipe() {
    let (pipe, _end) = std::io::pipe().unwrap();
    is_touched(&pipe).unwrap_err();
}
