//! Operations on a preserved memfd: cases 86 to 100.

use luo::Errno;

use super::Class::{K, U};
use super::{Row, row};
use crate::conformance::file::{FileCall, What};
use crate::conformance::profile::{Deviation, Need};
use crate::conformance::system::Fd;
use crate::conformance::world::{World, refused, same};

/// Modes of fallocate(2) (include/uapi/linux/falloc.h).
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;

/// `F_SEAL_*` (include/uapi/linux/fcntl.h).
const SEAL_GROW: u32 = 4;
const SEAL_WRITE: u32 = 8;

const PAGE: u64 = 4096;

/// Preserves a memfd of `bytes` bytes, and returns it and its session.
fn preserved(w: &mut World, bytes: u64) -> Result<(Fd, Fd), Errno> {
    let file = w.file(What::Memfd)?;
    w.on(file, FileCall::Truncate(bytes))?;
    let session = w.session_of(file)?;
    Ok((file, session))
}

pub(super) const ROWS: &[Row] = &[
    row(86, U, "a preserved memfd is read, written and mapped", |w| {
        let (file, _) = preserved(w, 2 * PAGE)?;
        w.write_at(file, PAGE - 2, "four")?;
        w.on(file, FileCall::Store(PAGE, b'l'))?;
        same(w.bytes_of(file, FileCall::ReadAt(PAGE - 2, 4))?.as_slice(), b"folr")
    })
    .needing(&[Need::Files]),
    row(87, K, "its size is not changed", |w| {
        let (file, _) = preserved(w, PAGE)?;
        for size in [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE] {
            refused(w.on(file, FileCall::Truncate(size)), Errno::PERM)?;
        }
        Ok(())
    }),
    row(88, K, "its size can be set to what it is", |w| {
        let (file, _) = preserved(w, PAGE)?;
        Ok(w.on(file, FileCall::Truncate(PAGE)).map(drop)?)
    }),
    row(89, K, "nothing is written at its end", |w| {
        let (file, _) = preserved(w, PAGE)?;
        refused(w.on(file, FileCall::WriteAt(PAGE, vec![1])), Errno::PERM)
    }),
    row(90, K, "a write over its end writes nothing, as folios are huge", |w| {
        let (file, _) = preserved(w, 2 * PAGE)?;
        refused(w.on(file, FileCall::WriteAt(PAGE, vec![1; 2 * PAGE as usize])), Errno::PERM)
    }),
    row(91, K, "nothing of it is allocated or punched", |w| {
        let (file, _) = preserved(w, 4 * PAGE)?;
        for mode in [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE] {
            refused(w.on(file, FileCall::Allocate(mode, PAGE, PAGE)), Errno::PERM)?;
        }
        Ok(())
    }),
    row(92, K, "what shared memory cannot do is answered as ever", |w| {
        let (file, _) = preserved(w, 4 * PAGE)?;
        refused(w.on(file, FileCall::Allocate(ZERO_RANGE, PAGE, PAGE)), Errno::OPNOTSUPP)
    }),
    row(93, K, "none of its pages is removed", |w| {
        let (file, _) = preserved(w, 4 * PAGE)?;
        refused(w.on(file, FileCall::Remove(PAGE as usize)), Errno::PERM)
    }),
    row(94, K, "it can be sealed against growing", |w| {
        let (file, _) = preserved(w, PAGE)?;
        w.on(file, FileCall::AddSeals(SEAL_GROW))?;
        same(w.on(file, FileCall::Seals)?, SEAL_GROW.into())
    }),
    row(95, K, "it cannot be sealed against writing", |w| {
        let (file, _) = preserved(w, PAGE)?;
        refused(w.on(file, FileCall::AddSeals(SEAL_WRITE)), Errno::BUSY)
    }),
    row(96, K, "its holes are filled, and stay filled", |w| {
        const BYTES: u64 = 32 << 20;
        let file = w.file(What::Memfd)?;
        w.on(file, FileCall::Truncate(BYTES))?;
        same(w.on(file, FileCall::Blocks)?, 0)?;
        let session = w.session_of(file)?;
        let full = (BYTES / 512) as i64;
        same(w.on(file, FileCall::Blocks)?, full)?;
        same(w.on(file, FileCall::SeekHole)?, BYTES as i64)?;
        w.close(session)?;
        same(w.on(file, FileCall::Blocks)?, full)
    }),
    row(97, U, "it is free again when its session is closed", |w| {
        let (file, session) = preserved(w, PAGE)?;
        w.close(session)?;
        w.on(file, FileCall::Truncate(3 * PAGE))?;
        w.on(file, FileCall::Allocate(KEEP_SIZE | PUNCH_HOLE, 0, PAGE))?;
        same(w.on(file, FileCall::Size)?, 3 * PAGE as i64)
    })
    .needing(&[Need::Files]),
    row(98, K, "it is free again when it could not be preserved", |w| {
        let session = w.session("web")?;
        let file = w.file(What::Memfd)?;
        // Its number of pages exceeds 32 bits. Linux checks that after it has frozen the file.
        w.on(file, FileCall::Truncate(PAGE << 32))?;
        refused(w.preserve(session, file, 1), Errno::FBIG)?;
        w.on(file, FileCall::Truncate(PAGE))?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(99, K, "what lies behind its end does not go over", |w| {
        let file = w.memfd("data")?;
        w.on(file, FileCall::Allocate(KEEP_SIZE, 0, 64 * PAGE))?;
        same(w.on(file, FileCall::Blocks)?, (64 * PAGE / 512) as i64)?;
        let file = w.carried(file)?;
        same(w.on(file, FileCall::Blocks)?, (PAGE / 512) as i64)?;
        same(w.contents(file)?.as_str(), "data")
    }),
    row(100, U, "another size calls the switch off", |w| {
        let (file, session) = preserved(w, PAGE)?;
        let resized = w.on(file, FileCall::Truncate(3));
        if w.deviates(Deviation::SizeIsFrozen) {
            return refused(resized, Errno::PERM);
        }
        resized?;
        refused(w.switch(), Errno::INVAL)?;
        refused(w.preserve(session, file, 2), Errno::BUSY)?;
        w.close(session)?;
        w.session_of(file)?;
        Ok(())
    })
    .needing(&[Need::Files])
    .alone(),
];
