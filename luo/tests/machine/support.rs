//! Helper functions for the tests of the state machine.

use luo::Errno;
use luo::builtin::scripted::{Call, Callback, Script, ScriptedFile};
use luo::builtin::{Compatible, Luo, Name, Parameters, SessionId};

/// The kind of file that the first handler of [`machine`] accepts.
pub(crate) const KIND: u32 = 1;

pub(crate) fn compatible(name: &str) -> Compatible {
    Compatible::new(name).unwrap()
}

/// Returns the name field of a request.
pub(crate) fn name(name: &str) -> [u8; 64] {
    Name::new(name).unwrap().to_field()
}

/// A state machine after a cold start, with one handler. Its device was opened once.
pub(crate) fn machine(script: &Script) -> Luo<ScriptedFile> {
    let luo = Luo::start(Parameters::default(), || Err::<Vec<u8>, _>(Errno::NOENT));
    with_handler(luo, script)
}

/// A state machine that was started with `tree`, with the same handler.
pub(crate) fn machine_after(script: &Script, tree: &[u8]) -> Luo<ScriptedFile> {
    with_handler(Luo::start(Parameters::default(), || Ok(tree)), script)
}

fn with_handler(mut luo: Luo<ScriptedFile>, script: &Script) -> Luo<ScriptedFile> {
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    luo.open_device().unwrap();
    luo.close_device().unwrap();
    luo
}

/// Creates an outgoing session with a file of each object, in order. The object is also the token.
pub(crate) fn session(
    luo: &mut Luo<ScriptedFile>,
    script: &Script,
    session: &str,
    objects: &[u32],
) -> SessionId {
    let id = luo.create_session(&name(session), |_| Ok(())).unwrap();
    for object in objects {
        let file = script.open(KIND, *object);
        luo.preserve_fd(id, u64::from(*object).into(), Some(file)).unwrap();
    }
    id
}

/// Reboots, and returns the handover tree.
pub(crate) fn switch(luo: &mut Luo<ScriptedFile>) -> Vec<u8> {
    let mut tree = Vec::new();
    luo.reboot(|bytes| {
        tree = bytes.to_vec();
        Ok(())
    })
    .unwrap();
    tree
}

/// Returns the callback and the object of each call.
pub(crate) fn short(calls: &[Call]) -> Vec<(Callback, u32)> {
    calls.iter().map(|call| (call.callback, call.object)).collect()
}
