//! Files that hold guest RAM on a kernel without LUO.

use super::*;
use rustix::fs::FallocateFlags;
use tempfile::NamedTempFile;

const LEN: u64 = HUGE_PAGE + PAGE;

/// A file of guest RAM, all of it allocated.
fn ram_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    rustix::fs::fallocate(file.as_file(), FallocateFlags::empty(), 0, LEN).unwrap();
    file
}

fn opened(file: &NamedTempFile) -> OwnedFd {
    File::options().read(true).write(true).open(file.path()).unwrap().into()
}

fn refused(backing: Backing, fd: OwnedFd, len: u64) -> String {
    check_segment_of(backing, 3, fd, len).map(drop).unwrap_err().to_string()
}

#[test]
fn a_file_is_taken_where_a_file_is_asked_for_and_can_be_mapped() {
    let file = ram_file();
    let segment = check_segment_of(Backing::AnyFile, 0, opened(&file), LEN).unwrap();
    assert!(is_touched(&segment).unwrap(), "all of it is there");
    let slots = [Slot { guest_base: 0, len: LEN }];
    let layout = Layout::new(&slots, None).unwrap();
    GuestRam::map(&layout, vec![segment]).unwrap();
}

#[test]
fn a_file_is_no_memfd_and_a_memfd_is_no_file() {
    let file = ram_file();
    let error = check_segment(3, opened(&file), LEN).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("segment 3: it "), "{error}");
    let memfd = create_segment("vm", LEN).unwrap();
    for backing in [Backing::DaxFile, Backing::AnyFile] {
        let error = refused(backing, reopen(&memfd), LEN);
        assert!(error.contains("the next kernel would not find it"), "{error}");
    }
    check_segment_of(Backing::Memfd, 3, reopen(&memfd), LEN).unwrap();
}

#[test]
fn a_file_without_dax_is_refused_where_it_has_to_survive() {
    let file = ram_file();
    let error = refused(Backing::DaxFile, opened(&file), LEN);
    assert!(error.starts_with("segment 3: it is a file without DAX on a filesystem"), "{error}");
}

#[test]
fn a_file_that_is_not_fully_allocated_is_refused() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(LEN).unwrap();
    let error = refused(Backing::AnyFile, opened(&file), LEN);
    let expected = format!("segment 3: only 0 of its {LEN} bytes are allocated");
    assert_eq!(error, expected);
}

#[test]
fn a_file_of_another_kind_size_or_mode_is_refused() {
    let file = ram_file();
    for other in [0, LEN - 1, LEN + 1] {
        let error = refused(Backing::AnyFile, opened(&file), other);
        assert_eq!(error, format!("segment 3: it has {LEN} bytes, the layout says {other}"));
    }
    let read_only = File::open(file.path()).unwrap().into();
    let error = refused(Backing::AnyFile, read_only, LEN);
    assert_eq!(error, "segment 3: its fd is not open for both reading and writing");
    for (path, kind) in [("/dev/null", "a device"), ("/proc", "a directory")] {
        let error = refused(Backing::AnyFile, File::open(path).unwrap().into(), LEN);
        assert_eq!(error, format!("segment 3: it is {kind}, not a file"));
    }
    let gone = ram_file();
    let fd = opened(&gone);
    drop(gone);
    let error = refused(Backing::AnyFile, fd, LEN);
    assert!(error.contains("it has no name in a directory"), "{error}");
}
