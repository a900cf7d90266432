//! A command that the process of a VM carries out: a pause, a resume, or a dump. A process that hangs answers late or
//! never, so the host's loop does not wait for it, and serves all else.
//!
//! ```text
//!   pause     Pause --------------------answer--> paused     late: Resume is sent behind it
//!   resume    Resume -------------------answer--> running    late: it counts as running
//!   dump      [Pause] Save [Resume] ---answers--> document --written to its file--> done
//! ```
//!
//! The requests of a dump are sent all at once, so that a guest that was paused for it is resumed whatever happens
//! to the command. When the VM ends, its errand ends with it.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::conversation::{ANSWER_WITHIN, ProcessError, unexpected};
use super::elsewhere::Elsewhere;
use super::guest::{Guest, GuestError, Life, Live};
use super::memfd::{read_document, scratch_memfd};
use crate::link::{LinkError, Reply, Request, Role};
use crate::machine::VmName;

/// A command that the process of a VM carries out.
#[derive(Debug)]
pub struct Errand {
    kind: Kind,
    /// When the command has failed if it has not ended.
    deadline: Instant,
}

#[derive(Debug)]
enum Kind {
    Pause,
    Resume,
    Dump(Dump),
}

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Done {
    /// What was asked.
    AsAsked,
    /// The state document, which was asked for.
    Document(Vec<u8>),
}

#[derive(Debug)]
struct Dump {
    /// The file to which the process writes the document.
    scratch: File,
    /// Where the document goes; `None` if it goes into the reply.
    path: Option<PathBuf>,
    /// The requests that are not answered yet, in words.
    asked: VecDeque<&'static str>,
    /// The first answer that was none, or else the size of the document.
    saved: Result<Option<u64>, ProcessError>,
    writing: Option<Elsewhere<io::Result<()>>>,
}

impl Guest {
    /// Begins to stop the vCPUs and the devices.
    pub fn begin_pause(&mut self) -> Result<(), GuestError> {
        self.begin_errand(Some(true), "only a VM that runs can be paused", |live| {
            live.process.send_for_later(Request::Pause, &[])?;
            Ok(Kind::Pause)
        })
    }

    /// Begins to resume the vCPUs and the devices.
    pub fn begin_resume(&mut self) -> Result<(), GuestError> {
        self.begin_errand(Some(false), "only a VM that is paused can be resumed", |live| {
            live.process.send_for_later(Request::Resume, &[])?;
            Ok(Kind::Resume)
        })
    }

    /// Begins to write the state document to a new file at `path`, or to get it. A running VM is paused meanwhile.
    pub fn begin_dump(&mut self, path: Option<PathBuf>) -> Result<(), GuestError> {
        let name = self.name();
        let scratch =
            scratch_memfd("dump").map_err(|source| GuestError::Document { name, source })?;
        self.begin_errand(None, "only a VM that runs or is paused has a state", |live| {
            Dump::begin(live, scratch, path).map(Kind::Dump)
        })
    }

    /// Begins a command for a VM that has a process, and whose vCPUs run or not as is `needed`.
    fn begin_errand(
        &mut self,
        needed: Option<bool>,
        remedy: &'static str,
        begin: impl FnOnce(&Live) -> Result<Kind, ProcessError>,
    ) -> Result<(), GuestError> {
        self.check_free()?;
        let (name, wrong) = (self.name(), self.wrong_state(remedy));
        let Life::Live(live) = &mut self.life else { return Err(wrong) };
        if needed.is_some_and(|needed| needed != live.running) {
            return Err(wrong);
        }
        let kind = begin(live).map_err(|source| GuestError::Process { name, source })?;
        live.errand = Some(Box::new(Errand { kind, deadline: Instant::now() + ANSWER_WITHIN }));
        Ok(())
    }

    /// Errors if a command is being carried out for this VM.
    pub fn check_free(&self) -> Result<(), GuestError> {
        match self.busy() {
            Some(done) => Err(GuestError::Busy { name: self.name(), done }),
            None => Ok(()),
        }
    }

