//! Compares the backends of the built-in LUO with its state machine, for random sequences of calls.
//!
//! The same calls go to a backend with real files and to a state machine whose files are numbers
//! (the model). Every answer must be the same, and every retrieved file must contain the number of
//! its file in the model. With a pool, the host may also crash between any two calls; the next host
//! starts with the files on disk.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod model;
mod subject;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use luo::builtin::SessionId;
use luo::{Errno, Error, Incoming, Outgoing, SessionName, Token};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use model::Model;
use subject::{KeeperSubject, PoolSubject, Subject};

/// One call. `usize` numbers select one of the present sessions or files, modulo their number.
#[derive(Debug, Clone)]
enum Call {
    Create(u8),
    Preserve { session: usize, token: u64, file: usize },
    CloseOutgoing(usize),
    RetrieveSession(u8),
    Retrieve { session: usize, token: u64 },
    Finish(usize),
    CloseIncoming(usize),
    DropFile(usize),
    Switch,
    SwitchThatFails,
    Crash,
}

fn call() -> impl Strategy<Value = Call> {
    let preserve = (any::<usize>(), 0..4_u64, any::<usize>())
        .prop_map(|(session, token, file)| Call::Preserve { session, token, file });
    let retrieve =
        (any::<usize>(), 0..4_u64).prop_map(|(session, token)| Call::Retrieve { session, token });
    prop_oneof![
        4 => (0..3_u8).prop_map(Call::Create),
        8 => preserve,
        1 => any::<usize>().prop_map(Call::CloseOutgoing),
        4 => (0..3_u8).prop_map(Call::RetrieveSession),
        6 => retrieve,
        2 => any::<usize>().prop_map(Call::Finish),
        1 => any::<usize>().prop_map(Call::CloseIncoming),
        1 => any::<usize>().prop_map(Call::DropFile),
        3 => Just(Call::Switch),
        1 => Just(Call::SwitchThatFails),
        1 => Just(Call::Crash),
    ]
}

fn name(number: u8) -> SessionName {
    SessionName::new(format!("session-{number}")).unwrap()
}

/// The backend and the model, with the sessions and files that the process holds.
struct Run<S> {
    subject: S,
    model: Model,
    outgoing: Vec<(Outgoing, SessionId)>,
    incoming: Vec<(Incoming, SessionId)>,
    /// The open files, by the object of the model that they stand for.
    files: BTreeMap<u32, OwnedFd>,
    last_object: u32,
}

type Outcome = Result<(), TestCaseError>;

fn errno_of<T>(answer: &Result<T, Error>) -> Option<Errno> {
    answer.as_ref().err().map(|error| error.errno().unwrap_or(Errno::NOSYS))
}

fn same<T, U>(real: &Result<T, Error>, model: &Result<U, Errno>) -> Outcome {
    prop_assert_eq!(errno_of(real), model.as_ref().err().copied());
    Ok(())
}

impl<S: Subject> Run<S> {
    fn new() -> Self {
        let mut run = Self {
            subject: S::new(),
            model: Model::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            files: BTreeMap::new(),
            last_object: 0,
        };
        run.make_files();
        run
    }

    /// Creates files that are not preserved, as a new process has them.
    fn make_files(&mut self) {
        for _ in 0..4 {
            self.last_object += 1;
            let file = self.subject.file(self.last_object);
            rustix::io::pwrite(&file, &self.last_object.to_le_bytes(), 0).unwrap();
            self.files.insert(self.last_object, file);
        }
    }

    /// Drops all sessions and files, as the end of the process does.
    fn end(&mut self) {
        self.outgoing.clear();
        self.incoming.clear();
        self.files.clear();
    }

