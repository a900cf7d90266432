//! Closing an outgoing session: cases 101 to 107.

use luo::Errno;

use super::Class::U;
use super::{Row, row};
use crate::conformance::profile::Need;
use crate::conformance::system::{Call, Fd};
use crate::conformance::world::{World, refused, same};

/// A session and a file that is preserved in it.
fn session_and_file(w: &mut World) -> Result<(Fd, Fd), Errno> {
    let session = w.session("web")?;
    let file = w.memfd("data")?;
    w.preserve(session, file, 1)?;
    Ok((session, file))
}

pub(super) const ROWS: &[Row] = &[
    row(101, U, "files outlive the session they were preserved in", |w| {
        let session = w.session("web")?;
        let mut files = Vec::new();
        for token in 0..3 {
            let file = w.memfd("data")?;
            w.preserve(session, file, token)?;
            files.push(file);
        }
        w.close(session)?;
        for file in files {
            same(w.contents(file)?.as_str(), "data")?;
            same(w.is_preserved(file)?, false)?;
        }
        Ok(())
    }),
    row(102, U, "a copy of its fd keeps a session", |w| {
        let (session, file) = session_and_file(w)?;
        let copy = w.dup(session)?;
        w.close(session)?;
        same(w.is_preserved(file)?, true)?;
        w.close(copy)?;
        same(w.is_preserved(file)?, false)
    }),
    row(103, U, "a child keeps a session", |w| {
        let (session, file) = session_and_file(w)?;
        let child = w.fork(w.me);
        w.close(session)?;
        same(w.is_preserved(file)?, true)?;
        w.kill(child);
        same(w.is_preserved(file)?, false)
    }),
    row(104, U, "a session in a message that was not received stays open", |w| {
        let (session, file) = session_and_file(w)?;
        let letter = w.send(session)?;
        w.close(session)?;
        same(w.is_preserved(file)?, true)?;
        w.lose(letter);
        same(w.is_preserved(file)?, false)
    }),
    row(105, U, "a killed process loses its sessions", |w| {
        let child = w.spawn();
        let device = w.open_in(child, false)?;
        w.create(device, b"web")?;
        w.kill(child);
        w.session("web")?;
        Ok(())
    }),
    row(106, U, "exec closes sessions", |w| {
        let session = w.session("web")?;
        w.call(Call::Exec)?;
        refused(w.name(session), Errno::BADF)?;
        w.session("web")?;
        Ok(())
    })
    .needing(&[Need::Processes]),
    row(107, U, "a session is closed once", |w| {
        let session = w.session("web")?;
        w.close(session)?;
        refused(w.close(session), Errno::BADF)
    }),
];