    /// What a command is doing with the VM, as in "it is being paused". `None` if no command is being carried out.
    pub fn busy(&self) -> Option<&'static str> {
        let of_errand = |errand: &Errand| match errand.kind {
            Kind::Pause => "paused",
            Kind::Resume => "resumed",
            Kind::Dump(_) => "dumped",
        };
        match &self.life {
            Life::Restoring(_) => Some("restored"),
            _ if self.boots_by_command() => Some("booted"),
            _ => self.errand().map(of_errand),
        }
    }

    /// Whether a process carries out a command.
    pub fn has_errand(&self) -> bool {
        self.errand().is_some()
    }

    /// The error of a command that was to have the VM `wanted`, and ended with the VM or with the host.
    pub fn dropped(&self, wanted: &'static str) -> GuestError {
        GuestError::Dropped { name: self.name(), state: self.state(), wanted }
    }

    fn errand(&self) -> Option<&Errand> {
        match &self.life {
            Life::Live(live) => live.errand.as_deref(),
            _ => None,
        }
    }

    /// Returns when to call [`go_on_with_errand`](Self::go_on_with_errand) at the latest.
    pub fn errand_due(&self) -> Option<Instant> {
        self.errand().map(|errand| errand.deadline)
    }

    /// What becomes readable when a document is written. The main loop waits for the answers of VMs' processes anyway.
    pub fn errand_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.errand()?.kind {
            Kind::Dump(Dump { writing: Some(writing), .. }) => Some(writing.as_fd()),
            _ => None,
        }
    }

    /// Takes the command on as far as its answers have come. Returns its end, if it has ended or is late.
    pub fn go_on_with_errand(&mut self) -> Option<Result<Done, GuestError>> {
        let name = self.name();
        let Life::Live(live) = &mut self.life else { return None };
        let mut errand = live.errand.take()?;
        let ended = errand.go_on(live, &name).or_else(|| {
            let is_late = errand.deadline <= Instant::now();
            is_late.then(|| {
                errand.gives_up(live);
                Err(errand.is_late(&name))
            })
        });
        if ended.is_none() {
            live.errand = Some(errand);
        }
        ended
    }

    /// Gives up the command that is being carried out, if there is one: a guest that was to be paused runs on.
    pub fn give_up_errand(&mut self) {
        let Life::Live(live) = &mut self.life else { return };
        if let Some(errand) = live.errand.take() {
            errand.gives_up(live);
        }
    }
}

impl Errand {
    fn go_on(&mut self, live: &mut Live, name: &VmName) -> Option<Result<Done, GuestError>> {
        let ended = match &mut self.kind {
            Kind::Dump(dump) => return dump.go_on(live, name),
            Kind::Pause => match live.process.take_kept()? {
                Ok(Reply::Paused { .. }) => Ok(false),
                Ok(other) => Err(unexpected("pause", &other)),
                Err(error) => Err(error),
            },
            Kind::Resume => match live.process.take_kept()? {
                Ok(Reply::Resumed { .. }) => Ok(true),
                Ok(other) => Err(unexpected("resume", &other)),
                Err(error) => Err(error),
            },
        };
        Some(match ended {
            Ok(running) => {
                live.running = running;
                Ok(Done::AsAsked)
            }
            Err(source) => Err(GuestError::Process { name: name.clone(), source }),
        })
    }

    /// The process owes its answers from now on.
    fn gives_up(&self, live: &mut Live) {
        live.process.forget_kept();
        match self.kind {
            // When the process answers, it has paused; it resumes then, as if it had not been asked.
            Kind::Pause => drop(live.process.notify(Request::Resume)),
            // When the process answers, it has resumed.
            Kind::Resume => live.running = true,
            Kind::Dump(_) => {}
        }
    }

