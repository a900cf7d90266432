//! The status text of the state machine.

use luo::builtin::Luo;
use luo::builtin::scripted::{Callback, Script, ScriptedFile};
use luo::{Errno, Token};

use crate::support::{KIND, compatible, machine, name, session, switch};

#[test]
fn every_session_and_file_has_a_line_with_its_state() {
    let script = Script::new();
    let mut old = machine(&script);
    session(&mut old, &script, "web", &[1, 2, 3]);
    session(&mut old, &script, "db", &[]);
    let tree = switch(&mut old);
    let all = "live update: enabled, 0 so far, device closed, all handed over\n  \
               outgoing web: 3 files\n    token 1  paper-v1\n    token 2  paper-v1\n    \
               token 3  paper-v1\n  outgoing db: 0 files\n";
    assert_eq!(old.status().to_string(), all);

    let mut luo: Luo<ScriptedFile> = Luo::start(Default::default(), || Ok(&tree));
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    let waiting = "live update: enabled, 1 so far, device closed\n  \
                   incoming web: waits for the device to be opened, 3 files\n  \
                   incoming db: waits for the device to be opened, 0 files\n";
    assert_eq!(luo.status().to_string(), waiting);

    luo.open_device().unwrap();
    let id = luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
    luo.retrieve_fd(id, Token(1)).unwrap();
    script.fail(Callback::Retrieve, 2, Errno::NOMEM);
    luo.retrieve_fd(id, Token(2)).unwrap_err();
    let some = "live update: enabled, 1 so far, device open\n  \
                incoming web: retrieved, 3 files\n    token 1  paper-v1  retrieved\n    \
                token 2  paper-v1  lost: Cannot allocate memory (os error 12)\n    \
                token 3  paper-v1  not retrieved\n  incoming db: not retrieved, 0 files\n";
    assert_eq!(luo.status().to_string(), some);
}

#[test]
fn the_status_gives_the_reason_if_live_update_is_disabled_or_sessions_are_unreadable() {
    let luo: Luo<ScriptedFile> = Luo::start(Default::default(), || Ok(b"no tree"));
    let shown = luo.status().to_string();
    assert!(shown.starts_with(
        "live update: disabled: the tree of the previous kernel cannot be read: the tree is not"
    ));
    let script = Script::new();
    let mut old = machine(&script);
    session(&mut old, &script, "web", &[1]);
    let tree = switch(&mut old);
    let mut luo: Luo<ScriptedFile> = Luo::start(Default::default(), || Ok(&tree));
    luo.open_device().unwrap_err();
    let shown = luo.status().to_string();
    assert!(
        shown.ends_with(
            "incoming sessions cannot be read: No such file or directory (os error 2)\n"
        )
    );
}

#[test]
fn a_machine_can_be_given_to_another_thread() {
    fn crosses_threads<T: Send>(_: &T) {}
    crosses_threads(&machine(&Script::new()));
}
