//! RETRIEVE_FD: cases 138 to 160.

use luo::Errno;

use super::Class::G;
use super::{Row, row};
use crate::conformance::profile::Need;
use crate::conformance::system::Callback;
use crate::conformance::system::Place::ReadOnly;
use crate::conformance::world::{refused, same};

pub(super) const ROWS: &[Row] = &[
    row(138, G, "a file is retrieved", |w| {
        let session = w.arrived(&[(1, "data")])?;
        let file = w.retrieve(session, 1)?;
        same(w.closes_on_exec(file)?, true)?;
        same(w.contents(file)?.as_str(), "data")
    }),
    row(139, G, "an unknown token is not found", |w| {
        let session = w.arrived(&[(1, "data")])?;
        refused(w.retrieve(session, 2), Errno::NOENT)
    }),
    row(140, G, "files are retrieved in any order, or not at all", |w| {
        let session = w.arrived(&[(1, "one"), (2, "two"), (3, "three"), (4, "four")])?;
        for (token, contents) in [(3, "three"), (1, "one"), (4, "four")] {
            let file = w.retrieve(session, token)?;
            same(w.contents(file)?.as_str(), contents)?;
        }
        Ok(())
    }),
    row(141, G, "a token gives the same open file again", |w| {
        let session = w.arrived(&[(1, "data")])?;
        let (one, other) = (w.retrieve(session, 1)?, w.retrieve(session, 1)?);
        same(w.is_same_open_file(one, other)?, true)?;
        w.read(one, 2)?;
        same(w.contents(other)?.as_str(), "ta")
    }),
    row(142, G, "a token gives the file again after it was closed", |w| {
        let session = w.arrived(&[(1, "data")])?;
        let file = w.retrieve(session, 1)?;
        w.close(file)?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "data")
    }),
    row(143, G, "a file can be retrieved later if there was no free fd", |w| {
        let session = w.arrived(&[(1, "data")])?;
        w.limit_fds(true)?;
        refused(w.retrieve(session, 1), Errno::MFILE)?;
        w.limit_fds(false)?;
        w.retrieve(session, 1)?;
        Ok(())
    }),
    row(144, G, "a file can be retrieved later if the answer cannot be written", |w| {
        let session = w.arrived(&[(1, "data")])?;
        refused(w.retrieve_at(session, 1, ReadOnly), Errno::FAULT)?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "data")
    }),
    row(145, G, "a file that failed to be retrieved is lost", |w| {
        w.scripted_session("web", &[1])?;
        w.switch()?;
        let session = w.incoming("web")?;
        w.calls(&[])?;
        w.fail(Callback::Retrieve, 1, Errno::NOMEM)?;
        refused(w.retrieve(session, 1), Errno::NOMEM)?;
        w.mend(Callback::Retrieve, 1)?;
        refused(w.retrieve(session, 1), Errno::NOMEM)?;
        same(w.calls(&[Callback::Retrieve])?, vec![(Callback::Retrieve, 1)])?;
        Ok(w.finish(session)?)
    })
    .needing(&[Need::Script]),
    row(146, G, "nothing is retrieved from a finished session", |w| {
        let session = w.arrived(&[(1, "data")])?;
        w.finish(session)?;
        refused(w.retrieve(session, 1), Errno::NOENT)
    }),
    row(153, G, "empty files and any size", |w| {
        let odd = "x".repeat(4097 - 1002);
        let session = w.arrived(&[(1, ""), (2, &odd)])?;
        for (token, contents) in [(1, ""), (2, &odd[..])] {
            let file = w.retrieve(session, token)?;
            same(w.contents(file)?.as_str(), contents)?;
        }
        Ok(())
    }),
    row(158, G, "a retrieved file is busy until its session is finished", |w| {
        let incoming = w.arrived(&[(1, "data")])?;
        let file = w.retrieve(incoming, 1)?;
        let session = w.session("next")?;
        refused(w.preserve(session, file, 1), Errno::BUSY)?;
        w.finish(incoming)?;
        Ok(w.preserve(session, file, 1)?)
    }),
    row(159, G, "a file crosses over twice", |w| {
        let number = w.liveupdate_number();
        let incoming = w.arrived(&[(1, "data")])?;
        let file = w.retrieve(incoming, 1)?;
        w.finish(incoming)?;
        let session = w.session("next")?;
        w.preserve(session, file, 7)?;
        w.switch()?;
        same(w.liveupdate_number(), number + 2)?;
        let incoming = w.incoming("next")?;
        let file = w.retrieve(incoming, 7)?;
        same(w.contents(file)?.as_str(), "data")
    }),
];
