//! A saved state is loaded unchanged, or refused.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tempfile::TempDir;

use super::*;
use crate::Token;
use crate::builtin::tree::{FileRecord, SessionRecord};
use crate::builtin::{Compatible, Name};

const SIZE: u64 = 5 << 12 | 100;

/// A memfd with a hole in it, a tail, a seal and a position.
fn sample() -> Kept {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = File::from(memfd_create("sample", flags).unwrap());
    memfd.set_len(SIZE).unwrap();
    memfd.write_all_at(b"at the start", 0).unwrap();
    memfd.write_all_at(b"at the end", SIZE - 10).unwrap();
    fcntl_add_seals(&memfd, SealFlags::GROW).unwrap();
    Kept {
        file: OpenFile::new(memfd.into()),
        size: SIZE,
        position: 7,
        seals: SealFlags::GROW,
        mode: 0o640,
    }
}

fn tree(number: u64, files: &[u64]) -> Vec<u8> {
    let compatible = Compatible::new("memfd-store-v1").unwrap();
    let record = |data: &u64| FileRecord { compatible, data: *data, token: Token(*data + 100) };
    let files = files.iter().map(record).collect();
    let session = SessionRecord { name: Name::new("web").unwrap(), files };
    v1::encode(&Handover { number, sessions: vec![session], flbs: Vec::new() }).unwrap()
}

fn saved(number: u64) -> TempDir {
    let directory = TempDir::new().unwrap();
    save_to(directory.path(), number);
    directory
}

fn save_to(path: &Path, number: u64) {
    let empty = Kept { size: 0, ..sample() };
    let store = Store::with(BTreeMap::from([(1, sample()), (2, sample()), (3, empty)]));
    let directory = locked(path);
    directory.save(&tree(number, &[1, 3]), &store).unwrap();
}

/// Opens a directory without reading its state or locking it.
fn locked(path: &Path) -> Directory {
    Directory { path: path.to_owned(), directory: File::open(path).unwrap() }
}

fn load(path: &Path) -> Result<State, Error> {
    Directory::open(path).map(|(_, state)| state.expect("there is a state"))
}

fn files(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_state_is_loaded_unchanged() {
    let directory = saved(1);
    let state = load(directory.path()).unwrap();
    assert_eq!(state.tree, tree(1, &[1, 3]));
    assert_eq!(state.files.keys().copied().collect::<Vec<_>>(), [1, 3]);
    let Kept { file, size, position, seals, mode } = &state.files[&1];
    assert_eq!((*size, *position, *mode), (SIZE, 7, 0o640));
    assert_eq!(*seals, SealFlags::GROW);
    assert_eq!(rustix::fs::fcntl_get_seals(file).unwrap(), SealFlags::GROW);
    let mut file = File::from(file.duplicate().unwrap());
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o640);
    assert_eq!(metadata.blocks(), 2 * 8, "the hole is a hole again");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[..12].copy_from_slice(b"at the start");
    expected[SIZE as usize - 10..].copy_from_slice(b"at the end");
    assert!(bytes == expected);
}

#[test]
fn contents_with_holes_anywhere_are_loaded_unchanged() {
    const PAGE: usize = 4096;
    // Sizes around one read of 256 pages, with data and holes on both sides of its end.
    for (pages, tail) in [(0, 0), (0, 1), (1, 0), (255, 7), (256, 0), (257, 4095), (600, 1)] {
        let mut bytes: Vec<u8> = (0..pages * PAGE + tail).map(|at| (at / 7) as u8).collect();
        for hole in [3, 254, 256, 511] {
            if let Some(page) = bytes.get_mut(hole * PAGE..(hole + 1) * PAGE) {
                page.fill(0);
            }
        }
        let kept = sample();
        let memfd = File::from(memfd_create("shape", MemfdFlags::CLOEXEC).unwrap());
        memfd.write_all_at(&bytes, 0).unwrap();
        let size = bytes.len() as u64;
        let file = OpenFile::new(memfd.into());
        let kept = Kept { file, size, seals: SealFlags::SEAL, ..kept };
        let directory = TempDir::new().unwrap();
        let store = Store::with(BTreeMap::from([(1, sample()), (2, kept), (3, sample())]));
        locked(directory.path()).save(&tree(1, &[3, 2, 1]), &store).unwrap();
        let state = load(directory.path()).unwrap();
        let mut found = Vec::new();
        File::from(state.files[&2].file.duplicate().unwrap()).read_to_end(&mut found).unwrap();
        assert!(found == bytes, "{pages} pages and {tail} bytes");
    }
}

