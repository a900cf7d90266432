//! Compares the state machine with the simple model: any sequence of calls must give the same
//! answers and the same callbacks.
//!
//! The sequences span several generations, and any callback may fail. They use few names, tokens
//! and objects, so that calls often concern the same ones.

use luo::builtin::scripted::{Callback, Script, ScriptedFile};
use luo::builtin::tree::{FileRecord, FlbRecord, Handover, SessionRecord, v1};
use luo::builtin::{FlbId, Limits, Luo, Name, Parameters, SessionId};
use luo::{Errno, Token};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::reference::{Handler, Reference, Retrieved};
use crate::support::compatible;

const FLBS: &[(&str, u64)] = &[("bus-v1", 0x100), ("map-v1", 0x200)];

/// Two handlers that accept the same files, and one that a later kernel may lack.
const HANDLERS: [Handler; 3] = [
    Handler { name: "object-v1", kinds: &[1], by_object: true, flbs: &[0] },
    Handler { name: "open-v1", kinds: &[2, 1], by_object: false, flbs: &[0, 1] },
    Handler { name: "lost-v1", kinds: &[3], by_object: true, flbs: &[] },
];

const LIMITS: Limits = Limits { sessions: 4, sessions_errno: Errno::NOSPC, files: 4 };

#[derive(Debug, Clone)]
enum Step {
    OpenDevice,
    CloseDevice,
    Create(Vec<u8>),
    RetrieveSession(Vec<u8>),
    OnSession(Index, OnSession),
    Open {
        kind: u32,
        object: u32,
    },
    RetrieveFlb(usize),
    Break(Callback, u32),
    Mend(Callback, u32),
    Reboot {
        finalize: bool,
        lose_a_handler: bool,
    },
    /// The first calls of a program after a switch: retrieves all sessions.
    ComeBack,
}

#[derive(Debug, Clone)]
enum OnSession {
    Return,
    Preserve { token: u64, file: Option<Index> },
    Retrieve { token: u64 },
    Finish,
    Close,
}

