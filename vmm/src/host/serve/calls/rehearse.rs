//! Rehearsals for the clients of the host's main loop: begins them, and replies when they have ended.

use super::Calls;
use crate::api::{Answer, Command, Event, Line, UpdateCall, now_ms};
use crate::host::rehearsals::{self, Asked};
use crate::host::serve::callers::Caller;
use crate::host::{Host, HostError};
use crate::live_update::preflight::Finding;

impl Calls {
    /// Begins a rehearsal. Returns the answer, if it cannot be done, or `None` if the answer comes later.
    pub(super) fn rehearse(
        &mut self,
        host: &mut Host,
        asked: Asked<Caller>,
    ) -> Result<Option<Answer>, HostError> {
        let (updates, caller) = (asked.updates, asked.request.0);
        let begun = self.pending.rehearsals.begin(host, asked)?;
        self.tell_of_rehearsal(updates, None);
        match begun {
            None => Ok(None),
            Some((asked, finding)) => self.rehearsed(host, caller, &asked, vec![finding]).map(Some),
        }
    }

    /// Replies to what was asked of a rehearsal that has ended. Ends the rehearsal if its client has left, or the host
    /// ends.
    pub(super) fn go_on_with_rehearsal(&mut self, host: &mut Host) {
        if self.is_ending() {
            if let Some((caller, id)) = self.pending.rehearsals.end(host, |_| true) {
                self.callers.tell(caller, &HostError::Ending.reply(id));
            }
            return;
        }
        let has_left = |caller| self.callers.has_left(caller);
        if self.pending.rehearsals.end(host, has_left).is_some() {
            tracing::warn!("the rehearsal was ended, because its client has left");
        }
        let Some((asked, findings)) = self.pending.rehearsals.round(host) else { return };
        let (caller, id) = asked.request;
        let line = match self.rehearsed(host, caller, &asked, findings) {
            Ok(answer) => Line::ok(id, &answer),
            Err(error) => error.reply(id),
        };
        self.callers.tell(caller, &line);
    }

    /// Returns the answer to a rehearsal, or goes on with the update.
    fn rehearsed(
        &mut self,
        host: &mut Host,
        caller: Caller,
        asked: &Asked<Caller>,
        findings: Vec<Finding>,
    ) -> Result<Answer, HostError> {
        let refusals = asked.refusals(&findings)?;
        let (updates, refused) = (asked.updates, !refusals.is_empty());
        self.tell_of_rehearsal(updates, Some(refused));
        match (updates, refused) {
            (false, _) => Ok(Answer::Findings { refused, findings }),
            (true, true) => Err(HostError::Refused(refusals)),
            (true, false) => {
                rehearsals::log(&findings);
                let call = UpdateCall { rehearse: Some(false), ..asked.call.clone() };
                // Minutes have passed: the update must not load what was put in place of the files meanwhile.
                host.rehearsed = asked.files;
                let answer = self.carry_out_at_once(Command::Update(call), host, caller);
                host.rehearsed = None;
                answer
            }
        }
    }

    /// Tells the watchers that a rehearsal begins, or has ended and refuses the update or not.
    fn tell_of_rehearsal(&mut self, updates: bool, refused: Option<bool>) {
        self.tell_watchers(&Line::Event(Event::Rehearsal { time_ms: now_ms(), updates, refused }));
    }
}
