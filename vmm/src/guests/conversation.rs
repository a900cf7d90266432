//! The conversation between the host and the process of one VM.
//!
//! The process parses guest-controlled bytes, so a guest may take it over and send any message.
//! Whatever it sends, the host neither panics nor waits forever: the size of every message is bounded
//! (see [`Channel`]), and so are its texts (see `words`), the number of causes of a failure, the number of unread events,
//! and how many events the process may send in a time.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

pub use super::process_error::ProcessError;
use super::told::{BootedEntry, Told};
use super::words::{bounded, bounded_text};
use crate::link::{Channel, Envelope, Event, FromVm, LinkError, Reply, Request, Role};

/// How long a VM's process may take to answer, before it counts as hung. Long enough for hosts whose
/// CPUs are emulated.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Most unread events. A VM sends only a few events in its whole life.
const MAX_EVENTS: usize = 256;

/// The request in errors that belong to no request.
const NO_REQUEST: &str = "none";

/// A request that the process has not answered yet.
#[derive(Debug, Clone, Copy)]
struct Unanswered {
    /// The request, in words.
    request: &'static str,
    wanted: Wanted,
}

/// Who wants the answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// The caller of [`Conversation::reply`], who waits.
    Now,
    /// The caller of [`Conversation::take_kept`], who does not wait. The answer is kept when it comes.
    Later,
    /// Nobody. The answer is dropped when it comes.
    No,
}

/// The host's end of the link to one process.
#[derive(Debug)]
pub struct Conversation {
    channel: Channel,
    unanswered: RefCell<VecDeque<Unanswered>>,
    /// How many requests were sent.
    requests: Cell<u64>,
    /// Whether the process has ended and left the last request unread. The link says so once.
    left_last_unread: Cell<bool>,
    /// At most one for each request that was sent by [`send_for_later`](Self::send_for_later).
    kept: RefCell<VecDeque<Result<Reply, ProcessError>>>,
    events: RefCell<VecDeque<Event>>,
    told: Box<RefCell<Told>>,
}