    fn call(&mut self, call: &Call) -> Outcome {
        match *call {
            Call::Create(number) => {
                let real = self.subject.orchestrator().create_session(&name(number));
                let model = self.model.create(&name(number));
                same(&real, &model)?;
                self.outgoing.extend(real.ok().zip(model.ok()));
            }
            Call::Preserve { session, token, file } => self.preserve(session, token, file)?,
            Call::CloseOutgoing(session) if !self.outgoing.is_empty() => {
                let (real, model) = self.outgoing.remove(session % self.outgoing.len());
                drop(real);
                self.model.close(model);
            }
            Call::RetrieveSession(number) => {
                let real = self.subject.orchestrator().retrieve_session(&name(number));
                let model = self.model.retrieve_session(&name(number));
                same(&real, &model)?;
                self.incoming.extend(real.ok().zip(model.ok()));
            }
            Call::Retrieve { session, token } => self.retrieve(session, token)?,
            Call::Finish(session) if !self.incoming.is_empty() => {
                let (real, model) = self.incoming.remove(session % self.incoming.len());
                prop_assert!(real.finish().is_ok());
                self.model.finish_and_close(model);
            }
            Call::CloseIncoming(session) if !self.incoming.is_empty() => {
                let (real, model) = self.incoming.remove(session % self.incoming.len());
                drop(real);
                self.model.close(model);
            }
            Call::DropFile(file) if self.files.len() > 1 => {
                let object = *self.files.keys().nth(file % self.files.len()).unwrap();
                self.files.remove(&object);
                self.subject.collect();
            }
            Call::Switch => {
                let handed_over = self.subject.leave();
                prop_assert_eq!(handed_over, Ok(()));
                self.end();
                self.subject.arrive();
                self.model.switch();
                self.make_files();
            }
            Call::SwitchThatFails => {
                self.subject.leave_in_vain();
                self.model.switch_in_vain();
            }
            Call::Crash if S::SURVIVES_A_CRASH => {
                self.end();
                self.subject.crash();
                self.model.crash();
                self.make_files();
            }
            _ => {}
        }
        prop_assert_eq!(self.subject.liveupdate_number(), self.model.liveupdate_number());
        Ok(())
    }

    fn preserve(&self, session: usize, token: u64, file: usize) -> Outcome {
        if self.outgoing.is_empty() {
            return Ok(());
        }
        let (real, model) = &self.outgoing[session % self.outgoing.len()];
        let (object, fd) = self.files.iter().nth(file % self.files.len()).unwrap();
        let real = real.preserve(fd.as_fd(), Token(token));
        same(&real, &self.model.preserve(*model, Token(token), *object))
    }

    fn retrieve(&mut self, session: usize, token: u64) -> Outcome {
        if self.incoming.is_empty() {
            return Ok(());
        }
        let (real, model) = &self.incoming[session % self.incoming.len()];
        let real = real.retrieve(Token(token));
        let model = self.model.retrieve(*model, Token(token));
        same(&real, &model)?;
        if let (Ok(real), Ok(object)) = (real, model) {
            let mut contents = [0; 4];
            rustix::io::pread(&real, &mut contents, 0).unwrap();
            prop_assert_eq!(u32::from_le_bytes(contents), object);
            self.files.insert(object, real);
        }
        Ok(())
    }
}

fn run<S: Subject>(calls: &[Call]) -> Outcome {
    let mut run = Run::<S>::new();
    calls.iter().try_for_each(|call| run.call(call))?;
    // The backend has removed every file that no process and no incoming session holds.
    run.outgoing.clear();
    run.files.clear();
    for (session, _) in run.incoming.drain(..) {
        prop_assert!(session.finish().is_ok());
    }
    if let Some(files) = run.subject.file_count() {
        prop_assert_eq!(files, run.model.waiting_files());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_keeper_answers_every_sequence_of_calls_as_the_state_machine_does(
        calls in prop::collection::vec(call(), 1..60)
    ) {
        run::<KeeperSubject>(&calls)?;
    }

    #[test]
    fn a_pool_answers_every_sequence_of_calls_and_crashes_as_the_state_machine_does(
        calls in prop::collection::vec(call(), 1..60)
    ) {
        run::<PoolSubject>(&calls)?;
    }
}
