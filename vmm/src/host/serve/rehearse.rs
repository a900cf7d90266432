//! Rehearsals for the clients of the host's main loop: begins them, and replies when they have ended.

use super::{Client, Server, Whom, refusal};
use crate::api::{Answer, Command, Event, Line, UpdateCall, now_ms};
use crate::host::rehearsals::{self, Asked};
use crate::host::{Host, HostError};
use crate::live_update::preflight::Finding;

impl Server {
    /// Begins a rehearsal. Returns the answer, if it cannot be done, or `None` if the answer comes later.
    pub(super) fn rehearse(
        &mut self,
        host: &mut Host,
        asked: Asked<Whom>,
    ) -> Result<Option<Answer>, HostError> {
        let (updates, whom) = (asked.updates, asked.request.0);
        let begun = self.rehearsals.begin(host, asked)?;
        self.tell_of_rehearsal(updates, None);
        match begun {
            None => Ok(None),
            Some((asked, finding)) => self.rehearsed(host, whom, &asked, vec![finding]).map(Some),
        }
    }

    /// Replies to what was asked of a rehearsal that has ended. Ends the rehearsal if its client has left, or the host
    /// ends.
    pub(super) fn go_on_with_rehearsal(&mut self, host: &mut Host) {
        if self.stops.host_ends() {
            if let Some((whom, id)) = self.rehearsals.end(host, |_| true) {
                self.tell(whom, &refusal(id, &HostError::Ending));
            }
            return;
        }
        let Self { rehearsals, clients, .. } = self;
        let all = || clients.iter().flat_map(|clients| &clients.all);
        let has_left = |whom| match whom {
            Whom::Port => false,
            Whom::Client(number) => {
                all().find(|client| client.number == number).is_none_or(Client::has_left)
            }
        };
        if rehearsals.end(host, has_left).is_some() {
            tracing::warn!("the rehearsal was ended, because its client has left");
        }
        let Some((asked, findings)) = self.rehearsals.round(host) else { return };
        let (whom, id) = asked.request;
        let line = match self.rehearsed(host, whom, &asked, findings) {
            Ok(answer) => Line::ok(id, &answer),
            Err(error) => refusal(id, &error),
        };
        self.tell(whom, &line);
    }

    /// Returns the answer to a rehearsal, or goes on with the update.
    fn rehearsed(
        &mut self,
        host: &mut Host,
        whom: Whom,
        asked: &Asked<Whom>,
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
                let answer = self.carry_out_at_once(Command::Update(call), host, whom);
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