impl Conversation {
    /// Begins a conversation over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            channel,
            unanswered: RefCell::default(),
            requests: Cell::default(),
            left_last_unread: Cell::default(),
            kept: RefCell::default(),
            events: RefCell::default(),
            told: Box::default(),
        }
    }

    /// Sends a request; [`reply`](Self::reply) waits for its answer. To let several processes work at
    /// the same time, send to all of them before waiting for the first.
    pub fn send(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        self.send_and(request, fds, Wanted::Now)
    }

    /// Sends a request whose answer nobody waits for. A refusal is logged.
    pub fn notify(&self, request: Request) -> Result<(), ProcessError> {
        self.send_and(request, &[], Wanted::No)
    }

    /// Sends a request whose answer [`take_kept`](Self::take_kept) returns when it has come. Nobody waits for it.
    pub fn send_for_later(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        self.send_and(request, fds, Wanted::Later)
    }

    /// Returns the oldest answer to a request that was sent for later, if one has come.
    pub fn take_kept(&self) -> Option<Result<Reply, ProcessError>> {
        self.kept.borrow_mut().pop_front()
    }

    /// Keeps no answer any more: those that have not come are dropped when they come.
    pub fn forget_kept(&self) {
        self.kept.borrow_mut().clear();
        self.change(Wanted::Later, Wanted::No);
    }

    fn send_and(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
        wanted: Wanted,
    ) -> Result<(), ProcessError> {
        let name = verb(&request);
        let (roles, raw): (Vec<Role>, Vec<BorrowedFd<'_>>) = fds.iter().cloned().unzip();
        let sent = self.channel.send_at_once(&Envelope { request, roles }, &raw);
        sent.map_err(|source| link(name, self.noted(source)))?;
        self.requests.set(self.requests.get() + 1);
        self.unanswered.borrow_mut().push_back(Unanswered { request: name, wanted });
        Ok(())
    }

    /// Waits for the answer to the oldest unanswered request whose answer is awaited. Errors if it has not come
    /// within [`ANSWER_WITHIN`]; the process owes it then, and it is dropped when it comes.
    pub fn reply(&self) -> Result<Reply, ProcessError> {
        let awaited =
            self.unanswered.borrow().iter().find(|r| r.wanted == Wanted::Now).map(|r| r.request);
        let request = awaited.unwrap_or(NO_REQUEST);
        match self.answer_by(Instant::now() + ANSWER_WITHIN)? {
            Some(Reply::Failed(chain)) => Err(ProcessError::refused(request, chain)),
            Some(reply) => Ok(reply),
            None => Err(link(request, LinkError::TimedOut)),
        }
    }

    /// Sends a request without fds and waits for its answer. Drops the answers to earlier requests, which come
    /// first: the caller stopped waiting for those when another VM failed.
    pub fn ask(&self, request: Request) -> Result<Reply, ProcessError> {
        self.stop_waiting();
        self.send(request, &[])?;
        self.reply()
    }

    /// Asks for the state of the machine's storages, unless the process owes it already. Nobody waits for the answer:
    /// [`told`](Self::told) has it when it comes.
    pub fn ask_for_reports(&self) -> Result<(), ProcessError> {
        match self.told.borrow_mut().ask_for_reports(Instant::now()) {
            true => self.notify(Request::ReportStorage),
            false => Ok(()),
        }
    }

    /// Waits until `deadline` for the answer to the oldest request whose answer is awaited. Returns `None` if
    /// there is none by then; the process owes it, and it is dropped when it comes.
    pub fn answer_by(&self, deadline: Instant) -> Result<Option<Reply>, ProcessError> {
        while self.awaits() {
            if !self.has_message_by(deadline)? {
                self.stop_waiting();
                return Ok(None);
            }
            if let Some(reply) = self.take_message()? {
                return Ok(Some(reply));
            }
        }
        Ok(None)
    }

    /// Waits until `deadline` for the reports that the process owes. [`told`](Self::told) has them then, if they came.
    pub fn await_reports(&self, deadline: Instant) -> Result<(), ProcessError> {
        // A process that only sends events does not keep the host waiting.
        while self.told().reports_due().is_some()
            && Instant::now() < deadline
            && self.has_message_by(deadline)?
        {
            self.take_message()?;
        }
        Ok(())
    }

    /// Waits until `deadline` for a message, or for the end of the process. Returns whether there is one.
    fn has_message_by(&self, deadline: Instant) -> Result<bool, ProcessError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut readable = [PollFd::new(&self.channel, PollFlags::IN)];
            match poll(&mut readable, Some(&left)) {
                Ok(count) => return Ok(count > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(link(NO_REQUEST, LinkError::Socket(errno.into()))),
            }
        }
    }

    fn oldest(&self) -> &'static str {
        self.unanswered.borrow().front().map_or(NO_REQUEST, |oldest| oldest.request)
    }

    /// Errors if the process has closed its end of the link, as it does when it ends.
    pub fn check_open(&self) -> Result<(), ProcessError> {
        let mut link_end = [PollFd::new(&self.channel, PollFlags::empty())];
        let now = Some(&Timespec { tv_sec: 0, tv_nsec: 0 });
        let closed = rustix::io::retry_on_intr(|| poll(&mut link_end, now)).is_ok_and(|n| n > 0);
        if closed { Err(link(NO_REQUEST, LinkError::Closed)) } else { Ok(()) }
    }

    /// Whether the answer to a request is awaited.
    pub fn awaits(&self) -> bool {
        self.unanswered.borrow().iter().any(|request| request.wanted == Wanted::Now)
    }

    /// Waits for no answer any more: those that the process owes are dropped when they come.
    pub fn stop_waiting(&self) {
        self.change(Wanted::Now, Wanted::No);
    }

    fn change(&self, before: Wanted, after: Wanted) {
        let mut unanswered = self.unanswered.borrow_mut();
        let changed = unanswered.iter_mut().filter(|request| request.wanted == before);
        changed.for_each(|request| request.wanted = after);
    }

    /// Waits for the next message. A process of a VM sends no files.
    fn receive(&self) -> Result<FromVm, LinkError> {
        match self.channel.receive_without_fds() {
            Ok(message) => Ok(bounded(message)),
            // The reason may quote the message.
            Err(LinkError::Malformed(why)) => Err(LinkError::Malformed(bounded_text(&why))),
            Err(other) => Err(self.noted(other)),
        }
    }

    fn noted(&self, error: LinkError) -> LinkError {
        if let LinkError::Unread = error {
            self.left_last_unread.set(true);
        }
        error
    }

    /// How many requests were sent to the process.
    pub fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// Whether the process has not answered all requests.
    pub fn owes(&self) -> bool {
        !self.unanswered.borrow().is_empty()
    }

    /// Whether the process has ended, as this conversation has noticed, and had not read the last request.
    pub fn has_left_last_unread(&self) -> bool {
        self.left_last_unread.get()
    }

    /// Takes the next message. Returns the answer if it is one that is awaited.
    pub fn take_message(&self) -> Result<Option<Reply>, ProcessError> {
        let request = self.oldest();
        let received = self.receive();
        let message = received.map_err(|source| match (&source, self.last_event()) {
            (LinkError::Closed | LinkError::Unread, Some(Event::Crashed(why))) => {
                ProcessError::Crashed { request, why }
            }
            _ => link(request, source),
        })?;
        match message {
            FromVm::Event(event) => {
                self.queue_event(event).map_err(|source| link(request, source))?;
                Ok(None)
            }
            FromVm::Reply(reply) => {
                let oldest = self.unanswered.borrow().front().copied();
                if oldest.is_some_and(|oldest| oldest.wanted == Wanted::Now) {
                    self.unanswered.borrow_mut().pop_front();
                    return Ok(Some(reply));
                }
                self.take_unawaited(reply)?;
                Ok(None)
            }
        }
    }

    /// Takes the next message, which must have come. Returns what the process has answered, if it is an answer that is
    /// awaited, or why there will be none.
    pub fn take_answer(&self) -> Option<Result<Reply, ProcessError>> {
        let request = self.oldest();
        match self.take_message() {
            Ok(None) => None,
            Ok(Some(Reply::Failed(chain))) => Some(Err(ProcessError::refused(request, chain))),
            Ok(Some(reply)) => Some(Ok(reply)),
            Err(error) => Some(Err(error)),
        }
    }

    /// What the process has told without being waited for.
    pub fn told(&self) -> RefMut<'_, Told> {
        self.told.borrow_mut()
    }

    /// Whether there are unread events.
    pub fn has_events(&self) -> bool {
        !self.events.borrow().is_empty()
    }

    /// Returns the last unread event.
    pub fn last_event(&self) -> Option<Event> {
        self.events.borrow().back().cloned()
    }

    /// Returns the last event of a process that has ended. Skips replies and malformed messages. Never waits, although
    /// another process may still have the other end of the link.
    pub fn last_words(&self) -> Option<Event> {
        loop {
            if !matches!(self.has_message_by(Instant::now()), Ok(true)) {
                return self.events.borrow_mut().pop_back();
            }
            let done = match self.receive() {
                Ok(FromVm::Event(event)) => self.queue_event(event).is_err(),
                // What it said is behind the news that it left something unread.
                Ok(FromVm::Reply(_)) | Err(LinkError::Malformed(_) | LinkError::Unread) => false,
                Err(_) => true,
            };
            if done {
                return self.events.borrow_mut().pop_back();
            }
        }
    }

    /// Takes the unread events, oldest first, and reads one more message if one has come. Never waits: the message for
    /// which the caller was woken may have been taken meanwhile, by a command that asked the process for something.
    pub fn events(&self) -> Result<Vec<Event>, ProcessError> {
        if self.has_message_by(Instant::now())? {
            let request = NO_REQUEST;
            match self.receive() {
                Ok(FromVm::Event(event)) => {
                    self.queue_event(event).map_err(|source| link(request, source))?;
                }
                Ok(FromVm::Reply(reply)) => self.take_unawaited(reply)?,
                Err(source) => return Err(link(request, source)),
            }
        }
        Ok(self.events.borrow_mut().drain(..).collect())
    }

    /// Takes the answer to a request for whose answer nobody waits: keeps or drops it. Errors if there is no such request.
    fn take_unawaited(&self, reply: Reply) -> Result<(), ProcessError> {
        match (self.unanswered.borrow_mut().pop_front(), reply) {
            (Some(Unanswered { request, wanted: Wanted::Later }), reply) => {
                let answer = match reply {
                    Reply::Failed(chain) => Err(ProcessError::refused(request, chain)),
                    reply => Ok(reply),
                };
                self.kept.borrow_mut().push_back(answer);
                Ok(())
            }
            (Some(Unanswered { request, wanted: Wanted::No }), Reply::Failed(chain)) => {
                self.refused(request, &ProcessError::refused(request, chain));
                Ok(())
            }
            (Some(Unanswered { wanted: Wanted::No, .. }), reply) => {
                self.keep(reply);
                Ok(())
            }
            (other, reply) => {
                Err(unexpected(other.map_or(NO_REQUEST, |other| other.request), &reply))
            }
        }
    }

    /// Keeps the answer to a request whose answer nobody waits for, if the host has a use for it.
    fn keep(&self, reply: Reply) {
        if let Reply::Storage(reports) = reply {
            self.told.borrow_mut().report(reports, Instant::now());
        }
    }

    /// A request was refused whose answer nobody waits for.
    fn refused(&self, request: &'static str, error: &ProcessError) {
        if request == verb(&Request::ReportStorage) {
            self.told.borrow_mut().refuse_reports();
        }
        tracing::warn!("{}", crate::causes::chain(error).join(": "));
    }

    fn queue_event(&self, event: Event) -> Result<(), LinkError> {
        self.told.borrow_mut().note_event(Instant::now())?;
        // These are no reasons to look at the VM.
        let event = match event {
            Event::Link { device, link } => return self.told.borrow_mut().set_link(device, link),
            Event::Resized { device, resized } => {
                return self.told.borrow_mut().resized((device, resized));
            }
            Event::Booted { entry, warnings } => {
                self.told.borrow_mut().set_booted(BootedEntry { entry, warnings });
                return Ok(());
            }
            event => event,
        };
        let mut events = self.events.borrow_mut();
        if events.len() >= MAX_EVENTS {
            let problem = format!("more than {MAX_EVENTS} events without being read");
            return Err(LinkError::Malformed(problem));
        }
        events.push_back(event);
        Ok(())
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

fn link(request: &'static str, source: LinkError) -> ProcessError {
    ProcessError::Link { request, source }
}

/// The error for a reply that does not fit its request.
pub fn unexpected(request: &'static str, reply: &Reply) -> ProcessError {
    ProcessError::Unexpected { request, reply: bounded_text(&format!("{reply:?}")) }
}

fn verb(request: &Request) -> &'static str {
    match request {
        Request::Confine { .. } => "confine itself",
        Request::Boot { .. } => "boot the guest",
        Request::Restore { .. } => "restore the guest",
        Request::Resume => "resume the guest",
        Request::Pause => "pause the guest",
        Request::Save => "save the guest's state",
        Request::SaveFirst => "tell the state in which it began",
        Request::Sync => "sync the guest's disks",
        Request::PressPowerButton => "press the power button",
        Request::SetLink { .. } => "set a link",
        Request::ReportStorage => "report the state of its storage",
        Request::Resize { .. } => "resize a device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::network::Link;
    use crate::guests::process_error::Reasons;

    fn conversation() -> (Conversation, Channel) {
        let (host, vm) = Channel::pair().unwrap();
        (Conversation::new(host), vm)
    }

    fn depth(error: &ProcessError) -> usize {
        crate::causes::chain(error).len()
    }

    #[test]
    fn an_answer_that_was_taken_before_the_host_looks_is_not_waited_for() {
        let (host, vm) = conversation();
        // As a resume that nobody waits for: the host is woken by its answer, but a command comes first and takes it.
        host.notify(Request::Resume).unwrap();
        vm.send(&FromVm::Reply(Reply::Resumed { first_entry_ticks: 7 }), &[]).unwrap();
        host.send(Request::Pause, &[]).unwrap();
        vm.send(&FromVm::Reply(Reply::Paused { last_exit_ticks: 9 }), &[]).unwrap();
        assert_eq!(host.reply().unwrap(), Reply::Paused { last_exit_ticks: 9 });
        assert_eq!(host.events().unwrap(), [], "and it returns, although nothing more comes");
    }

    #[test]
    fn links_are_kept_for_the_status_and_are_no_events() {
        let (host, vm) = conversation();
        let tell = |device: &str, link| {
            let event = Event::Link { device: device.to_owned(), link };
            vm.send(&FromVm::Event(event), &[]).unwrap();
            host.events()
        };
        for (device, link) in [("net@1", Link::Up), ("net@2", Link::Up), ("net@1", Link::Gone)] {
            assert_eq!(tell(device, link).unwrap(), []);
        }
        assert!(!host.has_events());
        let links = host.told().links().clone();
        let links: Vec<_> = links.iter().map(|(node, link)| (node.as_str(), *link)).collect();
        assert_eq!(links, [("net@1", Link::Gone), ("net@2", Link::Up)]);
        tell("a\n", Link::Up).unwrap_err();
    }

    #[test]
    fn a_failure_comes_with_its_causes_outermost_first() {
        let (host, vm) = conversation();
        let said = ["cannot save", "the disk is gone"].map(str::to_owned).to_vec();
        vm.send(&FromVm::Reply(Reply::Failed(said.clone())), &[]).unwrap();
        let error = host.ask(Request::Save).unwrap_err();
        assert_eq!(crate::causes::chain(&error)[1..], said);
        vm.send(&FromVm::Reply(Reply::Failed(Vec::new())), &[]).unwrap();
        let error = host.ask(Request::Save).unwrap_err();
        assert_eq!(crate::causes::chain(&error)[1..], ["no reason"]);
    }

    #[test]
    fn a_failure_with_any_number_of_causes_is_an_error_like_any_other() {
        let (host, vm) = conversation();
        vm.send(&FromVm::Reply(Reply::Failed(vec![String::new(); 40_000])), &[]).unwrap();
        let error = host.ask(Request::Save).unwrap_err();
        assert_eq!(depth(&error), 1 + Reasons::MOST);
    }

    #[test]
    fn the_last_event_is_found_behind_other_messages() {
        let (host, vm) = conversation();
        vm.send(&FromVm::Event(Event::Reset), &[]).unwrap();
        vm.send(&"garbage", &[]).unwrap();
        vm.send(&FromVm::Reply(Reply::Synced), &[]).unwrap();
        vm.send(&FromVm::Event(Event::Crashed("why".to_owned())), &[]).unwrap();
        drop(vm);
        assert_eq!(host.last_words(), Some(Event::Crashed("why".to_owned())));
        assert_eq!(host.last_words(), Some(Event::Reset));
        assert_eq!(host.last_words(), None);
    }

    #[test]
    fn the_answer_that_nobody_waits_for_comes_at_any_time_and_disturbs_no_other() {
        let (host, vm) = conversation();
        host.notify(Request::PressPowerButton).unwrap();
        vm.send(&FromVm::Reply(Reply::Pressed), &[]).unwrap();
        assert_eq!(host.events().unwrap(), []);
        // Behind it comes the answer to another request, and an event between both.
        for refused in [false, true] {
            host.notify(Request::PressPowerButton).unwrap();
            host.notify(Request::PressPowerButton).unwrap();
            host.send(Request::Save, &[]).unwrap();
            let first = if refused { Reply::Failed(Vec::new()) } else { Reply::Pressed };
            vm.send(&FromVm::Reply(first), &[]).unwrap();
            vm.send(&FromVm::Event(Event::Shutdown), &[]).unwrap();
            vm.send(&FromVm::Reply(Reply::Pressed), &[]).unwrap();
            vm.send(&FromVm::Reply(Reply::Saved { bytes: 7 }), &[]).unwrap();
            assert_eq!(host.reply().unwrap(), Reply::Saved { bytes: 7 });
            assert_eq!(host.events().unwrap(), [Event::Shutdown]);
        }
        // An answer too many is an error.
        vm.send(&FromVm::Reply(Reply::Pressed), &[]).unwrap();
        host.events().unwrap_err();
    }

    #[test]
    fn reports_are_kept_whenever_they_come_and_disturb_no_other_answer() {
        let (host, vm) = conversation();
        let known = |host: &Conversation| {
            let told = host.told();
            (told.reports(Instant::now()).is_some(), told.reports_due().is_some())
        };
        assert_eq!(known(&host), (false, false));
        host.ask_for_reports().unwrap();
        host.ask_for_reports().unwrap();
        assert_eq!(known(&host), (false, true));
        // The answer comes before that of the next request.
        let report = || FromVm::Reply(Reply::Storage(Vec::new()));
        vm.send(&report(), &[]).unwrap();
        vm.send(&FromVm::Reply(Reply::Synced), &[]).unwrap();
        assert_eq!(host.ask(Request::Sync).unwrap(), Reply::Synced);
        assert_eq!(known(&host), (true, false));
        // Behind an event, when the host looks.
        host.ask_for_reports().unwrap();
        vm.send(&FromVm::Event(Event::Shutdown), &[]).unwrap();
        vm.send(&report(), &[]).unwrap();
        assert_eq!(host.events().unwrap(), [Event::Shutdown]);
        assert_eq!(known(&host), (true, true));
        assert_eq!(host.events().unwrap(), []);
        assert_eq!(known(&host), (true, false));
        // A refusal is an answer, too.
        host.ask_for_reports().unwrap();
        vm.send(&FromVm::Reply(Reply::Failed(Vec::new())), &[]).unwrap();
        assert_eq!(host.events().unwrap(), []);
        assert_eq!(known(&host), (true, false));
        drop(vm);
        host.ask_for_reports().unwrap_err();
    }

    #[test]
    fn the_end_of_a_resize_is_no_event_of_the_vm() {
        let (host, vm) = conversation();
        let resized = Event::Resized { device: "d@1".to_owned(), resized: Ok(512) };
        vm.send(&FromVm::Event(resized), &[]).unwrap();
        vm.send(&FromVm::Reply(Reply::Synced), &[]).unwrap();
        assert_eq!(host.ask(Request::Sync).unwrap(), Reply::Synced);
        assert!(!host.has_events());
        assert_eq!(host.told().take_resized(), [("d@1".to_owned(), Ok(512))]);
        assert_eq!(host.told().take_resized(), []);
    }

    #[test]
    fn a_process_that_sends_without_end_is_an_error_and_its_messages_are_not_quoted_in_full() {
        let (host, vm) = conversation();
        let talker = std::thread::spawn(move || {
            let link = || Event::Link { device: "net@1".to_owned(), link: Link::Up };
            while vm.send(&FromVm::Event(link()), &[]).is_ok() {}
        });
        let error = host.ask(Request::Pause).unwrap_err();
        assert!(crate::causes::chain(&error)[1].contains("without end"), "{error:?}");
        drop(host);
        talker.join().unwrap();

        let (host, vm) = conversation();
        let unknown = serde_json::json!({"reply": {"z".repeat(100_000): 1}});
        vm.send(&unknown, &[]).unwrap();
        vm.send(&FromVm::Event(Event::Crashed("z".repeat(100_000))), &[]).unwrap();
        let error = host.events().unwrap_err();
        assert!(crate::causes::chain(&error).join(": ").len() < 5000, "{error:?}");
        let Some(Event::Crashed(why)) = host.last_words() else { panic!() };
        assert!(why.len() < 5000);
        // Its other end is still open.
        assert_eq!(host.last_words(), None);
        drop(vm);
    }

    #[test]
    fn a_process_that_only_sends_events_does_not_keep_the_host_waiting() {
        let (host, vm) = conversation();
        let talker =
            std::thread::spawn(move || while vm.send(&FromVm::Event(Event::Reset), &[]).is_ok() {});
        let error = host.ask(Request::Pause).unwrap_err();
        assert!(crate::causes::chain(&error)[1].contains("more than 256 events"), "{error:?}");
        assert_eq!(host.last_words(), Some(Event::Reset));
        drop(host);
        talker.join().unwrap();
    }
}
