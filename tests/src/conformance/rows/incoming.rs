//! Incoming sessions: cases 123 to 137.

use luo::Errno;

use super::Class::{G, K, U};
use super::{Row, row};
use crate::conformance::profile::Deviation::SessionIsReturned;
use crate::conformance::system::Place::ReadOnly;
use crate::conformance::world::{refused, same};

pub(super) const ROWS: &[Row] = &[
    row(123, G, "a session is retrieved", |w| {
        let session = w.arrived(&[])?;
        same(w.closes_on_exec(session)?, true)
    }),
    row(124, G, "a session is retrieved once", |w| {
        w.arrived(&[])?;
        let device = w.open()?;
        refused(w.retrieve_session(device, b"web"), Errno::INVAL)?;
        let device = w.dup(device)?;
        refused(w.retrieve_session(device, b"web"), Errno::INVAL)
    }),
    row(125, G, "a closed session is gone", |w| {
        let session = w.arrived(&[])?;
        w.close(session)?;
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(126, G, "an unknown name is not found", |w| {
        w.session("web")?;
        w.switch()?;
        let device = w.open()?;
        for name in [&b"other"[..], b"", &[b'w'; 64]] {
            refused(w.retrieve_session(device, name), Errno::NOENT)?;
        }
        Ok(())
    }),
    row(127, U, "a session of this kernel is not incoming", |w| {
        let device = w.open()?;
        w.create(device, b"web")?;
        refused(w.retrieve_session(device, b"web"), Errno::NOENT)
    }),
    row(128, G, "an empty session crosses over", |w| {
        let session = w.arrived(&[])?;
        refused(w.retrieve(session, 0), Errno::NOENT)
    }),
    row(129, G, "a session can be retrieved later if there was no free fd", |w| {
        w.session("web")?;
        w.switch()?;
        let device = w.open()?;
        w.limit_fds(true)?;
        refused(w.retrieve_session(device, b"web"), Errno::MFILE)?;
        w.limit_fds(false)?;
        w.retrieve_session(device, b"web")?;
        Ok(())
    }),
    row(130, G, "a session whose fd cannot be returned is lost", |w| {
        w.session_with("web", &[(1, "data")])?;
        w.switch()?;
        let device = w.open()?;
        refused(w.retrieve_session_at(device, b"web", ReadOnly), Errno::FAULT)?;
        if !w.deviates(SessionIsReturned) {
            return refused(w.retrieve_session(device, b"web"), Errno::NOENT);
        }
        let session = w.retrieve_session(device, b"web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "data")
    }),
    row(131, G, "a session can be created under the name of an incoming one", |w| {
        w.arrived(&[])?;
        w.session("web")?;
        Ok(())
    }),
    row(132, G, "2000 sessions and 500 files cross over", |w| {
        let device = w.open()?;
        for index in 0..2000 {
            w.create(device, format!("session-{index}").as_bytes())?;
        }
        let session = w.create(device, b"files")?;
        for token in 0..500 {
            let file = w.memfd(&format!("file-{token}"))?;
            w.preserve(session, file, token)?;
        }
        w.close(device)?;
        w.switch()?;
        let device = w.open()?;
        for index in (0..2000).rev() {
            let name = format!("session-{index}");
            let session = w.retrieve_session(device, name.as_bytes())?;
            w.finish(session)?;
            w.close(session)?;
        }
        let session = w.retrieve_session(device, b"files")?;
        for token in (0..500).rev() {
            let file = w.retrieve(session, token)?;
            same(w.contents(file)?, format!("file-{token}"))?;
        }
        Ok(w.finish(session)?)
    }),
    row(133, G, "the device can be closed and opened before sessions are retrieved", |w| {
        w.session("web")?;
        w.switch()?;
        let device = w.open()?;
        w.close(device)?;
        w.incoming("web")?;
        Ok(())
    }),
    row(134, G, "sessions that are not retrieved are lost at the next switch", |w| {
        w.session_with("web", &[(1, "data")])?;
        w.switch()?;
        w.switch()?;
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(135, G, "sessions that are not finished are lost at the next switch", |w| {
        let session = w.arrived(&[(1, "data")])?;
        w.retrieve(session, 1)?;
        w.switch()?;
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(136, K, "a file of an unknown format closes the device for good", |w| {
        w.session_with("web", &[(1, "data")])?;
        w.session("empty")?;
        w.switch()?;
        // The first record of the block starts with its format. The new kernel has not read the
        // record yet.
        let changed = w.change_memory(16, "memfd-v2\0", "memfd-v9\0")?;
        same(changed > 0, true)?;
        refused(w.open(), Errno::IO)?;
        refused(w.open(), Errno::IO)?;
        w.switch()?;
        w.open()?;
        Ok(())
    })
    .alone(),
    row(137, K, "a handover of another version ends the next kernel", |w| {
        w.session_with("web", &[(1, "data")])?;
        // RAM has one such struct for every generation; all but this generation's are stale, so
        // all are changed.
        same(w.change_memory(0, "luo-v5\0\0", "luo-v9\0\0")? > 0, true)?;
        w.switch_to_death()
    })
    .alone(),
];
