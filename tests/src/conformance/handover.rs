//! Reads a handover tree that Linux wrote with this project's decoder, and compares its contents.
//!
//! `struct luo_ser` and all that it points to are in the machine's RAM from the time when the old
//! kernel has written them until the new kernel has read them. No interface inside the machine shows
//! them, so the harness reads them from the file that is the machine's RAM.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use luo::builtin::tree::memory::{Memory, PAGE_BYTES, Page, SimulatedMemory};
use luo::builtin::tree::v5::{self, memfd};
use luo::builtin::tree::{FileRecord, Handover};

use super::machine::{Ram, Shared, Turn};
use super::world::World;
use crate::binaries;
use crate::host::Failure;
use crate::mutex::lock;
use crate::paths;

/// The start of `struct luo_ser`, and offsets of its fields.
const COMPATIBLE: &[u8] = b"luo-v5\0\0";
const NUMBER: u64 = 8;
const SESSIONS: u64 = 16;

/// Longest time for the old kernel to write the tree.
const WITHIN: Duration = Duration::from_secs(60);

/// A handover, as read from the machine's RAM.
struct Dump {
    ser: [u8; v5::SER_BYTES],
    pages: SimulatedMemory,
    handover: Handover,
    /// The contents of the file under each token of the first session.
    contents: Vec<(u64, Vec<u8>)>,
}

/// Makes the machine switch with two sessions, reads the handover tree meanwhile, and errors unless the
/// tree has these sessions. Leaves the tree in the build output.
pub(crate) fn check(guest: &Shared) -> Result<(), Failure> {
    let found: Rc<RefCell<Option<Result<Dump, Failure>>>> = Rc::default();
    let ram = lock(guest).ram()?;
    let number = lock(guest).liveupdate_number() + 1;
    let unwritten = unwritten(&ram, number)?;
    let writes = Rc::clone(&found);
    let turn = Turn::new(guest).looking(move || {
        *writes.borrow_mut() = Some(wait_for(&ram, &unwritten));
    });
    let mut world = World::new(Box::new(turn));
    let file = "a file of Linux".to_owned();
    world.session_with("web", &[(1, &file), (u64::MAX, "")])?;
    world.session("empty")?;
    world.switch()?;
    world.incoming("web")?;
    let dump = found.take().ok_or("nobody looked")??;
    compare(&dump, number, file.as_bytes())?;
    show(&dump)
}

/// Addresses at which the running kernel may write the handover: every `struct luo_ser` with this
/// number and without sessions so far.
fn unwritten(ram: &Ram, number: u64) -> Result<Vec<u64>, Failure> {
    let mut places = ram.find(0, COMPATIBLE)?;
    let mut fields = Vec::new();
    for place in &places {
        fields.push((u64_at(ram, place + NUMBER)?, u64_at(ram, place + SESSIONS)?));
    }
    let mut fields = fields.into_iter();
    places.retain(|_| fields.next() == Some((number, 0)));
    if places.is_empty() {
        return Err(format!("no page of RAM has a `struct luo_ser` with number {number}").into());
    }
    Ok(places)
}

fn u64_at(ram: &Ram, address: u64) -> Result<u64, Failure> {
    Ok(u64::from_le_bytes(ram.read(address)?))
}

