//! The calls of the API: carries each of them out, and sends the reply at once or when what was asked for has ended.

mod rehearse;

use std::cell::RefCell;
use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::callers::{Caller, Callers};
use crate::api::{Answer, Call, Command, Event, Line, RecoverCall, Transaction, With, hex, now_ms};
use crate::causes::{chain, panic_message};
use crate::host::defects::guard;
use crate::host::errands::{Errand, Errands};
use crate::host::events::Watchers;
use crate::host::recover::{Recoveries, Wanted};
use crate::host::rehearsals::{Asked, Rehearsals};
use crate::host::stop::Stops;
use crate::host::waits::Waits;
use crate::host::{Host, HostError};
use crate::live_update::breakpoint;
use crate::live_update::preflight;
use crate::live_update::{Observer, Outcome, Progress, Step, UpdateError};
use crate::machine::VmName;
use crate::open_files;

/// The callers, and what they wait for.
#[derive(Default)]
pub(super) struct Calls {
    pub(super) callers: Callers,
    /// When the VMs end at the latest that are stopping, before the host leaves to systemd. `None` if it is not to leave.
    pub(super) leaves: Option<Instant>,
    pending: Pending,
}

/// What callers wait for.
#[derive(Default)]
struct Pending {
    stops: Stops<Caller>,
    waits: Waits<Caller>,
    errands: Errands<Caller>,
    recoveries: Recoveries<Caller>,
    watchers: Watchers<Caller>,
    rehearsals: Rehearsals<Caller>,
}

impl Pending {
    /// Whether a caller waits for something that is still to come.
    fn is_waiting(&self, caller: Caller) -> bool {
        self.stops.is_waiting(caller)
            || self.waits.is_waiting(caller)
            || self.errands.is_waiting(caller)
            || self.recoveries.is_waiting(caller)
            || self.watchers.has(caller)
            || self.rehearsals.is_waiting(caller)
    }
}

impl Calls {
    /// Whether the host ends when its VMs have.
    pub(super) fn host_ends(&self) -> bool {
        self.pending.stops.host_ends()
    }

    /// Whether the host ends, or leaves to systemd, when the VMs have ended that are stopping.
    fn is_ending(&self) -> bool {
        self.leaves.is_some() || self.host_ends()
    }

    /// Begins to stop all VMs and then the host, at the latest after `within_s`.
    pub(super) fn end_host(&mut self, host: &mut Host, within_s: u32) {
        self.pending.stops.end_host(host, None, within_s);
    }

    /// Whether the host is to end and all of its VMs have ended.
    pub(super) fn host_has_ended(&self, host: &Host) -> bool {
        self.pending.stops.has_ended(host)
    }

    /// Returns when the next reply is due, whether or not the processes of VMs have answered.
    pub(super) fn deadline(&self, host: &Host) -> Option<Instant> {
        self.pending.waits.deadline(host)
    }

