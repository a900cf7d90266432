//! The conversation between the host and the process of one VM.
//!
//! The process parses what a guest controls, so it may one day say anything. Whatever it says, the
//! host neither panics nor waits without end: every message has a bound (see [`Channel`]), and so have
//! the causes of a failure and the events that nobody has looked at.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use crate::link::{Channel, Envelope, Event, FromVm, LinkError, Reply, Request, Role};

/// Most events that wait for somebody to look at them. A VM says very few in its whole life.
const MAX_EVENTS: usize = 256;

/// A VM's process could not be started or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It cannot be started.
    #[error("cannot start the VM's process")]
    Spawn(#[source] std::io::Error),
    /// The link to it failed.
    #[error("no answer to `{request}` from the VM's process")]
    Link {
        /// What was asked.
        request: &'static str,
        /// Why there is no answer.
        #[source]
        source: LinkError,
    },
    /// It answered that it cannot.
    #[error("the VM's process cannot {request}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its reasons, outermost first.
        #[source]
        source: Reasons,
    },
    /// It answered something else.
    #[error("the VM's process answered {reply} to `{request}`")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// What came.
        reply: String,
    },
}

/// A chain of causes that came from another process.
#[derive(Debug)]
pub struct Reasons {
    text: String,
    source: Option<Box<Reasons>>,
}

impl Reasons {
    /// Most causes that are kept. A process that is not what it should be may send any number, and
    /// each is one level deeper.
    const MOST: usize = 32;

    fn new(mut chain: Vec<String>) -> Self {
        chain.truncate(Self::MOST);
        let innermost = chain.pop().unwrap_or_else(|| "no reason".to_owned());
        let innermost = Self { text: innermost, source: None };
        chain
            .into_iter()
            .rev()
            .fold(innermost, |source, text| Self { text, source: Some(Box::new(source)) })
    }
}

impl std::fmt::Display for Reasons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Reasons {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

/// The host's end of the link to one process.
#[derive(Debug)]
pub struct Conversation {
    channel: Channel,
    asked: RefCell<VecDeque<&'static str>>,
    events: RefCell<VecDeque<Event>>,
}

impl Conversation {
    /// A conversation at its beginning, over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self { channel, asked: RefCell::default(), events: RefCell::default() }
    }

    /// Sends a request; [`reply`](Self::reply) waits for its answer. Several processes work at the
    /// same time when all are asked before the first is waited for.
    pub fn send(
        &self,
        request: Request,
        fds: &[(Role, BorrowedFd<'_>)],
    ) -> Result<(), ProcessError> {
        let name = verb(&request);
        let (roles, raw): (Vec<Role>, Vec<BorrowedFd<'_>>) = fds.iter().cloned().unzip();
        self.channel
            .send(&Envelope { request, roles }, &raw)
            .map_err(|source| link(name, source))?;
        self.asked.borrow_mut().push_back(name);
        Ok(())
    }

    /// Waits for the answer to the oldest request.
    pub fn reply(&self) -> Result<Reply, ProcessError> {
        let request = self.asked.borrow_mut().pop_front().unwrap_or("nothing");
        loop {
            let (message, _) =
                self.channel.receive::<FromVm>().map_err(|source| link(request, source))?;
            match message {
                FromVm::Event(event) => self.keep(event).map_err(|source| link(request, source))?,
                FromVm::Reply(Reply::Failed(chain)) => {
                    return Err(ProcessError::Refused { request, source: Reasons::new(chain) });
                }
                FromVm::Reply(reply) => return Ok(reply),
            }
        }
    }

    /// Sends a request without fds and waits for its answer. Answers to earlier requests that
    /// nobody waited for, because another VM failed first, are discarded.
    pub fn ask(&self, request: Request) -> Result<Reply, ProcessError> {
        while !self.asked.borrow().is_empty() {
            let _ = self.reply();
        }
        self.send(request, &[])?;
        self.reply()
    }

    /// Whether the process has said something that nobody has looked at yet.
    pub fn has_events(&self) -> bool {
        !self.events.borrow().is_empty()
    }

    /// The last thing that an ended process said unasked, whatever else it said.
    pub fn last_words(&self) -> Option<Event> {
        loop {
            let done = match self.channel.receive::<FromVm>() {
                Ok((FromVm::Event(event), _)) => self.keep(event).is_err(),
                Ok((FromVm::Reply(_), _)) | Err(LinkError::Malformed(_)) => false,
                Err(_) => true,
            };
            if done {
                return self.events.borrow_mut().pop_back();
            }
        }
    }

    /// What the process said unasked, oldest first. Reads one more message if `readable`.
    pub fn events(&self, readable: bool) -> Result<Vec<Event>, ProcessError> {
        if readable {
            let request = "nothing";
            match self.channel.receive::<FromVm>() {
                Ok((FromVm::Event(event), _)) => {
                    self.keep(event).map_err(|source| link(request, source))?;
                }
                Ok((FromVm::Reply(reply), _)) => return Err(unexpected(request, &reply)),
                Err(source) => return Err(link(request, source)),
            }
        }
        Ok(self.events.borrow_mut().drain(..).collect())
    }

    fn keep(&self, event: Event) -> Result<(), LinkError> {
        let mut events = self.events.borrow_mut();
        if events.len() >= MAX_EVENTS {
            let problem = format!("more than {MAX_EVENTS} events that nobody asked for");
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

/// The error for an answer that does not belong to its question.
pub fn unexpected(request: &'static str, reply: &Reply) -> ProcessError {
    ProcessError::Unexpected { request, reply: format!("{reply:?}") }
}

fn verb(request: &Request) -> &'static str {
    match request {
        Request::Boot { .. } => "boot the guest",
        Request::Restore { .. } => "restore the guest",
        Request::Resume => "resume the guest",
        Request::Pause => "pause the guest",
        Request::Save => "save the guest's state",
        Request::Sync => "sync the guest's disks",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> (Conversation, Channel) {
        let (host, vm) = Channel::pair().unwrap();
        (Conversation::new(host), vm)
    }

    fn depth(error: &ProcessError) -> usize {
        crate::causes::chain(error).len()
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
    fn the_last_words_of_a_process_are_heard_behind_anything() {
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
    fn a_process_that_only_tells_of_events_is_not_listened_to_for_ever() {
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
