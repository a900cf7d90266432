//! The switch: cases 113 to 122.

use luo::Errno;

use super::Class::G;
use super::{Row, row};
use crate::system::Callback::{Freeze, Unfreeze};
use crate::world::{World, refused, same};

/// Three sessions of two files, of which the second of the second cannot be frozen.
fn cannot_freeze(w: &mut World) -> Result<(), Errno> {
    w.scripted_session("s1", &[11, 12])?;
    w.scripted_session("s2", &[21, 22])?;
    w.scripted_session("s3", &[31, 32])?;
    w.script()?.fail(Freeze, 22, Errno::NOMEM);
    w.calls(&[])?;
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    row(113, G, "a switch without sessions counts", |w| {
        let number = w.system.liveupdate_number();
        w.switch()?;
        same(w.system.liveupdate_number(), number + 1)?;
        let device = w.open()?;
        refused(w.retrieve_session(device, b"web"), Errno::NOENT)
    }),
    row(114, G, "a file that cannot be frozen calls the switch off", |w| {
        cannot_freeze(w)?;
        refused(w.switch(), Errno::NOMEM)?;
        let frozen = [11, 12, 21, 22].map(|object| (Freeze, object));
        let thawed = [21, 11, 12].map(|object| (Unfreeze, object));
        same(w.calls(&[Freeze, Unfreeze])?, [&frozen[..], &thawed[..]].concat())?;
        let session = w.scripted_session("s4", &[41])?;
        Ok(w.close(session)?)
    }),
    row(115, G, "a switch that was called off can be tried again", |w| {
        cannot_freeze(w)?;
        refused(w.switch(), Errno::NOMEM)?;
        w.script()?.mend(Freeze, 22);
        w.switch()?;
        for (name, tokens) in [("s1", [11, 12]), ("s2", [21, 22]), ("s3", [31, 32])] {
            let session = w.incoming(name)?;
            for token in tokens {
                w.retrieve(session, token)?;
            }
        }
        Ok(())
    }),
    row(116, G, "the position is that at the switch", |w| {
        let session = w.session("web")?;
        let file = w.memfd("position")?;
        w.preserve(session, file, 1)?;
        w.system.read(file, 4)?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "tion")
    }),
    row(117, G, "what is written after preserving goes over", |w| {
        let session = w.session("web")?;
        let file = w.memfd("before")?;
        w.preserve(session, file, 1)?;
        w.system.write_at(file, 0, b"after!")?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "after!")
    }),
    row(120, G, "a session closed before the switch is not there", |w| {
        let session = w.session_with("web", &[(1, "data")])?;
        w.session("other")?;
        w.close(session)?;
        w.switch()?;
        refused(w.incoming("web"), Errno::NOENT)?;
        w.incoming("other")?;
        Ok(())
    }),
];