    fn is_late(&self, name: &VmName) -> GuestError {
        let request = match &self.kind {
            Kind::Pause => "pause the guest",
            Kind::Resume => "resume the guest",
            Kind::Dump(Dump { path: Some(path), writing: Some(_), .. }) => {
                let problem = "it is not written yet: its file system hangs";
                return not_written(name, path, io::Error::new(io::ErrorKind::TimedOut, problem));
            }
            Kind::Dump(_) => "save the guest's state",
        };
        let source = ProcessError::Link { request, source: LinkError::TimedOut };
        GuestError::Process { name: name.clone(), source }
    }
}

impl Dump {
    fn begin(live: &Live, scratch: File, path: Option<PathBuf>) -> Result<Self, ProcessError> {
        let asked = match live.running {
            true => VecDeque::from(["pause", "save", "resume"]),
            false => VecDeque::from(["save"]),
        };
        let send = |request: &&str| match *request {
            "pause" => live.process.send_for_later(Request::Pause, &[]),
            "save" => live.process.send_for_later(Request::Save, &[(Role::State, scratch.as_fd())]),
            _ => live.process.send_for_later(Request::Resume, &[]),
        };
        asked.iter().try_for_each(send).inspect_err(|_| {
            live.process.forget_kept();
            if live.running {
                drop(live.process.notify(Request::Resume));
            }
        })?;
        Ok(Self { scratch, path, asked, saved: Ok(None), writing: None })
    }

    fn go_on(&mut self, live: &Live, name: &VmName) -> Option<Result<Done, GuestError>> {
        if let Some(writing) = &self.writing {
            let written =
                writing.take()?.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            let path = self.path.as_deref().unwrap_or(Path::new(""));
            return Some(match written {
                Ok(()) => Ok(Done::AsAsked),
                Err(source) => Err(not_written(name, path, source)),
            });
        }
        while !self.asked.is_empty() {
            let answer = live.process.take_kept()?;
            self.note(answer);
        }
        match self.document(name) {
            Err(error) => Some(Err(error)),
            Ok(document) => match self.path.clone() {
                None => Some(Ok(Done::Document(document))),
                Some(path) => {
                    let to = path.clone();
                    let what = format!("writing the state of VM `{name}` to {}", path.display());
                    match Elsewhere::begin("dump", what, move || write(&to, &document)) {
                        Ok(writing) => self.writing = Some(writing),
                        Err(error) => return Some(Err(not_written(name, &path, error))),
                    }
                    None
                }
            },
        }
    }

    /// Notes the answer to the oldest request.
    fn note(&mut self, answer: Result<Reply, ProcessError>) {
        let saved = match (self.asked.pop_front(), answer) {
            (Some("save"), Ok(Reply::Saved { bytes })) => Ok(Some(bytes)),
            (Some("pause"), Ok(Reply::Paused { .. }))
            | (Some("resume"), Ok(Reply::Resumed { .. })) => return,
            (request, Ok(other)) => Err(unexpected(request.unwrap_or("save"), &other)),
            (_, Err(error)) => Err(error),
        };
        if self.saved.is_ok() {
            self.saved = saved;
        }
    }

    /// Returns the document that the process has written.
    fn document(&mut self, name: &VmName) -> Result<Vec<u8>, GuestError> {
        let name = || name.clone();
        let saved = std::mem::replace(&mut self.saved, Ok(None));
        let bytes = saved.map_err(|source| GuestError::Process { name: name(), source })?;
        read_document(&self.scratch, bytes.unwrap_or(0))
            .map_err(|source| GuestError::Document { name: name(), source })
    }
}

/// Writes a document to a new file.
fn write(path: &Path, document: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // A part of a document is of no use, and would stand in the way of the next attempt.
    file.write_all(document).inspect_err(|_| drop(fs::remove_file(path)))
}

fn not_written(name: &VmName, path: &Path, source: io::Error) -> GuestError {
    GuestError::Dump { name: name.clone(), path: path.to_owned(), source }
}
