//! PRESERVE_FD: cases 60 to 85.

use luo::Errno;

use super::Class::{G, U};
use super::{Row, row};
use crate::system::Place::{ReadOnly, Writable};
use crate::world::{refused, same};

pub(super) const ROWS: &[Row] = &[
    row(60, U, "a memfd is preserved", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        same(w.is_preserved(file)?, true)
    }),
    row(61, U, "an empty memfd is preserved", |w| {
        let session = w.session("web")?;
        let file = w.memfd("")?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(62, U, "a token is any number", |w| {
        let session = w.session("web")?;
        for token in [0, 1 << 63, u64::MAX] {
            let file = w.memfd("data")?;
            w.preserve(session, file, token)?;
        }
        Ok(())
    }),
    row(63, U, "a token is not given twice, and the file stays free", |w| {
        let session = w.session_with("web", &[(1, "one")])?;
        let file = w.memfd("two")?;
        refused(w.preserve(session, file, 1), Errno::EXIST)?;
        same(w.is_preserved(file)?, false)
    }),
    row(64, U, "the token comes before the file", |w| {
        let session = w.session_with("web", &[(1, "one")])?;
        refused(w.preserve_at(session, -1, 1, Writable), Errno::EXIST)
    }),
    row(65, U, "a token belongs to its session", |w| {
        w.session_with("a", &[(1, "one")])?;
        w.session_with("b", &[(1, "two")])?;
        Ok(())
    }),
    row(66, U, "a file has to be open", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.close(file)?;
        for fd in [-1, file.number, i32::MAX] {
            refused(w.preserve_at(session, fd, 1, Writable), Errno::BADF)?;
        }
        Ok(())
    }),
    row(67, U, "a file opened with O_PATH is not open", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        let path = w.system.reopen_as_path(file)?;
        refused(w.preserve(session, path, 1), Errno::BADF)
    }),
    row(68, U, "a file that no handler takes", |w| {
        let session = w.session("web")?;
        let file = w.system.unsupported(w.me)?;
        refused(w.preserve(session, file, 1), Errno::NOENT)
    }),
    row(69, U, "sessions and the device are not preserved", |w| {
        let device = w.open()?;
        let session = w.create(device, b"web")?;
        let other = w.create(device, b"other")?;
        for file in [session, other, device] {
            refused(w.preserve(session, file, 1), Errno::NOENT)?;
        }
        Ok(())
    }),
    row(73, U, "a memfd is preserved once, however it was opened", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        let (copy, again) = (w.dup(file)?, w.system.reopen(file)?);
        for file in [file, copy, again] {
            refused(w.preserve(session, file, 2), Errno::BUSY)?;
            same(w.is_preserved(file)?, true)?;
        }
        let other = w.system.spawn();
        let letter = w.system.send(file)?;
        let theirs = w.system.receive(letter, Some(other)).ok_or(Errno::BADF)?;
        same(w.is_preserved(theirs)?, true)
    }),
    row(74, U, "a file that is busy does not take the token", |w| {
        let session = w.session("web")?;
        let (file, other) = (w.memfd("data")?, w.memfd("other")?);
        w.preserve(session, file, 1)?;
        refused(w.preserve(session, file, 2), Errno::BUSY)?;
        Ok(w.preserve(session, other, 2)?)
    }),
    row(75, U, "a file that no handler takes does not take the token", |w| {
        let session = w.session("web")?;
        let (none, file) = (w.system.unsupported(w.me)?, w.memfd("data")?);
        refused(w.preserve(session, none, 1), Errno::NOENT)?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(76, U, "a preserved file can be closed", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        w.close(file)?;
        Ok(w.close(session)?)
    }),
    row(78, U, "a file can be preserved again in another session", |w| {
        let session = w.session("a")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        w.close(session)?;
        let session = w.session("b")?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(79, U, "500 files in a session", |w| {
        let session = w.session("web")?;
        for token in 0..500 {
            let file = w.memfd("")?;
            w.preserve(session, file, token)?;
        }
        Ok(w.close(session)?)
    }),
    row(80, G, "nothing is preserved in an incoming session", |w| {
        let session = w.arrived(&[])?;
        let file = w.memfd("data")?;
        refused(w.preserve(session, file, 1), Errno::INVAL)?;
        refused(w.preserve_at(session, -1, 1, Writable), Errno::INVAL)
    }),
    row(81, U, "a file stays preserved when nobody can be told", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        refused(w.preserve_at(session, file.number, 1, ReadOnly), Errno::FAULT)?;
        refused(w.preserve(session, file, 1), Errno::EXIST)?;
        same(w.is_preserved(file)?, true)
    }),
    row(83, U, "a file is looked up in the process that asks", |w| {
        let session = w.session("web")?;
        let other = w.system.spawn();
        let letter = w.system.send(session)?;
        let session = w.system.receive(letter, Some(other)).ok_or(Errno::BADF)?;
        let file = w.system.memfd(other, b"data")?;
        w.preserve(session, file, 1)?;
        same(w.is_preserved(file)?, true)
    }),
    row(84, U, "nothing is retrieved from an outgoing session", |w| {
        let session = w.session_with("web", &[(1, "data")])?;
        refused(w.retrieve(session, 1), Errno::INVAL)
    }),
    row(85, U, "an outgoing session is not finished", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        refused(w.finish(session), Errno::INVAL)?;
        same(w.is_preserved(file)?, true)
    }),
];
