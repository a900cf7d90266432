//! Callbacks are called in the documented order, and a failure undoes exactly the steps before it.

use luo::builtin::scripted::Callback::*;
use luo::builtin::scripted::{Call, Script};
use luo::builtin::{SessionId, SessionKind};
use luo::{Errno, Token};

use crate::support::{KIND, compatible, machine, machine_after, name, session, short, switch};

#[test]
fn closing_an_outgoing_session_unpreserves_last_first() {
    let script = Script::new();
    let mut luo = machine(&script);
    let id = session(&mut luo, &script, "web", &[1, 2, 3]);
    script.take_calls();
    luo.close_session(id).unwrap();
    let calls = short(&script.take_calls());
    assert_eq!(calls, [(Unpreserve, 3), (Unpreserve, 2), (Unpreserve, 1)]);
    assert_eq!(luo.close_session(id), Err(Errno::BADF));
}

#[test]
fn a_freeze_that_fails_thaws_its_session_forwards_and_the_sessions_before_it_backwards() {
    let script = Script::new();
    let mut luo = machine(&script);
    session(&mut luo, &script, "a", &[11, 12]);
    session(&mut luo, &script, "b", &[21, 22]);
    session(&mut luo, &script, "c", &[31, 32, 33]);
    session(&mut luo, &script, "d", &[41]);
    script.take_calls();
    script.fail(Freeze, 33, Errno::NOMEM);
    let refused = luo.reboot(|_| panic!("there is nothing to finalize"));
    assert_eq!(refused, Err(Errno::NOMEM));
    let calls = short(&script.take_calls());
    let frozen = [11, 12, 21, 22, 31, 32, 33].map(|object| (Freeze, object));
    let thawed = [31, 32, 21, 22, 11, 12].map(|object| (Unfreeze, object));
    assert_eq!(calls, [&frozen[..], &thawed[..]].concat());

    script.mend(Freeze, 33);
    let tree = switch(&mut luo);
    let handover = luo::builtin::tree::v1::decode(&tree).unwrap();
    let names: Vec<String> = handover.sessions.iter().map(|s| s.name.to_string()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    assert_eq!(handover.file_count(), 8);
    assert_eq!(&handover, luo.outgoing_tree());
}

#[test]
fn a_tree_that_cannot_be_finalized_thaws_everything() {
    let script = Script::new();
    let mut luo = machine(&script);
    session(&mut luo, &script, "a", &[11, 12]);
    let b = session(&mut luo, &script, "b", &[21]);
    script.take_calls();
    assert_eq!(luo.reboot(|_| Err(Errno::IO)), Err(Errno::AGAIN));
    let calls = short(&script.take_calls());
    let frozen = [11, 12, 21].map(|object| (Freeze, object));
    let thawed = [21, 11, 12].map(|object| (Unfreeze, object));
    assert_eq!(calls, [&frozen[..], &thawed[..]].concat());
    assert!(!luo.is_handed_over() && luo.outgoing_tree().sessions.is_empty());
    let file = script.open(KIND, 22);
    luo.preserve_fd(b, Token(22), Some(file)).unwrap();
}

#[test]
fn after_the_switch_nothing_can_be_changed() {
    let script = Script::new();
    let mut luo = machine(&script);
    let id = session(&mut luo, &script, "web", &[1]);
    switch(&mut luo);
    script.take_calls();
    let shut = Err(Errno::SHUTDOWN);
    assert_eq!(luo.reboot(|_| Ok(())), shut);
    assert_eq!(luo.close_session(id), shut);
    assert_eq!(luo.preserve_fd(id, Token(2), Some(script.open(KIND, 2))), shut);
    assert_eq!(luo.create_session(&name("new"), |_| Ok(())).map(drop), shut);
    assert_eq!(luo.session_name(id).map(drop), shut);
    assert!(script.take_calls().is_empty() && luo.is_handed_over());
}

/// Returns a state machine with the incoming session "web" with files 1, 2 and 3, and the retrieved
/// session.
fn retrieved(
    script: &Script,
) -> (luo::builtin::Luo<luo::builtin::scripted::ScriptedFile>, SessionId) {
    let mut old = machine(script);
    session(&mut old, script, "web", &[1, 2, 3]);
    let mut luo = machine_after(script, &switch(&mut old));
    let id = luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
    script.take_calls();
    (luo, id)
}

#[test]
fn finishing_asks_files_in_order_and_finishes_them_in_reverse_with_their_retrievals() {
    let script = Script::new();
    let (mut luo, id) = retrieved(&script);
    script.fail(Retrieve, 2, Errno::NOMEM);
    luo.retrieve_fd(id, Token(1)).unwrap();
    assert_eq!(luo.retrieve_fd(id, Token(2)), Err(Errno::NOMEM));
    script.take_calls();
    luo.finish(id).unwrap();

    let call = |callback, object: u32, retrieved| {
        let handle = u64::from(object) + Script::FROZEN;
        Call { who: compatible("paper-v1"), callback, object, handle, retrieved }
    };
    let (first, second) = (Some(Ok(())), Some(Err(Errno::NOMEM)));
    assert_eq!(
        script.take_calls(),
        [
            call(CanFinish, 1, first),
            call(CanFinish, 2, second),
            call(CanFinish, 3, None),
            call(Finish, 3, None),
            call(Finish, 2, second),
            call(Finish, 1, first),
        ]
    );
    luo.finish(id).unwrap();
    assert!(script.take_calls().is_empty());
}

#[test]
fn a_file_that_cannot_be_finished_keeps_the_whole_session() {
    let script = Script::new();
    let (mut luo, id) = retrieved(&script);
    script.fail(CanFinish, 2, Errno::BUSY);
    assert_eq!(luo.finish(id), Err(Errno::BUSY));
    assert_eq!(short(&script.take_calls()), [(CanFinish, 1), (CanFinish, 2)]);
    luo.retrieve_fd(id, Token(3)).unwrap();
    script.mend(CanFinish, 2);
    luo.finish(id).unwrap();
    assert_eq!(luo.retrieve_fd(id, Token(3)), Err(Errno::NOENT));
    assert_eq!(luo.kind(id), Ok(SessionKind::Incoming));
}

#[test]
fn a_session_closed_while_it_cannot_be_finished_is_out_of_reach() {
    let script = Script::new();
    let (mut luo, id) = retrieved(&script);
    script.fail(CanFinish, 2, Errno::BUSY);
    assert_eq!(luo.close_session(id), Err(Errno::BUSY));
    assert_eq!(luo.retrieve_session(&name("web"), |_| Ok(())), Err(Errno::INVAL));
    assert_eq!(luo.kind(id), Err(Errno::BADF));
    assert_eq!(luo.finish(id), Err(Errno::BADF));
    let shown = luo.status().to_string();
    assert!(shown.contains("incoming web: out of reach: closed, but could not be finished"));
}

#[test]
fn a_session_whose_file_cannot_be_created_is_unchanged() {
    let script = Script::new();
    let (mut luo, id) = retrieved(&script);
    luo.close_session(id).unwrap();
    let nfile = |_| Err(Errno::NFILE);
    assert_eq!(luo.create_session(&name("new"), nfile), Err(Errno::NFILE));
    luo.create_session(&name("new"), |_| Ok(())).unwrap();

    let mut old = machine(&script);
    session(&mut old, &script, "web", &[]);
    let mut luo = machine_after(&script, &switch(&mut old));
    assert_eq!(luo.retrieve_session(&name("web"), nfile), Err(Errno::NFILE));
    luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
}

#[test]
fn the_first_handler_that_accepts_a_file_preserves_it() {
    let script = Script::new();
    let mut luo = machine(&script);
    luo.register_handler(script.handler(compatible("late-v1"), &[KIND, 2], false)).unwrap();
    let again = script.handler(compatible("late-v1"), &[3], false);
    assert_eq!(luo.register_handler(again), Err(Errno::EXIST));
    let id = session(&mut luo, &script, "web", &[1]);
    luo.preserve_fd(id, Token(2), Some(script.open(2, 2))).unwrap();
    assert_eq!(luo.preserve_fd(id, Token(3), Some(script.open(9, 3))), Err(Errno::NOENT));
    let tree = switch(&mut luo);
    let files = luo::builtin::tree::v1::decode(&tree).unwrap().sessions.remove(0).files;
    let formats: Vec<String> = files.iter().map(|file| file.compatible.to_string()).collect();
    assert_eq!(formats, ["paper-v1", "late-v1"]);
}

#[test]
fn without_an_identity_each_open_file_is_its_own_object() {
    let script = Script::new();
    let mut luo = machine(&script);
    luo.register_handler(script.handler(compatible("plain-v1"), &[2], false)).unwrap();
    let id = session(&mut luo, &script, "web", &[]);
    let (one, other) = (script.open(2, 7), script.open(2, 7));
    luo.preserve_fd(id, Token(1), Some(one)).unwrap();
    assert_eq!(luo.preserve_fd(id, Token(2), Some(one)), Err(Errno::BUSY));
    luo.preserve_fd(id, Token(2), Some(other)).unwrap();
}

#[test]
fn an_object_is_busy_as_long_as_any_session_has_it() {
    let script = Script::new();
    let (mut luo, incoming) = retrieved(&script);
    // Preserves object 1 in another session, before it is retrieved from the incoming one.
    let other = session(&mut luo, &script, "other", &[1]);
    luo.retrieve_fd(incoming, Token(1)).unwrap();
    luo.close_session(other).unwrap();
    let next = session(&mut luo, &script, "next", &[]);
    let file = Some(script.open(KIND, 1));
    assert_eq!(luo.preserve_fd(next, Token(1), file), Err(Errno::BUSY));
    luo.finish(incoming).unwrap();
    luo.preserve_fd(next, Token(1), file).unwrap();
}

#[test]
fn a_shared_object_lives_from_the_first_dependent_file_to_the_last() {
    let script = Script::new();
    let mut luo = machine(&script);
    let handler = luo.register_handler(script.handler(compatible("dev-v1"), &[2], true)).unwrap();
    let first = luo.register_flb(script.flb(compatible("bus-v1"), 0x10)).unwrap();
    let second = luo.register_flb(script.flb(compatible("map-v1"), 0x20)).unwrap();
    luo.bind_flb(handler, first).unwrap();
    luo.bind_flb(handler, second).unwrap();
    assert_eq!(luo.bind_flb(handler, second), Err(Errno::EXIST));

    let id = session(&mut luo, &script, "web", &[1]);
    script.take_calls();
    let (a, b) = (script.open(2, 5), script.open(2, 6));
    script.fail(Preserve, 5, Errno::NOMEM);
    assert_eq!(luo.preserve_fd(id, Token(5), Some(a)), Err(Errno::NOMEM));
    script.mend(Preserve, 5);
    let who = |calls: Vec<Call>| -> Vec<String> {
        let calls = calls.iter().filter(|call| call.callback != CanPreserve);
        calls.map(|call| format!("{} {:?}", call.who, call.callback)).collect()
    };
    let undone = [
        "bus-v1 FlbPreserve",
        "map-v1 FlbPreserve",
        "dev-v1 Preserve",
        "map-v1 FlbUnpreserve",
        "bus-v1 FlbUnpreserve",
    ];
    assert_eq!(who(script.take_calls()), undone);

    luo.preserve_fd(id, Token(5), Some(a)).unwrap();
    luo.preserve_fd(id, Token(6), Some(b)).unwrap();
    assert_eq!(luo.bind_flb(handler, second), Err(Errno::EXIST));
    let third = luo.register_flb(script.flb(compatible("late-v1"), 0x30)).unwrap();
    assert_eq!(luo.bind_flb(handler, third), Err(Errno::BUSY));
    script.take_calls();
    luo.close_session(id).unwrap();
    let ended = [
        "dev-v1 Unpreserve",
        "dev-v1 Unpreserve",
        "map-v1 FlbUnpreserve",
        "bus-v1 FlbUnpreserve",
        "paper-v1 Unpreserve",
    ];
    assert_eq!(who(script.take_calls()), ended);
}

#[test]
fn a_shared_object_is_retrieved_on_demand_and_finished_with_the_last_file() {
    let script = Script::new();
    let start = |mut luo: luo::builtin::Luo<_>| {
        let handler =
            luo.register_handler(script.handler(compatible("dev-v1"), &[2], true)).unwrap();
        let flb = luo.register_flb(script.flb(compatible("bus-v1"), 0x10)).unwrap();
        luo.bind_flb(handler, flb).unwrap();
        (luo, flb)
    };
    let cold = || luo::builtin::Luo::start(Default::default(), || Err::<Vec<u8>, _>(Errno::NOENT));
    let (mut old, flb) = start(cold());
    assert_eq!(old.retrieve_flb(flb), Err(Errno::NOENT));
    let id = old.create_session(&name("web"), |_| Ok(())).unwrap();
    for object in [5, 6] {
        old.preserve_fd(id, u64::from(object).into(), Some(script.open(2, object))).unwrap();
    }
    let tree = switch(&mut old);

    let (mut luo, flb) = start(luo::builtin::Luo::start(Default::default(), || Ok(&tree)));
    luo.open_device().unwrap();
    script.take_calls();
    script.fail(FlbRetrieve, 0, Errno::NOMEM);
    assert_eq!(luo.retrieve_flb(flb), Err(Errno::NOMEM));
    script.mend(FlbRetrieve, 0);
    luo.retrieve_flb(flb).unwrap();
    luo.retrieve_flb(flb).unwrap();
    let id = luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
    luo.finish(id).unwrap();
    let calls = short(&script.take_calls());
    let expected = [
        (FlbRetrieve, 0),
        (FlbRetrieve, 0),
        (CanFinish, 5),
        (CanFinish, 6),
        (Finish, 6),
        (Finish, 5),
        (FlbFinish, 0),
    ];
    assert_eq!(calls, expected);
    assert_eq!(luo.retrieve_flb(flb), Err(Errno::NODATA));

    // The shared object was not retrieved before, so finishing retrieves it first.
    let (mut luo, _) = start(luo::builtin::Luo::start(Default::default(), || Ok(&tree)));
    luo.open_device().unwrap();
    let id = luo.retrieve_session(&name("web"), |_| Ok(())).unwrap();
    script.take_calls();
    luo.close_session(id).unwrap();
    let calls = short(&script.take_calls());
    assert_eq!(&calls[2..], [(Finish, 6), (Finish, 5), (FlbRetrieve, 0), (FlbFinish, 0)]);
}
