//! Preserving and retrieving files of all kinds.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use luo::Errno;
use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, ftruncate,
    memfd_create,
};
use rustix::io::{FdFlags, fcntl_getfd};

use super::calls::{self, create, device, finish, preserve, reboot, retrieve, retrieve_session};
use super::{Case, Failure, Inside, inside, kernel_number, refused, same};

fn memfd(contents: &[u8]) -> Result<File, Errno> {
    let file = File::from(memfd_create("case", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all_at(contents, 0).map_err(|_| Errno::IO)?;
    Ok(file)
}

fn contents(mut file: &File) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The offset of page 1000 in bytes, behind a hole.
const FAR: u64 = 1000 << 12;

fn prepare() -> Case {
    let session = create(device()?, "web")?;
    let plain = memfd(b"some data")?;
    (&plain).seek(SeekFrom::Start(5))?;
    let sealed = memfd(b"sealed")?;
    fcntl_add_seals(&sealed, SealFlags::WRITE | SealFlags::SHRINK)?;
    let sparse = memfd(b"start")?;
    ftruncate(&sparse, FAR + 3)?;
    sparse.write_all_at(b"end", FAR)?;
    (&sparse).seek(SeekFrom::Start(FAR + 100))?;
    let unsealable = File::from(memfd_create("unsealable", MemfdFlags::CLOEXEC)?);
    let not_executable = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
    let not_executable = memfd_create("not executable", not_executable).map(File::from);
    preserve(&session, &plain, 1)?;
    preserve(&session, &sealed, 2)?;
    preserve(&session, &sparse, 3)?;
    preserve(&session, &unsealable, u64::MAX)?;
    // Linux before 6.3 does not know MFD_NOEXEC_SEAL.
    if let Ok(file) = not_executable {
        preserve(&session, file, 5)?;
    }
    // Writes and seeks after the file was preserved are handed over too.
    plain.write_all_at(b"S", 0)?;
    (&plain).seek(SeekFrom::Start(4))?;
    // Only sessions that are still open are handed over.
    drop(create(device()?, "closed")?);
    std::mem::forget(create(device()?, "empty")?);
    reboot(calls::MAGIC, calls::KEXEC)?;
    Err("reboot came back".into())
}

fn find() -> Case {
    let device = device()?;
    refused(retrieve_session(&device, "closed"), Errno::NOENT)?;
    finish(retrieve_session(&device, "empty")?)?;
    let session = retrieve_session(&device, "web")?;
    let file = |token| retrieve(&session, token).map(File::from);
    let plain = file(1)?;
    same(fcntl_getfl(&plain)? & OFlags::RWMODE, OFlags::RDWR)?;
    same(fcntl_getfd(&plain)?, FdFlags::CLOEXEC)?;
    same(contents(&plain)?, b" data".to_vec())?;
    (&plain).seek(SeekFrom::Start(0))?;
    same(contents(&file(1)?)?, b"Some data".to_vec())?;
    same(fcntl_get_seals(&plain)?, SealFlags::empty())?;
    ftruncate(&plain, 100)?;

    let sealed = file(2)?;
    same(fcntl_get_seals(&sealed)?, SealFlags::WRITE | SealFlags::SHRINK)?;
    same(contents(&sealed)?, b"sealed".to_vec())?;
    refused(rustix::io::pwrite(&sealed, b"x", 0), Errno::PERM)?;

    let sparse = file(3)?;
    same((&sparse).stream_position()?, FAR + 100)?;
    same(rustix::fs::fstat(&sparse)?.st_blocks <= 16, true)?;
    let (mut start, mut end) = ([0; 8], [0; 3]);
    sparse.read_exact_at(&mut start, 0)?;
    sparse.read_exact_at(&mut end, FAR)?;
    same((&start, &end), (b"start\0\0\0", b"end"))?;

    same(fcntl_get_seals(file(u64::MAX)?)?, SealFlags::SEAL)?;
    if let Ok(file) = file(5) {
        // The seals are unchanged. Linux 7.3 also seals the file against writing (case 151).
        same(fcntl_get_seals(&file)?, SealFlags::from_bits_retain(0x20))?;
        file.write_all_at(b"x", 0)?;
    }
    refused(file(4), Errno::NOENT)?;
    finish(&session)?;
    refused(file(1), Errno::NOENT)
}

/// Retrieves and finishes a file, and preserves it again, over two switches.
fn around() -> Case {
    let number = kernel_number();
    let device = device()?;
    let file = match number {
        0 => memfd(b"0")?,
        _ => {
            let incoming = retrieve_session(&device, "web")?;
            let file = File::from(retrieve(&incoming, 1)?);
            same(contents(&file)?, number.to_string().into_bytes())?;
            finish(&incoming)?;
            file
        }
    };
    if number == 1 {
        // A session that was never created.
        refused(retrieve_session(&device, "unfinished"), Errno::NOENT)?;
    }
    if number == 2 {
        return Ok(());
    }
    file.write_all_at((number + 1).to_string().as_bytes(), 0)?;
    (&file).seek(SeekFrom::Start(0))?;
    let session = create(&device, "web")?;
    preserve(&session, &file, 1)?;
    reboot(calls::MAGIC, calls::KEXEC)?;
    Err("reboot came back".into())
}

/// A session that is not retrieved is gone after the next switch.
fn unretrieved() -> Case {
    let device = device()?;
    match kernel_number() {
        0 => {
            let session = create(&device, "web")?;
            preserve(&session, memfd(b"data")?, 1)?;
            reboot(calls::MAGIC, calls::KEXEC)?;
        }
        1 => reboot(calls::MAGIC, calls::KEXEC)?,
        _ => return refused(retrieve_session(&device, "web"), Errno::NOENT),
    }
    Err("reboot came back".into())
}

pub(super) const CROSSING: &[Inside] = &[
    inside("files come back as they were", || match kernel_number() {
        0 => prepare(),
        _ => find(),
    }),
    inside("a file survives two switches", around),
    inside("a session that nobody retrieves is lost at the next switch", unretrieved),
];