#[test]
fn a_new_state_replaces_the_old_one() {
    let directory = saved(1);
    save_to(directory.path(), 2);
    assert_eq!(load(directory.path()).unwrap().tree, tree(2, &[1, 3]));
    let names = files(directory.path());
    let names: Vec<_> = names.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(names, ["memory-2", "state", "tree-2.dtb"]);
}

#[test]
fn a_partly_written_state_leaves_the_old_one_valid() {
    let directory = saved(1);
    let next = saved(2);
    for file in files(next.path()) {
        if file.file_name().unwrap() != INDEX {
            fs::copy(&file, directory.path().join(file.file_name().unwrap())).unwrap();
            assert_eq!(load(directory.path()).unwrap().tree, tree(1, &[1, 3]));
        }
    }
    fs::copy(next.path().join(INDEX), directory.path().join(NEW_INDEX)).unwrap();
    assert_eq!(load(directory.path()).unwrap().tree, tree(1, &[1, 3]));
    fs::rename(directory.path().join(NEW_INDEX), directory.path().join(INDEX)).unwrap();
    assert_eq!(load(directory.path()).unwrap().tree, tree(2, &[1, 3]));
}

#[test]
fn a_partly_written_first_state_is_incomplete() {
    let directory = saved(1);
    fs::remove_file(directory.path().join(INDEX)).unwrap();
    assert!(matches!(load(directory.path()), Err(Error::Incomplete { .. })));
}

#[test]
fn every_prefix_of_every_file_is_refused() {
    let directory = saved(1);
    for file in files(directory.path()) {
        let whole = fs::read(&file).unwrap();
        // Only some lengths of a long file, to save time.
        let step = if whole.len() > 4096 { 997 } else { 1 };
        for length in (0..whole.len()).step_by(step) {
            fs::write(&file, &whole[..length]).unwrap();
            assert!(load(directory.path()).is_err(), "{} of {length} bytes", file.display());
        }
        fs::write(&file, [&whole[..], b"\n"].concat()).unwrap();
        assert!(load(directory.path()).is_err(), "{} with one byte more", file.display());
        fs::write(&file, whole).unwrap();
    }
    load(directory.path()).unwrap();
}

#[test]
fn every_flipped_byte_of_every_file_is_refused() {
    let directory = saved(1);
    for file in files(directory.path()) {
        let whole = fs::read(&file).unwrap();
        let step = if whole.len() > 4096 { 101 } else { 1 };
        for at in (0..whole.len()).step_by(step) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&file, bytes).unwrap();
            assert!(load(directory.path()).is_err(), "byte {at} of {}", file.display());
        }
        fs::write(&file, whole).unwrap();
    }
    load(directory.path()).unwrap();
}

#[test]
fn files_of_two_states_are_refused() {
    let (one, other) = (saved(1), saved(2));
    let tree = fs::read(other.path().join("tree-2.dtb")).unwrap();
    fs::write(one.path().join("tree-1.dtb"), tree).unwrap();
    assert!(matches!(load(one.path()), Err(Error::Damaged { .. })));
}

#[test]
fn a_file_of_another_name_makes_a_directory_foreign() {
    for name in ["notes.txt", "tree-1", "tree-x.dtb", "memory", "memory-01", ".git", "State"] {
        let directory = saved(1);
        File::create(directory.path().join(name)).unwrap().write_all(b"mine").unwrap();
        assert!(matches!(load(directory.path()), Err(Error::Foreign { .. })), "{name}");
    }
}

#[test]
fn a_directory_is_used_by_one_run_at_a_time() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("made/for/it");
    let (first, state) = Directory::open(&path).unwrap();
    assert!(state.is_none());
    assert!(matches!(Directory::open(&path), Err(Error::Busy { .. })));
    drop(first);
    Directory::open(&path).unwrap();
}

#[test]
fn an_index_with_other_spellings_is_refused() {
    let mut index = Index::new(3, b"tree");
    index
        .files
        .insert(9, Entry { size: 1, position: 2, seals: SealFlags::SEAL, mode: 0o777, sum: 5 });
    let text = index.to_string();
    assert_eq!(Index::parse(text.as_bytes()), Ok(index));
    for (old, new) in [("number 3", "number +3"), ("size 1", "size 01"), ("\nend", "\n\nend")] {
        assert!(Index::parse(text.replace(old, new).as_bytes()).is_err(), "{new:?}");
    }
}
