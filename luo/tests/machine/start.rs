//! The start of the state machine: the tree of the previous kernel, limits, and disabled live
//! update.

use luo::builtin::scripted::{Script, ScriptedFile};
use luo::builtin::tree::{FlbRecord, Handover, SessionRecord, v1};
use luo::builtin::{Disabled, Limits, Luo, Name, Parameters};
use luo::{Errno, Token};

use crate::support::{KIND, compatible, machine, machine_after, name, session, switch};

fn cold() -> Result<Vec<u8>, Errno> {
    Err(Errno::NOENT)
}

fn start(parameters: Parameters, subtree: Result<Vec<u8>, Errno>) -> Luo<ScriptedFile> {
    Luo::start(parameters, || subtree)
}

#[test]
fn the_number_counts_live_updates_with_and_without_sessions() {
    let script = Script::new();
    let mut luo = machine(&script);
    for number in 0..3 {
        assert_eq!(luo.liveupdate_number(), number);
        assert_eq!(luo.outgoing_tree().number, number + 1);
        luo = machine_after(&script, &switch(&mut luo));
    }
}

#[test]
fn a_disabled_state_machine_has_no_device_and_gives_the_reason() {
    let off = Parameters { liveupdate: false, ..Parameters::default() };
    let no_carrier = Parameters { handover: false, ..Parameters::default() };
    for (parameters, why) in [(off, Disabled::Parameter), (no_carrier, Disabled::NoHandover)] {
        let script = Script::new();
        let mut luo = start(parameters, cold());
        assert_eq!(luo.disabled(), Some(&why));
        assert_eq!(luo.open_device(), Err(Errno::NOENT));
        assert_eq!(luo.outgoing_tree(), &Handover::default());
        let handler = script.handler(compatible("paper-v1"), &[KIND], true);
        assert_eq!(luo.register_handler(handler), Err(Errno::OPNOTSUPP));
        assert_eq!(luo.reboot(|_| panic!("there is nothing to hand over")), Ok(()));
    }
}

#[test]
fn the_tree_is_requested_only_if_handover_is_enabled() {
    let parameters = Parameters { handover: false, ..Parameters::default() };
    Luo::<ScriptedFile>::start(parameters, || -> Result<Vec<u8>, _> {
        panic!("the tree was requested")
    });
}

#[test]
fn a_tree_that_cannot_be_retrieved_or_decoded_disables_live_update_even_if_it_was_off() {
    let luo = start(Parameters::default(), Err(Errno::IO));
    assert_eq!(luo.disabled(), Some(&Disabled::Retrieve { errno: Errno::IO }));
    for liveupdate in [true, false] {
        let parameters = Parameters { liveupdate, ..Parameters::default() };
        let mut luo = start(parameters, Ok(b"no tree".to_vec()));
        assert!(matches!(luo.disabled(), Some(Disabled::Tree(v1::Error::Fdt { .. }))));
        assert_eq!(luo.open_device(), Err(Errno::NOENT));
    }
}

#[test]
fn a_format_without_a_handler_makes_opening_the_device_fail_permanently() {
    let script = Script::new();
    let mut old = machine(&script);
    session(&mut old, &script, "empty", &[]);
    session(&mut old, &script, "web", &[1]);
    let tree = switch(&mut old);
    let mut luo = start(Parameters::default(), Ok(tree));
    assert_eq!(luo.open_device(), Err(Errno::IO));
    assert_eq!(luo.deserialize_error(), Some(Errno::NOENT));
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    assert_eq!(luo.open_device(), Err(Errno::IO));
}

#[test]
fn duplicate_sessions_tokens_or_shared_objects_make_opening_the_device_fail() {
    let script = Script::new();
    let record = |files| SessionRecord { name: Name::new("web").unwrap(), files };
    let mut old = machine(&script);
    session(&mut old, &script, "web", &[1]);
    let file = v1::decode(&switch(&mut old)).unwrap().sessions.remove(0).files.remove(0);
    let flb = FlbRecord { compatible: compatible("bus-v1"), data: 0, count: 1 };
    for (sessions, flbs) in [
        (vec![record(vec![]), record(vec![])], vec![]),
        (vec![record(vec![file, file])], vec![]),
        (vec![record(vec![])], vec![flb, flb]),
    ] {
        let tree = v1::encode(&Handover { number: 1, sessions, flbs }).unwrap();
        let mut luo = start(Parameters::default(), Ok(tree));
        luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
        assert_eq!(luo.open_device(), Err(Errno::IO));
        assert_eq!(luo.deserialize_error(), Some(Errno::EXIST));
    }
}

#[test]
fn the_device_has_one_opener_and_an_open_that_fails_leaves_nothing() {
    let mut luo = machine(&Script::new());
    luo.open_device().unwrap();
    assert_eq!(luo.open_device(), Err(Errno::BUSY));
    luo.close_device().unwrap();
    assert_eq!(luo.close_device(), Err(Errno::BADF));
    luo.open_device().unwrap();
}

#[test]
fn limits_are_checked_before_duplicate_names_and_invalid_fds() {
    let script = Script::new();
    let limits = Limits { sessions: 1, sessions_errno: Errno::NOMEM, files: 1 };
    let mut luo = start(Parameters { limits, ..Parameters::default() }, cold());
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    let id = session(&mut luo, &script, "web", &[1]);
    assert_eq!(luo.create_session(&name("web"), |_| Ok(())), Err(Errno::NOMEM));
    assert_eq!(luo.preserve_fd(id, Token(1), None), Err(Errno::EXIST));
    assert_eq!(luo.preserve_fd(id, Token(2), None), Err(Errno::NOSPC));
    luo.close_session(id).unwrap();
    luo.create_session(&name("web"), |_| Ok(())).unwrap();
}

#[test]
fn unfinished_sessions_are_not_handed_over_again() {
    let script = Script::new();
    let mut luo = machine(&script);
    session(&mut luo, &script, "web", &[1]);
    let mut luo = machine_after(&script, &switch(&mut luo));
    luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
    let mut luo = machine_after(&script, &switch(&mut luo));
    assert_eq!(luo.retrieve_session(&name("web"), |_| Ok(())), Err(Errno::NOENT));
}

#[test]
fn the_limits_of_the_seed_have_their_own_errnos() {
    let script = Script::new();
    let mut luo = start(Parameters { limits: Limits::SEED, ..Parameters::default() }, cold());
    luo.register_handler(script.handler(compatible("paper-v1"), &[KIND], true)).unwrap();
    let objects: Vec<u32> = (0..128).collect();
    let id = session(&mut luo, &script, "files", &objects);
    let file = Some(script.open(KIND, 128));
    assert_eq!(luo.preserve_fd(id, Token(128), file), Err(Errno::NOSPC));
    for index in 1..819 {
        session(&mut luo, &script, &format!("session-{index}"), &[]);
    }
    assert_eq!(luo.create_session(&name("one more"), |_| Ok(())), Err(Errno::NOMEM));
}
