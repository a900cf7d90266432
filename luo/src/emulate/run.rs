//! Runs one generation after another until the program ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::Pid;

use super::kernel::{Kernel, StartError, Verdict};
use super::memfd::Store;
use super::notify::{Answer, Listener};
use super::program::{Exit, Program, Surroundings, end_all, reap};
use super::state::{self, Directory, State};
use super::tracee::Tracee;
use super::{Error, NUMBER_VARIABLE, Options};
use crate::builtin::tree::v1;

/// How a generation ended.
#[derive(Debug)]
enum End {
    /// The program ended.
    Exit(Exit),
    /// Switch to the next kernel, with this handover tree.
    Switch(Vec<u8>),
}

/// Runs a program under the emulator until it ends, and returns how it ended. No process of the
/// program is left afterwards.
///
/// Call this from the main thread of a process without other children: the process becomes the
/// reaper of the program's orphans, waits for every child, and kills every child at the end.
pub fn run(program: &Program, options: &Options) -> Result<Exit, Error> {
    let surroundings =
        Surroundings::enter().map_err(system("cannot prepare signals and limits"))?;
    run_generations(program, options, &surroundings)
}

fn run_generations(
    program: &Program,
    options: &Options,
    surroundings: &Surroundings,
) -> Result<Exit, Error> {
    let opened = options.state.as_deref().map(Directory::open).transpose()?;
    let (directory, state) = opened.map_or((None, None), |(d, state)| (Some(d), state));
    let (mut tree, store) = match state {
        Some(State { tree, files }) => (Some(tree), Store::with(files)),
        None => (None, Store::default()),
    };
    loop {
        let kernel = Kernel::start(tree.as_deref(), &store).map_err(|error| match error {
            StartError::Tree(disabled) => disabled.into(),
            StartError::System(errno) => system("cannot start the emulated kernel")(errno),
        })?;
        let number = kernel.luo.liveupdate_number().to_string();
        let (first, listener) = surroundings.start(program, &[(NUMBER_VARIABLE, number)])?;
        let store = &store;
        let mut generation =
            Generation { kernel, listener, first, store, directory: directory.as_ref(), options };
        let reachable = Tracee::new(first.as_raw_nonzero().get().cast_unsigned()).reachable();
        let end = reachable
            .map_err(|errno| Error::Reach { errno })
            .and_then(|()| generation.run(surroundings));
        // Before the listener is closed: its close would let waiting threads continue.
        end_all().map_err(system("cannot end the remaining processes"))?;
        drop(generation);
        match end? {
            End::Exit(exit) => return Ok(exit),
            End::Switch(_) if directory.is_some() => return Ok(Exit::Status(0)),
            End::Switch(bytes) => {
                // This process encoded the tree, so it can be decoded.
                if let Ok(handover) = v1::decode(&bytes) {
                    store.keep_only(&handover);
                }
                tree = Some(bytes);
            }
        }
    }
}

fn system(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Supervise { what, errno }
}

/// A running generation: an emulated kernel and its program.
struct Generation<'a> {
    kernel: Kernel,
    listener: Listener,
    /// The program's first process.
    first: Pid,
    store: &'a Store,
    directory: Option<&'a Directory>,
    options: &'a Options,
}

/// The epoll data of the two event sources.
const CALLS: u64 = 0;
const SIGNALS: u64 = 1;

impl Generation<'_> {
    fn run(&mut self, surroundings: &Surroundings) -> Result<End, Error> {
        let events = self.events(surroundings).map_err(system("cannot set up an epoll"))?;
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(2);
        loop {
            ready.clear();
            match epoll::wait(&events, spare_capacity(&mut ready), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("cannot wait for events")(errno)),
            }
            for event in &ready {
                let epoll::Event { data, flags } = *event;
                let end = match data.u64() {
                    SIGNALS => self.take_signals(surroundings)?,
                    _ if flags.contains(epoll::EventFlags::IN) => self.answer_one()?,
                    // The listener is hung up: all processes are dead, and SIGCHLD will follow.
                    _ => None,
                };
                if let Some(end) = end {
                    return Ok(end);
                }
            }
        }
    }

    fn events(&self, surroundings: &Surroundings) -> Result<OwnedFd, Errno> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: BorrowedFd<'_>, number| {
            epoll::add(&events, fd, epoll::EventData::new_u64(number), epoll::EventFlags::IN)
        };
        add(self.listener.as_fd(), CALLS)?;
        add(surroundings.as_fd(), SIGNALS)?;
        Ok(events)
    }

    fn answer_one(&mut self) -> Result<Option<End>, Error> {
        let call = match self.listener.receive() {
            Ok(Some(call)) => call,
            Ok(None) => return Ok(None),
            Err(errno) => return Err(system("cannot receive a system call")(errno)),
        };
        self.kernel.release_closed_files().map_err(system("cannot find closed files"))?;
        let answer = match self.kernel.judge(&self.listener, &call) {
            Verdict::Answer(answer) => answer,
            Verdict::Done => return Ok(None),
            Verdict::Reboot if !self.listener.waits(call.id) => return Ok(None),
            Verdict::Reboot => match self.switch() {
                Ok(tree) => return Ok(Some(End::Switch(tree))),
                Err((errno, _)) => Answer::Errno(errno),
            },
        };
        match self.listener.answer(call.id, answer) {
            // ENOENT: the thread was killed meanwhile.
            Ok(()) | Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(system("cannot answer a system call")(errno)),
        }
    }

    fn take_signals(&mut self, surroundings: &Surroundings) -> Result<Option<End>, Error> {
        surroundings.take_signals(self.first).map_err(system("cannot read a signal"))?;
        let exit = reap(self.first).map_err(system("cannot wait for a process"))?;
        match exit {
            Some(Exit::Status(0)) if self.options.kexec => {}
            exit => return Ok(exit.map(End::Exit)),
        }
        self.kernel.release_closed_files().map_err(system("cannot find closed files"))?;
        let switched = self.switch();
        switched
            .map(|tree| Some(End::Switch(tree)))
            .map_err(|(errno, source)| Error::Switch { errno, source })
    }

    /// Hands over all outgoing sessions and returns the handover tree. An error changes nothing.
    fn switch(&mut self) -> Result<Vec<u8>, (Errno, Option<state::Error>)> {
        let (mut tree, mut problem) = (Vec::new(), None);
        let switched = self.kernel.luo.reboot(|bytes| {
            tree = bytes.to_vec();
            let saved = self.directory.map_or(Ok(()), |d| d.save(bytes, self.store));
            saved.map_err(|error| {
                problem = Some(error);
                Errno::AGAIN
            })
        });
        switched.map(|()| tree).map_err(|errno| (errno, problem))
    }
}
