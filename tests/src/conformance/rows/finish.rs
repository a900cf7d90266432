//! FINISH, and closing an incoming session: cases 161 to 172.

use luo::Errno;

use super::Class::G;
use super::{Row, row};
use crate::conformance::profile::Need;
use crate::conformance::system::Callback::{CanFinish, Finish};
use crate::conformance::system::Place::{ReadOnly, Writable};
use crate::conformance::world::{refused, same};

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
        w.scripted_session("web", &[51, 52, 53])?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.calls(&[])?;
        w.fail(CanFinish, 53, Errno::BUSY)?;
        refused(w.finish(session), Errno::BUSY)?;
        same(w.calls(&[Finish])?, vec![])?;
        w.mend(CanFinish, 53)?;
        Ok(w.finish(session)?)
    })
    .needing(&[Need::Script]),
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
        let other = w.spawn();
        let device = w.open_in(other, false)?;
        let session = w.retrieve_session(device, b"web")?;
        w.retrieve(session, 1)?;
        w.kill(other);
        refused(w.incoming("web"), Errno::NOENT)
    }),
    row(168, G, "a copy of the fd allows retrieving again after a crash", |w| {
        let session = w.arrived(&[(1, "one")])?;
        let worker = w.spawn();
        let letter = w.send(session)?;
        let theirs = w.receive(letter, worker)?;
        let file = w.retrieve(theirs, 1)?;
        w.read(file, 1)?;
        w.kill(worker);
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
    row(170, G, "files are asked in order, and finished in reverse order", |w| {
        w.scripted_session("web", &[71, 72, 73])?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.calls(&[])?;
        w.finish(session)?;
        let asked = [71, 72, 73].map(|object| (CanFinish, object));
        let finished = [73, 72, 71].map(|object| (Finish, object));
        same(w.calls(&[CanFinish, Finish])?, [&asked[..], &finished[..]].concat())
    })
    .needing(&[Need::Script]),
    row(171, G, "a session stays finished if the answer cannot be written", |w| {
        let session = w.arrived(&[(1, "one")])?;
        refused(w.finish_with(session, 0, ReadOnly), Errno::FAULT)?;
        refused(w.retrieve(session, 1), Errno::NOENT)
    }),
    row(172, G, "a session can be given to another process", |w| {
        let session = w.arrived(&[(1, "one")])?;
        let other = w.spawn();
        let letter = w.send(session)?;
        w.close(session)?;
        let session = w.receive(letter, other)?;
        same(w.name(session)?, b"web".to_vec())?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "one")
    }),
];