/// Waits until the handover is written, and reads it. No event reports the write, so this polls; the
/// handover stays as long as the next kernel takes to start.
fn wait_for(ram: &Ram, places: &[u64]) -> Result<Dump, Failure> {
    let deadline = Instant::now() + WITHIN;
    while Instant::now() < deadline {
        for place in places {
            if u64_at(ram, place + SESSIONS)? != 0 {
                return dump(ram, *place);
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err("the kernel wrote no handover".into())
}

/// Memory that records the last page that was read and is not present.
struct Noting<'a> {
    pages: &'a SimulatedMemory,
    missing: RefCell<Option<u64>>,
}

impl Memory for Noting<'_> {
    fn page(&self, address: u64) -> Option<&Page> {
        let page = self.pages.page(address);
        if page.is_none() {
            self.missing.replace(Some(address));
        }
        page
    }
}

/// Runs `read` until it has every page that it needs: each missing page is read from RAM into `pages`.
fn with_pages<T, E: std::error::Error + 'static>(
    ram: &Ram,
    pages: &mut SimulatedMemory,
    read: impl Fn(&Noting<'_>) -> Result<T, E>,
) -> Result<T, Failure> {
    loop {
        let noting = Noting { pages, missing: RefCell::new(None) };
        let result = read(&noting);
        let missing = noting.missing.into_inner();
        match (result, missing) {
            (Ok(read), _) => return Ok(read),
            (Err(error), None) => return Err(error.into()),
            (Err(_), Some(address)) => {
                let page = ram.read::<PAGE_BYTES>(address)?;
                pages.insert(address, page);
            }
        }
    }
}

fn dump(ram: &Ram, place: u64) -> Result<Dump, Failure> {
    let ser = ram.read(place)?;
    let mut pages = SimulatedMemory::new();
    let handover = with_pages(ram, &mut pages, |memory| v5::decode(&ser, memory))?;
    let first = handover.sessions.first().ok_or("the handover has no session")?;
    let mut contents = Vec::new();
    for FileRecord { data, token, .. } in &first.files {
        let file = with_pages(ram, &mut pages, |memory| memfd::decode(*data, memory))?;
        let mut bytes = Vec::new();
        for folio in &file.folios {
            bytes.extend(ram.read::<PAGE_BYTES>(folio.frame * PAGE_BYTES as u64)?);
        }
        bytes.truncate(usize::try_from(file.size)?);
        contents.push((token.0, bytes));
    }
    Ok(Dump { ser, pages, handover, contents })
}

fn compare(dump: &Dump, number: u64, file: &[u8]) -> Result<(), Failure> {
    let Dump { handover, contents, .. } = dump;
    let names: Vec<_> =
        handover.sessions.iter().map(|s| (s.name.as_bytes(), s.files.len())).collect();
    let expected: [(&[u8], usize); 2] = [(b"web", 2), (b"empty", 0)];
    let files = vec![(1, file.to_vec()), (u64::MAX, Vec::new())];
    let formats = handover.sessions.iter().flat_map(|session| &session.files);
    let is_memfd = |file: &FileRecord| file.compatible.as_bytes() == memfd::COMPATIBLE.as_bytes();
    if handover.number != number || names != expected || *contents != files {
        let expected = format!("number {number}, sessions {expected:?}");
        return Err(format!("found {handover:?} with {contents:?}, not {expected}").into());
    }
    if !formats.clone().all(is_memfd) {
        return Err(format!("{handover:?} has files that are no memfds").into());
    }
    Ok(())
}

/// Errors unless `perennial luo show` prints the tree as expected.
fn show(dump: &Dump) -> Result<(), Failure> {
    let directory = paths::results("conformance")?;
    let (ser, pages) = (directory.join("luo-v5.ser"), directory.join("luo-v5.pages"));
    fs::write(&ser, dump.ser)?;
    fs::write(&pages, rows(&dump.pages))?;
    let output = printed(binaries::with_tools()?, &ser, &pages)?;
    let expected = dump.handover.to_string();
    if output != expected {
        return Err(format!("`luo show` printed:\n{output}expected:\n{expected}").into());
    }
    Ok(())
}

fn printed(perennial: &Path, ser: &Path, pages: &Path) -> Result<String, Failure> {
    let output = Command::new(perennial)
        .args(["luo", "show"])
        .arg(ser)
        .arg("--pages")
        .arg(pages)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Pages in the format of `luo show --pages`: each page after its address.
fn rows(pages: &SimulatedMemory) -> Vec<u8> {
    let rows = pages.pages();
    rows.flat_map(|(address, page)| address.to_le_bytes().into_iter().chain(*page)).collect()
}
