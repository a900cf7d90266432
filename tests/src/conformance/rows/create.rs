//! CREATE_SESSION: cases 39 to 54.

use luo::Errno;
use luo::uapi::CREATE_SESSION;

use super::Class::{G, U};
use super::{Row, row};
use crate::conformance::file::FileCall;
use crate::conformance::profile::Deviation::{RefusedNameEndsNextKernel, SessionIsSocket};
use crate::conformance::profile::Need;
use crate::conformance::system::Place::{ReadOnly, Writable};
use crate::conformance::world::{named, refused, same};

pub(super) const ROWS: &[Row] = &[
    row(39, U, "a session's fd closes on exec", |w| {
        let session = w.session("a")?;
        same(w.closes_on_exec(session)?, true)
    }),
    row(40, U, "a name is not empty", |w| refused(w.session(""), Errno::INVAL)),
    row(41, U, "a name has up to 63 bytes", |w| {
        let name = "x".repeat(63);
        let session = w.session(&name)?;
        same(w.name(session)?, name.into_bytes())
    }),
    row(42, U, "a name of 64 bytes is refused", |w| {
        refused(w.session(&"X".repeat(64)), Errno::INVAL)
    }),
    row(43, U, "a name is any bytes", |w| {
        let device = w.open()?;
        for name in [&b"/"[..], b"a\nb", b"\xff\xfe", b" a ", b"\x01"] {
            let session = w.create(device, name)?;
            same(w.name(session)?, name.to_vec())?;
        }
        Ok(())
    }),
    row(44, U, "what follows the NUL does not matter", |w| {
        let device = w.open()?;
        w.create(device, b"web\0junk")?;
        refused(w.create(device, b"web"), Errno::EXIST)?;
        refused(w.create(device, b"web\0other junk"), Errno::EXIST)
    }),
    row(45, U, "a name is not given twice, and the first keeps it", |w| {
        let session = w.session("web")?;
        refused(w.session("web"), Errno::EXIST)?;
        let file = w.memfd("data")?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(46, U, "a closed session's name is free", |w| {
        let session = w.session("web")?;
        w.close(session)?;
        w.session("web")?;
        Ok(())
    }),
    row(47, U, "names differ in any byte", |w| {
        w.session("web")?;
        w.session("Web")?;
        w.session(&format!("{}a", "x".repeat(62)))?;
        w.session(&format!("{}b", "x".repeat(62)))?;
        Ok(())
    }),
    row(48, U, "a session needs an fd", |w| {
        let device = w.open()?;
        w.limit_fds(true)?;
        refused(w.create(device, b"web"), Errno::MFILE)?;
        w.limit_fds(false)?;
        w.create(device, b"web")?;
        Ok(())
    }),
    row(49, U, "the fd comes before the name", |w| {
        let device = w.open()?;
        w.limit_fds(true)?;
        refused(w.create(device, b""), Errno::MFILE)
    }),
    row(50, U, "a session whose fd cannot be returned does not exist", |w| {
        let device = w.open()?;
        refused(w.create_at(device, b"web", ReadOnly), Errno::FAULT)?;
        w.create(device, b"web")?;
        Ok(())
    }),
    row(51, U, "2000 sessions", |w| {
        let device = w.open()?;
        let mut sessions = Vec::new();
        for index in 0..2000 {
            sessions.push(w.create(device, format!("session-{index}").as_bytes())?);
        }
        for session in sessions {
            w.close(session)?;
        }
        Ok(())
    }),
    row(52, U, "52 sessions, closed in any order, twice", |w| {
        let device = w.open()?;
        for _ in 0..2 {
            let mut sessions = Vec::new();
            for index in 0..52 {
                sessions.push(w.create(device, format!("session-{index}").as_bytes())?);
            }
            // 25 and 52 have no common factor, so every session is closed once.
            for index in 0..52 {
                w.close(sessions[index * 25 % 52])?;
            }
        }
        Ok(())
    }),
    row(53, G, "51 sessions and a name that is taken cross over", |w| {
        let device = w.open()?;
        for index in 0..51 {
            w.create(device, format!("session-{index}").as_bytes())?;
        }
        let again = w.ioctl(device, CREATE_SESSION, named(72, b"session-0"), Writable);
        refused(again, Errno::EXIST)?;
        if w.deviates(RefusedNameEndsNextKernel) {
            return w.switch_to_death();
        }
        w.switch()?;
        let device = w.open()?;
        for index in 0..51 {
            w.retrieve_session(device, format!("session-{index}").as_bytes())?;
        }
        Ok(())
    })
    .alone(),
    row(54, U, "what `/proc` says of a session's fd", |w| {
        let session = w.session("web")?;
        let link = w.bytes_of(session, FileCall::Link)?;
        let name = [b"anon_inode:[luo_session] ", &w.full_name(b"web")[..]].concat();
        if w.deviates(SessionIsSocket) {
            return same(link.starts_with(b"socket:["), true);
        }
        same(link, name)
    })
    .needing(&[Need::Processes]),
];
