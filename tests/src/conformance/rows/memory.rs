//! Memfds after the switch: cases 147 to 152, 154 to 157 and 160.

use luo::Errno;

use super::Class::{G, K};
use super::{Row, row};
use crate::conformance::file::{FileCall, What};
use crate::conformance::profile::{Deviation, Need};
use crate::conformance::system::Call;
use crate::conformance::world::{refused, same};

/// `F_SEAL_*` (include/uapi/linux/fcntl.h).
const SEAL: u32 = 1;
const SHRINK: u32 = 2;
const GROW: u32 = 4;
const WRITE: u32 = 8;
const FUTURE_WRITE: u32 = 16;
const EXEC: u32 = 32;

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;

pub(super) const ROWS: &[Row] = &[
    row(147, G, "a retrieved memfd is frozen no more", |w| {
        let file = w.memfd("data")?;
        let file = w.carried(file)?;
        w.on(file, FileCall::Truncate(3 * PAGE))?;
        w.on(file, FileCall::Allocate(0, 0, 4 * PAGE))?;
        w.on(file, FileCall::AddSeals(GROW))?;
        same(w.on(file, FileCall::Seals)?, GROW.into())?;
        same(w.contents(file)?.starts_with("data"), true)
    })
    .needing(&[Need::Files]),
    row(148, G, "seals go over", |w| {
        let file = w.memfd("data")?;
        w.on(file, FileCall::AddSeals(SHRINK | GROW | SEAL))?;
        let file = w.carried(file)?;
        same(w.on(file, FileCall::Seals)?, (SHRINK | GROW | SEAL).into())
    })
    .needing(&[Need::Files]),
    row(149, G, "a memfd that cannot be sealed still cannot", |w| {
        let file = w.file(What::UnsealableMemfd)?;
        let file = w.carried(file)?;
        same(w.on(file, FileCall::Seals)?, SEAL.into())
    })
    .needing(&[Need::Files]),
    row(150, G, "a memfd that is sealed against writing", |w| {
        let file = w.memfd("data")?;
        w.on(file, FileCall::AddSeals(WRITE))?;
        let file = w.carried(file)?;
        same(w.contents(file)?.as_str(), "data")?;
        refused(w.write_at(file, 0, "x"), Errno::PERM)
    })
    .needing(&[Need::Files]),
    row(151, K, "a memfd that is sealed against execution can be written no more", |w| {
        let file = w.file(What::NoexecMemfd)?;
        w.write_at(file, 0, "data")?;
        let file = w.carried(file)?;
        same(w.contents(file)?.as_str(), "data")?;
        let seals = EXEC | SHRINK | GROW | WRITE | FUTURE_WRITE;
        same(w.on(file, FileCall::Seals)?, seals.into())?;
        same(w.on(file, FileCall::Mode)?, 0o777)?;
        refused(w.write_at(file, 0, "x"), Errno::PERM)?;
        refused(w.on(file, FileCall::Store(0, 0)), Errno::PERM)
    }),
    row(152, G, "a memfd's name", |w| {
        let file = w.memfd("data")?;
        let file = w.carried(file)?;
        let link = w.bytes_of(file, FileCall::Link)?;
        if w.deviates(Deviation::NameStays) {
            return same(link.starts_with(b"/memfd:"), true);
        }
        same(link.as_slice(), b"/ (deleted)")
    })
    .needing(&[Need::Files]),
    row(154, K, "a sparse memfd comes back full", |w| {
        const BYTES: u64 = 1 << 20;
        let file = w.memfd("data")?;
        w.on(file, FileCall::Truncate(BYTES))?;
        let file = w.carried(file)?;
        same(w.on(file, FileCall::Blocks)?, (BYTES / 512) as i64)?;
        same(w.bytes_of(file, FileCall::ReadAt(BYTES - 4, 8))?, vec![0; 4])?;
        same(w.contents(file)?.starts_with("data\0"), true)
    }),
    row(155, K, "huge pages stay huge", |w| {
        let file = w.file(What::Memfd)?;
        w.on(file, FileCall::Truncate(2 * HUGE_PAGE))?;
        let all = (2 * HUGE_PAGE / 1024) as i64;
        let map = || FileCall::HugeKib(2 * HUGE_PAGE as usize);
        same(w.on(file, map())?, all)?;
        let file = w.carried(file)?;
        same(w.on(file, map())?, all)
    }),
    row(156, K, "mode and owner are those of a new file", |w| {
        let file = w.file(What::NamelessTmpfs)?;
        same(w.on(file, FileCall::Mode)?, 0o600)?;
        w.session_of(file)?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.call(Call::BecomeUser(1000))?;
        let file = w.retrieve(session, 1)?;
        same(w.on(file, FileCall::Mode)?, 0o777)?;
        same(w.on(file, FileCall::Owner)?, 1000)
    }),
    row(157, K, "memory is charged to who retrieves it", |w| {
        const BYTES: u64 = 16 << 20;
        let file = w.memfd("data")?;
        w.on(file, FileCall::Truncate(BYTES))?;
        w.session_of(file)?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.call(Call::EnterCgroup)?;
        let before = w.call(Call::ChargedBytes)?.number;
        w.retrieve(session, 1)?;
        let charged = w.call(Call::ChargedBytes)?.number - before;
        // Rounded to MiB: the process may have allocated or freed other pages meanwhile.
        same((charged + (1 << 19)) >> 20, (BYTES >> 20) as i64)
    }),
    row(160, G, "a retrieved memfd that everyone closed is gone when it is finished", |w| {
        let file = w.memfd("data")?;
        w.session_of(file)?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        let watch = w.on(file, FileCall::Watch)? as i32;
        w.close(file)?;
        let watch = crate::conformance::system::Fd { number: watch, ..file };
        w.finish(session)?;
        Ok(w.on(watch, FileCall::Gone).map(drop)?)
    })
    .needing(&[Need::Files]),
];