    /// Returns the socket, if a client can be accepted now.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.callers.listener()
    }

    /// Accepts a client.
    pub(super) fn accept(&mut self) {
        self.callers.accept(|caller| self.pending.is_waiting(caller));
    }

    /// Reads what a caller has sent, and carries it out.
    pub(super) fn serve(&mut self, caller: Caller, host: &mut Host) {
        if caller == Caller::Port && self.callers.open_port_again() {
            self.callers.tell(caller, &Line::ready(&host.status()));
        }
        let lines = self.callers.read(caller);
        self.answer_all(lines, host, caller);
    }

    /// Goes on with what callers wait for: sends the replies that are due, and tells of what has changed.
    pub(super) fn go_on(&mut self, host: &mut Host) {
        guard(|| self.go_on_with_rehearsal(host));
        let Pending { stops, waits, errands, recoveries, .. } = &mut self.pending;
        let replies = [
            guard(|| stops.round(host)),
            guard(|| waits.round(host)),
            guard(|| errands.round(host)),
            guard(|| recoveries.round(host)),
        ];
        for (caller, line) in replies.into_iter().flatten().flatten() {
            guard(|| self.callers.tell(caller, &line));
        }
        for event in guard(|| self.pending.watchers.changes(host)).into_iter().flatten() {
            guard(|| self.tell_watchers(&Line::Event(event)));
        }
    }

    /// Gives up what callers wait for, because the host leaves its VMs to another one, and replies to all of them.
    pub(super) fn give_up(&mut self, host: &mut Host) {
        host.give_up_errands();
        self.go_on(host);
        let Pending { waits, errands, .. } = &mut self.pending;
        for (caller, line) in waits.end(host).into_iter().chain(errands.end(host)) {
            self.callers.tell(caller, &line);
        }
    }

    /// Forgets the clients that are gone.
    pub(super) fn sweep(&mut self) {
        let Self { callers, pending, leaves: _ } = self;
        callers.sweep(|caller| pending.is_waiting(caller));
        pending.watchers.retain(|caller| callers.is_there(caller));
        let has_left = |caller| matches!(caller, Caller::Client(_)) && !callers.is_there(caller);
        pending.stops.forget(has_left);
    }

    fn answer_all(&mut self, lines: Vec<String>, host: &mut Host, caller: Caller) {
        for line in lines {
            let call = match Call::parse(&line) {
                Ok(call) => call,
                Err(refusal) => {
                    self.callers.tell(caller, &refusal);
                    continue;
                }
            };
            if self.callers.has_left(caller) {
                let what: String = line.chars().take(80).collect();
                tracing::warn!("not carried out, because its client has left: {what}");
                continue;
            }
            let id = call.id;
            // A defect must not end the host, and with it all VMs.
            let done = catch_unwind(AssertUnwindSafe(|| self.carry_out(call, host, caller)));
            let done = done.unwrap_or_else(|panic| Err(HostError::Defect(panic_message(&*panic))));
            let line = match done {
                // The reply comes when what was asked for has ended.
                Ok(None) => continue,
                Ok(Some(answer)) => Line::ok(id, &answer),
                Err(error) => error.reply(id),
            };
            self.callers.tell(caller, &line);
        }
    }

    /// Carries out a command. Returns the answer, or `None` if the answer comes later.
    fn carry_out(
        &mut self,
        call: Call,
        host: &mut Host,
        caller: Caller,
    ) -> Result<Option<Answer>, HostError> {
        let within_s = host.config.host.stop_within_s();
        match call.command {
            Command::Stop { vm, now, within_s: own } => {
                let within_s = if now { 0 } else { own.unwrap_or(within_s) };
                self.pending.stops.stop(host, (caller, call.id), vm, within_s)?;
                Ok(None)
            }
            Command::PowerOff { now } => {
                let within_s = if now { 0 } else { within_s };
                self.pending.stops.end_host(host, Some((caller, call.id)), within_s);
                Ok(None)
            }
            Command::Events => {
                let events = self.pending.watchers.add(caller, host)?;
                self.callers.tell(caller, &Line::ok(call.id, &Answer::Done {}));
                events.into_iter().for_each(|event| self.callers.tell(caller, &Line::Event(event)));
                Ok(None)
            }
            Command::Status => {
                self.pending.waits.status(host, (caller, call.id))?;
                Ok(None)
            }
            Command::ResizeDisk { vm, disk, size } => {
                self.pending.waits.resize(host, (caller, call.id), (vm, disk), size)?;
                Ok(None)
            }
            Command::Boot { .. }
            | Command::Restore { .. }
            | Command::Recover(_)
            | Command::Rehearse(_)
            | Command::Update(_)
            | Command::Handover(_)
                if self.is_ending() =>
            {
                Err(HostError::Ending)
            }
            Command::Pause { vm } => self.begin(host, (caller, call.id), vm, Errand::Pause),
            Command::Resume { vm } => self.begin(host, (caller, call.id), vm, Errand::Resume),
            Command::Dump { vm, path } => {
                self.begin(host, (caller, call.id), vm, Errand::Dump(path))
            }
            Command::Boot { vm } => self.begin(host, (caller, call.id), vm, Errand::Boot),
            Command::Rehearse(update) => {
                let request = (caller, call.id);
                self.rehearse(host, Asked { request, call: update, updates: false, files: None })
            }
            Command::Update(_) | Command::Handover(_) | Command::Recover(_)
                if host.rehearsal.is_some() =>
            {
                Err(HostError::Rehearsing)
            }
            Command::Update(update) if host.rehearses(&update) => {
                let request = (caller, call.id);
                host.refuse_before_rehearsal(&update)?;
                self.rehearse(host, Asked { request, call: update, updates: true, files: None })
            }
            Command::Restore { vm, force } => {
                // For a test whose host does the damage itself.
                breakpoint::repair();
                self.recover(host, (caller, call.id), Wanted::Restore(vm, force))
            }
            Command::Recover(RecoverCall { vm, with: None }) => {
                self.recover(host, (caller, call.id), Wanted::Recover(vm))
            }
            Command::Recover(RecoverCall { vm: Some(vm), with: Some(With::Previous) }) => {
                self.recover(host, (caller, call.id), Wanted::WithPrevious(vm))
            }
            command => self.carry_out_at_once(command, host, caller).map(Some),
        }
    }

    /// Begins a command for one VM. The answer comes later.
    fn begin(
        &mut self,
        host: &mut Host,
        request: (Caller, u64),
        vm: VmName,
        errand: Errand,
    ) -> Result<Option<Answer>, HostError> {
        self.pending.errands.begin(host, request, vm, errand)?;
        Ok(None)
    }

    /// Begins to restore VMs. The answer comes later.
    fn recover(
        &mut self,
        host: &mut Host,
        request: (Caller, u64),
        wanted: Wanted,
    ) -> Result<Option<Answer>, HostError> {
        // It opens files for VMs that can be saved.
        let _reserve = open_files::use_reserve();
        self.pending.recoveries.begin(host, request, wanted)?;
        Ok(None)
    }

    /// Carries out a command whose answer comes at once.
    fn carry_out_at_once(
        &mut self,
        command: Command,
        host: &mut Host,
        caller: Caller,
    ) -> Result<Answer, HostError> {
        // What keeps a guest must not fail because other VMs have all the files.
        let keeps_guests = matches!(command, Command::Recover(_) | Command::Update(_));
        let _reserve = keeps_guests.then(open_files::use_reserve);
        if let Command::Update(_) | Command::Preflight(_) = command {
            // Whether it is left to systemd depends on the LUO.
            host.choose_for_update();
        }
        match command {
            // Their answers come later.
            Command::Status
            | Command::Stop { .. }
            | Command::PowerOff { .. }
            | Command::ResizeDisk { .. }
            | Command::Pause { .. }
            | Command::Resume { .. }
            | Command::Dump { .. }
            | Command::Boot { .. }
            | Command::Restore { .. }
            | Command::Rehearse(_)
            | Command::Events => {}
            Command::Report => {
                let report = host.report.clone().ok_or(HostError::NoReport)?;
                return Ok(Answer::Report(Box::new(report)));
            }
            Command::Link { vm, device, up } => host.vm(&vm)?.set_link(device.as_deref(), up)?,
            Command::Recover(_) => {
                tracing::info!("the handover to an earlier program begins");
                return self
                    .transact(caller, Transaction::Handover, |observer| host.hand_back(observer));
            }
            Command::Memory { vm, address, bytes } => {
                return Ok(Answer::Memory { memory: hex(&host.vm(&vm)?.memory(address, bytes)?) });
            }
            Command::Preflight(call) => {
                let findings = host.preflight(&call)?;
                let forced = call.forced()?;
                let refused = !preflight::refusals(&findings, &forced).is_empty();
                return Ok(Answer::Findings { refused, findings });
            }
            Command::Update(call) if host.is_left_to_systemd(&call) => {
                host.update_through_systemd(call)?;
                let outcome = Outcome::Running;
                return Ok(Answer::LeftToSystemd { outcome, kexec: "asked of systemd" });
            }
            Command::Update(call) => {
                tracing::info!("live update {} begins", host.number + 1);
                return self
                    .transact(caller, Transaction::Update, |observer| host.update(call, observer));
            }
            Command::Handover(call) => {
                tracing::info!("the handover to another program begins");
                return self.transact(caller, Transaction::Handover, |observer| {
                    host.hand_over(call, observer)
                });
            }
        }
        Ok(Answer::Done {})
    }

    /// Performs a live update or a handover, and tells of its progress. Returns only if it did not take place.
    fn transact(
        &mut self,
        caller: Caller,
        transaction: Transaction,
        run: impl FnOnce(Observer<'_>) -> Result<Infallible, HostError>,
    ) -> Result<Answer, HostError> {
        let result = answer_unless_done(self.observed(caller, transaction, run));
        let (error, outcome) = match &result {
            Err(error) => (chain(error), error.outcome()),
            Ok(_) => {
                (vec!["it stopped before a step, as was asked".into()], Some(Outcome::Running))
            }
        };
        let undone = Event::Undone { time_ms: now_ms(), transaction, error, outcome };
        self.tell_watchers(&Line::Event(undone));
        result
    }

    /// Runs a transaction and tells of its progress, `caller` of the jump.
    pub(super) fn observed<T>(
        &mut self,
        caller: Caller,
        transaction: Transaction,
        run: impl FnOnce(Observer<'_>) -> T,
    ) -> T {
        let _reserve = open_files::use_reserve();
        let calls = RefCell::new(self);
        run(&|progress| calls.borrow_mut().progresses(caller, transaction, progress))
    }

    /// Tells the clients that watch of the progress, and `caller` of the jump.
    fn progresses(&mut self, caller: Caller, transaction: Transaction, progress: Progress<'_>) {
        let Progress { step, vm } = progress;
        let vm = vm.cloned();
        let event = Event::Step { time_ms: now_ms(), transaction, step, vm };
        self.tell_watchers(&Line::Event(event));
        if step == Step::Jump {
            if !self.pending.watchers.has(caller) {
                self.callers.tell(caller, &Line::jumping());
            }
            self.tell_watchers(&Line::jumping());
        }
    }

    fn tell_watchers(&mut self, line: &Line) {
        for caller in self.pending.watchers.all() {
            self.callers.tell(caller, line);
        }
    }
}

/// Returns the answer to a live update or a handover that did not take place. If it stopped before a step
/// as requested, that is a success.
fn answer_unless_done(result: Result<Infallible, HostError>) -> Result<Answer, HostError> {
    match result {
        Ok(never) => match never {},
        Err(
            HostError::Update(UpdateError::Stopped(step))
            | HostError::Handover(UpdateError::Stopped(step)),
        ) => Ok(Answer::Stopped { outcome: Outcome::Running, stopped_before: step }),
        Err(error) => Err(error),
    }
}
