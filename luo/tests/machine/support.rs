//! Short words for the tests of the machine.

use luo::Errno;
use luo::builtin::scripted::{Call, Callback, Script, ScriptedFile};
use luo::builtin::{Compatible, Luo, Name, Parameters, SessionId};

/// The kind of file that the first handler of [`machine`] takes.
pub(crate) const KIND: u32 = 1;

pub(crate) fn compatible(name: &str) -> Compatible {
    Compatible::new(name).unwrap()
}

/// The field of a request for a session of this name.
pub(crate) fn name(name: &str) -> [u8; 64] {
    Name::new(name).unwrap().to_field()
}

/// A machine after a cold start, with one handler, its device opened once.
pub(crate) fn machine(script: &Script) -> Luo<ScriptedFile> {
    let luo = Luo::start(Parameters::default(), || Err::<Vec<u8>, _>(Errno::NOENT));
    with_handler(luo, script)
}

/// The machine that finds `tree`.
pub(crate) fn machine_after(script: &Script, tree: &[u8]) -> Luo<ScriptedFile> {
    with_handler(Luo::start(Parameters::default(), || Ok(tree)), script)
}

fn with_handler(mut luo: Luo<ScriptedFile>, script: &Script) -> Luo<ScriptedFile> {
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    luo.open_device().unwrap();
    luo.close_device().unwrap();
    luo
}

/// An outgoing session with a file of each object, in order, under the object as token.
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

/// Reboots, and the tree that is left.
pub(crate) fn switch(luo: &mut Luo<ScriptedFile>) -> Vec<u8> {
    let mut tree = Vec::new();
    luo.reboot(|bytes| {
        tree = bytes.to_vec();
        Ok(())
    })
    .unwrap();
    tree
}

/// What was called for which object.
pub(crate) fn short(calls: &[Call]) -> Vec<(Callback, u32)> {
    calls.iter().map(|call| (call.callback, call.object)).collect()
}