fn any_step_on_session() -> impl Strategy<Value = OnSession> {
    let token = || 0_u64..4;
    let file = prop::option::weighted(0.95, any::<Index>());
    prop_oneof![
        1 => Just(OnSession::Return),
        16 => (token(), file).prop_map(|(token, file)| OnSession::Preserve { token, file }),
        10 => token().prop_map(|token| OnSession::Retrieve { token }),
        3 => Just(OnSession::Finish),
        4 => Just(OnSession::Close),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let name = || {
        prop::sample::select(vec!["a", "b", "c", "", "\u{1}"]).prop_map(|name| {
            // "\u{1}" stands for a name that is too long.
            if name == "\u{1}" { vec![b'x'; 64] } else { name.as_bytes().to_vec() }
        })
    };
    let breakable = || {
        use Callback::*;
        let callback = prop::sample::select(vec![
            CanPreserve,
            Preserve,
            Freeze,
            Retrieve,
            CanFinish,
            FlbPreserve,
            FlbRetrieve,
        ]);
        (callback, 0_u32..4)
    };
    prop_oneof![
        2 => Just(Step::OpenDevice),
        1 => Just(Step::CloseDevice),
        6 => name().prop_map(Step::Create),
        6 => name().prop_map(Step::RetrieveSession),
        34 => (any::<Index>(), any_step_on_session())
            .prop_map(|(session, step)| Step::OnSession(session, step)),
        6 => (1_u32..5, 1_u32..4).prop_map(|(kind, object)| Step::Open { kind, object }),
        2 => (0..FLBS.len()).prop_map(Step::RetrieveFlb),
        2 => breakable().prop_map(|(callback, object)| Step::Break(callback, object)),
        4 => breakable().prop_map(|(callback, object)| Step::Mend(callback, object)),
        4 => (prop::bool::weighted(0.8), prop::bool::weighted(0.1))
            .prop_map(|(finalize, lose_a_handler)| Step::Reboot { finalize, lose_a_handler }),
        4 => Just(Step::ComeBack),
    ]
}

struct World {
    script: Script,
    luo: Luo<ScriptedFile>,
    flbs: Vec<FlbId>,
    reference: Reference,
    /// Every session that this kernel gave out, with its identifier in the state machine and in the
    /// model.
    sessions: Vec<(SessionId, usize)>,
    files: Vec<ScriptedFile>,
}

fn start(
    script: &Script,
    handlers: &[Handler],
    tree: Result<Vec<u8>, Errno>,
) -> (Luo<ScriptedFile>, Vec<FlbId>) {
    let mut luo = Luo::start(Parameters { limits: LIMITS, ..Parameters::default() }, || tree);
    let flb = |&(name, handle)| luo.register_flb(script.flb(compatible(name), handle)).unwrap();
    let flbs: Vec<FlbId> = FLBS.iter().map(flb).collect();
    for Handler { name, kinds, by_object, flbs: needed } in handlers {
        let handler = script.handler(compatible(name), kinds, *by_object);
        let handler = luo.register_handler(handler).unwrap();
        needed.iter().for_each(|flb| luo.bind_flb(handler, flbs[*flb]).unwrap());
    }
    (luo, flbs)
}

/// Returns a name field with arbitrary bytes after the NUL.
fn field(name: &[u8]) -> [u8; 64] {
    let mut field = [0xaa; 64];
    field[..name.len()].copy_from_slice(name);
    if let Some(end) = field.get_mut(name.len()) {
        *end = 0;
    }
    field
}

impl World {
    fn new() -> Self {
        let script = Script::new();
        let (luo, flbs) = start(&script, &HANDLERS, Err(Errno::NOENT));
        let reference = Reference::new(HANDLERS.to_vec(), FLBS, (LIMITS.sessions, LIMITS.files));
        Self { script, luo, flbs, reference, sessions: Vec::new(), files: Vec::new() }
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        if matches!(step, Step::ComeBack) {
            let names = ["a", "b", "c"].map(|name| Step::RetrieveSession(name.into()));
            self.step(&Step::OpenDevice)?;
            self.step(&Step::CloseDevice)?;
            return names.iter().try_for_each(|step| self.step(step));
        }
        let Self { script, luo, flbs, reference, sessions, files } = self;
        match step {
            Step::OpenDevice => prop_assert_eq!(luo.open_device(), reference.open_device()),
            Step::CloseDevice => prop_assert_eq!(luo.close_device(), reference.close_device()),
            Step::Create(name) => {
                let made = luo.create_session(&field(name), |_| Ok(()));
                let expected = reference.create(name);
                prop_assert_eq!(made.map(drop), expected.map(drop));
                sessions.extend(made.ok().zip(expected.ok()));
            }
            Step::RetrieveSession(name) => {
                let found = luo.retrieve_session(&field(name), |_| Ok(()));
                let expected = reference.retrieve_session(name);
                prop_assert_eq!(found.map(drop), expected.map(drop));
                sessions.extend(found.ok().zip(expected.ok()));
            }
            Step::OnSession(_, _) if sessions.is_empty() => {}
            Step::OnSession(index, step) => {
                let session = *index.get(sessions);
                self.step_on_session(session, step)?;
            }
            Step::Open { kind, object } => files.push(script.open(*kind, *object)),
            Step::RetrieveFlb(flb) => {
                prop_assert_eq!(luo.retrieve_flb(flbs[*flb]), reference.retrieve_flb(*flb));
            }
            Step::Break(callback, object) => {
                script.fail(*callback, *object, Errno::NOMEM);
                reference.faults.push((*callback, *object, Errno::NOMEM));
            }
            Step::Mend(callback, object) => {
                script.mend(*callback, *object);
                reference.faults.retain(|(c, o, _)| (c, o) != (callback, object));
            }
            Step::Reboot { finalize, lose_a_handler } => {
                self.reboot(*finalize, *lose_a_handler)?;
            }
            Step::ComeBack => {}
        }
        self.compare()
    }

    fn step_on_session(
        &mut self,
        (id, simple): (SessionId, usize),
        step: &OnSession,
    ) -> Result<(), TestCaseError> {
        let Self { luo, reference, files, .. } = self;
        match step {
            OnSession::Return => {
                prop_assert_eq!(luo.return_session(id), reference.return_session(simple));
            }
            OnSession::Preserve { token, file } => {
                let file = file.filter(|_| !files.is_empty()).map(|index| *index.get(files));
                let answer = luo.preserve_fd(id, Token(*token), file);
                prop_assert_eq!(answer, reference.preserve(simple, *token, file));
            }
            OnSession::Retrieve { token } => {
                match (luo.retrieve_fd(id, Token(*token)), reference.retrieve(simple, *token)) {
                    (Ok(file), Ok(Retrieved::Same(same))) => prop_assert_eq!(file, same),
                    (Ok(file), Ok(Retrieved::New { kind, object })) => {
                        prop_assert_eq!((file.kind, file.object), (kind, object));
                        prop_assert!(files.iter().all(|f| f.description != file.description));
                        reference.made(simple, *token, file);
                        files.push(file);
                    }
                    (answer, expected) => {
                        prop_assert_eq!(answer.map(drop), expected.map(drop));
                    }
                }
            }
            OnSession::Finish => prop_assert_eq!(luo.finish(id), reference.finish(simple)),
            OnSession::Close => prop_assert_eq!(luo.close_session(id), reference.close(simple)),
        }
        Ok(())
    }

    fn reboot(&mut self, finalize: bool, lose_a_handler: bool) -> Result<(), TestCaseError> {
        let finalized = if finalize { Ok(()) } else { Err(Errno::IO) };
        let mut tree = None;
        let answer = self.luo.reboot(|bytes| {
            tree = Some(bytes.to_vec());
            finalized
        });
        prop_assert_eq!(answer, self.reference.reboot(finalized));
        if answer.is_err() {
            return Ok(());
        }
        let tree = tree.unwrap();
        let handover = v1::decode(&tree).unwrap();
        prop_assert_eq!(handover.number, self.reference.number + 1);
        let sessions: Vec<_> = handover
            .sessions
            .iter()
            .map(|session| {
                let files = session.files.iter().map(|file| (file.token.0, file.data));
                (session.name.as_bytes().to_vec(), files.collect::<Vec<_>>())
            })
            .collect();
        prop_assert_eq!(sessions, self.reference.preserved());
        let flbs: Vec<_> =
            handover.flbs.iter().map(|flb| (flb.compatible.to_string(), flb.count)).collect();
        prop_assert_eq!(flbs, self.reference.preserved_flbs());

        self.compare()?;
        let handlers = if lose_a_handler { &HANDLERS[..2] } else { &HANDLERS[..] };
        self.reference = self.reference.next(handlers.to_vec());
        (self.luo, self.flbs) = start(&self.script, handlers, Ok(tree));
        prop_assert_eq!(self.luo.disabled(), None);
        prop_assert_eq!(self.luo.liveupdate_number(), self.reference.number);
        self.sessions.clear();
        self.files.clear();
        Ok(())
    }

    fn compare(&mut self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.script.take_calls(), std::mem::take(&mut self.reference.calls));
        if !self.luo.is_handed_over() {
            for (id, simple) in &self.sessions {
                let name = self.luo.session_name(*id).map(|name| name.as_bytes().to_vec());
                prop_assert_eq!(name, self.reference.name(*simple));
            }
        }
        Ok(())
    }
}

