//! The switch: cases 113 to 122.

use luo::Errno;

use super::Class::{G, K};
use super::{Row, row, untold};
use crate::conformance::file::FileCall;
use crate::conformance::profile::{Deviation, Need};
use crate::conformance::system::Callback::{Freeze, Unfreeze};
use crate::conformance::system::{Call, Load, Next, Who};
use crate::conformance::world::{Outcome, World, refused, same};

/// Creates three sessions of two files each. The second file of session `s2` cannot be frozen.
fn cannot_freeze(w: &mut World) -> Outcome {
    w.scripted_session("s1", &[11, 12])?;
    w.scripted_session("s2", &[21, 22])?;
    w.scripted_session("s3", &[31, 32])?;
    w.fail(Freeze, 22, Errno::NOMEM)?;
    w.calls(&[])?;
    Ok(())
}

pub(super) const ROWS: &[Row] = &[
    row(108, K, "a switch without a next kernel changes nothing", |w| {
        let file = w.memfd("data")?;
        let session = w.session_of(file)?;
        w.call(Call::Load(Load::Nothing))?;
        refused(w.call(Call::Reboot(Who::Root)), Errno::INVAL)?;
        same(w.is_preserved(file)?, true)?;
        refused(w.on(file, FileCall::Truncate(1)), Errno::PERM)?;
        w.close(session)?;
        w.on(file, FileCall::Truncate(1))?;
        Ok(())
    })
    .alone(),
    row(109, K, "a switch is for root of the first pid namespace", |w| {
        w.session_with("web", &[(1, "data")])?;
        refused(w.call(Call::Reboot(Who::Nobody)), Errno::PERM)?;
        refused(w.call(Call::Reboot(Who::OtherNamespace)), Errno::INVAL)
    })
    .alone(),
    row(110, K, "the next kernel is loaded before anything is preserved, or after", |w| {
        w.call(Call::Load(Load::Next))?;
        let session = w.arrived(&[(1, "before")])?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "before")?;
        w.close(session)?;
        let session = w.session_with("web", &[(1, "after")])?;
        w.call(Call::Load(Load::Next))?;
        same(w.name(session)?, b"web".to_vec())?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "after")
    })
    .alone(),
    row(111, K, "a kernel that was loaded by kexec_load(2) finds nothing", untold)
        .needing(&[Need::OldLoad]),
    row(112, K, "a kernel has to fit into a scratch area", |w| {
        refused(w.call(Call::Load(Load::TooLarge)), Errno::ADDRNOTAVAIL)
    })
    .alone(),
    row(113, G, "a switch without sessions counts", |w| {
        let number = w.liveupdate_number();
        w.switch()?;
        same(w.liveupdate_number(), number + 1)?;
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
    })
    .needing(&[Need::Script])
    .alone(),
    row(115, G, "a switch that was called off can be tried again", |w| {
        cannot_freeze(w)?;
        refused(w.switch(), Errno::NOMEM)?;
        w.mend(Freeze, 22)?;
        w.switch()?;
        for (name, tokens) in [("s1", [11, 12]), ("s2", [21, 22]), ("s3", [31, 32])] {
            let session = w.incoming(name)?;
            for token in tokens {
                w.retrieve(session, token)?;
            }
        }
        Ok(())
    })
    .needing(&[Need::Script])
    .alone(),
    row(116, G, "the position is that at the switch", |w| {
        let session = w.session("web")?;
        let file = w.memfd("position")?;
        w.preserve(session, file, 1)?;
        w.read(file, 4)?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "tion")
    }),
    row(117, G, "what is written after preserving goes over", |w| {
        let session = w.session("web")?;
        let file = w.memfd("before")?;
        w.preserve(session, file, 1)?;
        w.write_at(file, 0, "after!")?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        same(w.contents(file)?.as_str(), "after!")
    }),
    row(118, G, "a seal that is added after preserving does not go over", |w| {
        const SEAL_GROW: u32 = 4;
        let file = w.memfd("data")?;
        w.session_of(file)?;
        w.on(file, FileCall::AddSeals(SEAL_GROW))?;
        w.switch()?;
        let session = w.incoming("web")?;
        let file = w.retrieve(session, 1)?;
        let seals = if w.deviates(Deviation::SealsStay) { SEAL_GROW } else { 0 };
        same(w.on(file, FileCall::Seals)?, seals.into())
    })
    .needing(&[Need::Files]),
    row(119, K, "no request returns when all is handed over", untold).needing(&[Need::Witness]),
    row(120, G, "a session closed before the switch is not there", |w| {
        let session = w.session_with("web", &[(1, "data")])?;
        w.session("other")?;
        w.close(session)?;
        w.switch()?;
        refused(w.incoming("web"), Errno::NOENT)?;
        w.incoming("other")?;
        Ok(())
    }),
    row(122, K, "a reset hands nothing over", |w| {
        w.session_with("web", &[(1, "data")])?;
        w.switch_to(Next::Reset)?;
        same(w.liveupdate_number(), 0)?;
        refused(w.incoming("web"), Errno::NOENT)
    })
    .alone(),
];
