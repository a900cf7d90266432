//! PRESERVE_FD: cases 60 to 85.

use luo::Errno;

use super::Class::{G, U};
use super::{Row, row};
use crate::conformance::file::{FileCall, What};
use crate::conformance::profile::{Deviation, Need};
use crate::conformance::system::Place::{ReadOnly, Writable};
use crate::conformance::system::Reopen;
use crate::conformance::world::{refused, same};

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
        let path = w.reopen(file, Reopen::Path)?;
        refused(w.preserve(session, path, 1), Errno::BADF)
    }),
    row(68, U, "a file that no handler takes", |w| {
        let session = w.session("web")?;
        let file = w.file(What::Null)?;
        refused(w.preserve(session, file, 1), Errno::NOENT)?;
        if !w.has(Need::Files) {
            return Ok(());
        }
        use What::{Directory, Epoll, Eventfd, Pipe, Socket, Timerfd};
        for what in [Pipe, Socket, Eventfd, Timerfd, Epoll, Directory] {
            let file = w.file(what)?;
            refused(w.preserve(session, file, 1), Errno::NOENT)?;
        }
        let file = w.file(What::DiskFile)?;
        let answer = w.preserve(session, file, 1);
        if w.deviates(Deviation::RegularFiles) {
            return Ok(answer?);
        }
        refused(answer, Errno::NOENT)
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
    row(70, U, "memory of huge pages is not preserved", |w| {
        let session = w.session("web")?;
        let takes_all = w.deviates(Deviation::RegularFiles);
        // A kernel without huge pages has no such file, so nothing is tested.
        let Ok(file) = w.file(What::HugeMemfd) else { return Ok(()) };
        match w.preserve(session, file, 1) {
            Ok(()) if takes_all => Ok(()),
            answer => refused(answer, Errno::NOENT),
        }
    })
    .needing(&[Need::Files]),
    row(71, U, "neither secret memory nor a virtual machine is preserved", |w| {
        let session = w.session("web")?;
        let takes_all = w.deviates(Deviation::RegularFiles);
        if let Ok(file) = w.file(What::Vm) {
            refused(w.preserve(session, file, 1), Errno::NOENT)?;
        }
        let Ok(file) = w.file(What::Secret) else { return Ok(()) };
        match w.preserve(session, file, 1) {
            Ok(()) if takes_all => Ok(()),
            answer => refused(answer, Errno::NOENT),
        }
    })
    .needing(&[Need::Files]),
    row(72, U, "a file of tmpfs is preserved when it has no name", |w| {
        let session = w.session("web")?;
        let file = w.file(What::Tmpfs)?;
        let with_name = w.preserve(session, file, 1);
        w.on(file, FileCall::Unlink)?;
        if w.deviates(Deviation::RegularFiles) {
            with_name?;
        } else {
            refused(with_name, Errno::NOENT)?;
            w.preserve(session, file, 1)?;
        }
        let file = w.file(What::NamelessTmpfs)?;
        Ok(w.preserve(session, file, 2)?)
    })
    .needing(&[Need::Files]),
    row(73, U, "a memfd is preserved once, however it was opened", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        w.preserve(session, file, 1)?;
        let (copy, again) = (w.dup(file)?, w.reopen(file, Reopen::ReadWrite)?);
        for file in [file, copy, again] {
            refused(w.preserve(session, file, 2), Errno::BUSY)?;
            same(w.is_preserved(file)?, true)?;
        }
        let other = w.spawn();
        let letter = w.send(file)?;
        let theirs = w.receive(letter, other)?;
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
        let (none, file) = (w.file(What::Null)?, w.memfd("data")?);
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
    row(77, U, "an fd for reading will do", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        let reader = w.reopen(file, Reopen::ReadOnly)?;
        w.preserve(session, reader, 1)?;
        refused(w.preserve(session, file, 2), Errno::BUSY)
    })
    .needing(&[Need::Files]),
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
    row(81, U, "a file stays preserved if the answer cannot be written", |w| {
        let session = w.session("web")?;
        let file = w.memfd("data")?;
        refused(w.preserve_at(session, file.number, 1, ReadOnly), Errno::FAULT)?;
        refused(w.preserve(session, file, 1), Errno::EXIST)?;
        same(w.is_preserved(file)?, true)
    }),
    row(83, U, "a file is looked up in the process that asks", |w| {
        let session = w.session("web")?;
        let other = w.spawn();
        let letter = w.send(session)?;
        let session = w.receive(letter, other)?;
        let file = w.memfd_in(other, "data")?;
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