/// A tree that no state machine wrote: with duplicate names and tokens, and wrong counts.
fn any_tree() -> impl Strategy<Value = Handover> {
    let format =
        || prop::sample::select(vec!["object-v1", "open-v1", "lost-v1"]).prop_map(compatible);
    let file = (format(), 0_u64..4, 0_u64..4).prop_map(|(compatible, data, token)| FileRecord {
        compatible,
        data,
        token: Token(token),
    });
    let name = prop::sample::select(vec!["a", "b", "c"]).prop_map(|name| Name::new(name).unwrap());
    let session = (name, prop::collection::vec(file, 0..3))
        .prop_map(|(name, files)| SessionRecord { name, files });
    let flb = (prop::sample::select(vec!["bus-v1", "map-v1", "other-v1"]), 0_u64..4)
        .prop_map(|(name, count)| FlbRecord { compatible: compatible(name), data: 0, count });
    let (sessions, flbs) = (prop::collection::vec(session, 0..3), prop::collection::vec(flb, 0..3));
    (sessions, flbs).prop_map(|(sessions, flbs)| Handover { number: u64::MAX, sessions, flbs })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_of_calls_gives_what_the_simple_model_gives(
        steps in prop::collection::vec(any_step(), 1..200),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.step(step)?;
        }
    }
    #[test]
    fn a_tree_that_no_state_machine_wrote_is_an_error_or_usable(tree in any_tree()) {
        let bytes = v1::encode(&tree).unwrap();
        let (mut luo, flbs) = start(&Script::new(), &HANDLERS, Ok(bytes));
        prop_assert_eq!(luo.disabled(), None);
        if luo.open_device().is_err() {
            prop_assert_eq!(luo.deserialize_error(), Some(Errno::EXIST));
            return Ok(());
        }
        for session in &tree.sessions {
            let id = luo.retrieve_session(&session.name.to_field(), |_| Ok(())).unwrap();
            for file in &session.files {
                let object = u64::from(luo.retrieve_fd(id, file.token).unwrap().object);
                prop_assert_eq!(object, file.data);
            }
            luo.finish(id).unwrap();
            luo.close_session(id).unwrap();
        }
        for flb in flbs {
            let _ = luo.retrieve_flb(flb);
        }
        luo.reboot(|_| Ok(())).unwrap();
    }
}
