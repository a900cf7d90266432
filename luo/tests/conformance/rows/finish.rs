//! FINISH, and closing an incoming session: cases 161 to 172.

use luo::Errno;

use super::Class::G;
use super::{Row, row};
use crate::system::Callback::{CanFinish, Finish};
use crate::system::Place::{ReadOnly, Writable};
use crate::world::{refused, same};

pub(super) const ROWS: &[Row] = &[
    row(161, G, "a finished session leaves its files to their holders", |w| {
        let session = w.arrived(&[(1, "one"), (2, "two")])?;
        let (one, two) = (w.retrieve(session, 1)?, w.retrieve(session, 2)?);
        w.finish(session)?;
        same(w.contents(one)?.as_str(), "one")?;
        same(w.contents(two)?.as_str(), "two")
    }),
    row(162, G, "a finished session discards what was not retrieved", |w| {
        let session = w.arrived(&[(1, "one"), (2, "two")])?;
        w.retrieve(session, 1)?;
        w.finish(session)?;
        refused(w.retrieve(session, 2), Errno::NOENT)
    }),
    row(163, G, "a session can be finished again", |w| {
        let session = w.arrived(&[(1, "one")])?;
        w.finish(session)?;
        Ok(w.finish(session)?)
    }),
    row(164, G, "FINISH refuses what is reserved", |w| {
        let session = w.arrived(&[(1, "one")])?;
        refused(w.finish_with(session, 1, Writable), Errno::INVAL)?;
        w.retrieve(session, 1)?;
        Ok(())
    }),
    row(165, G, "a file that cannot be finished keeps the session", |w| {
        w.scripted_session("web", &[1, 2, 3])?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.script()?.fail(CanFinish, 3, Errno::BUSY);
        refused(w.finish(session), Errno::BUSY)?;
        same(w.calls(&[Finish])?, vec![])?;
        w.script()?.mend(CanFinish, 3);
        Ok(w.finish(session)?)
    }),
    row(166, G, "closing finishes", |w| {
        let session = w.arrived(&[(1, "one"), (2, "two")])?;
        let file = w.retrieve(session, 1)?;
        w.close(session)?;
        same(w.contents(file)?.as_str(), "one")?;
        same(w.is_preserved(file)?, false)?;
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(167, G, "a killed process finishes its sessions", |w| {
        w.session_with("web", &[(1, "one")])?;
        w.switch()?;
        let other = w.system.spawn();
        let device = w.system.open_device(other, false)?;
        let session = w.retrieve_session(device, b"web")?;
        w.retrieve(session, 1)?;
        w.system.kill(other);
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(168, G, "who holds a copy can retrieve again after a crash", |w| {
        let session = w.arrived(&[(1, "one")])?;
        let worker = w.system.spawn();
        let letter = w.system.send(session)?;
        let theirs = w.system.receive(letter, Some(worker)).ok_or(Errno::BADF)?;
        let file = w.retrieve(theirs, 1)?;
        w.system.read(file, 1)?;
        w.system.kill(worker);
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "ne")
    }),
    row(169, G, "a finished session is not retrieved again", |w| {
        let session = w.arrived(&[(1, "one")])?;
        w.finish(session)?;
        refused(w.incoming("web"), Errno::INVAL)?;
        w.close(session)?;
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(170, G, "files are asked first first, and finished last first", |w| {
        w.scripted_session("web", &[1, 2, 3])?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.calls(&[])?;
        w.finish(session)?;
        let asked = [1, 2, 3].map(|object| (CanFinish, object));
        let finished = [3, 2, 1].map(|object| (Finish, object));
        same(w.calls(&[CanFinish, Finish])?, [&asked[..], &finished[..]].concat())
    }),
    row(171, G, "a session stays finished when nobody can be told", |w| {
        let session = w.arrived(&[(1, "one")])?;
        refused(w.finish_with(session, 0, ReadOnly), Errno::FAULT)?;
        refused(w.retrieve(session, 1), Errno::NOENT)
    }),
    row(172, G, "a session can be given to another process", |w| {
        let session = w.arrived(&[(1, "one")])?;
        let other = w.system.spawn();
        let letter = w.system.send(session)?;
        w.close(session)?;
        let session = w.system.receive(letter, Some(other)).ok_or(Errno::BADF)?;
        same(w.name(session)?, b"web".to_vec())?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "one")
    }),
];
