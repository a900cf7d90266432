//! The arguments that each command of the API takes.
//!
//! A key that its command does not take is refused. An argument may say not to do something, or to do it only in part: a
//! host that overlooked `stop-before` in a request for an update would replace its kernel.

use serde_json::Value;

use crate::options::nearest;

/// The keys of every request.
const OF_ALL: [&str; 2] = ["id", "do"];

const UPDATE: &[&str] = &[
    "kernel",
    "initramfs",
    "cmdline",
    "stop_before",
    "verify_frames",
    "without",
    "force",
    "rehearse",
    "rehearse_within_s",
];

/// The commands with the keys that they take besides those of every request, in the order of [`super::Command`].
const COMMANDS: &[(&str, &[&str])] = &[
    ("status", &[]),
    ("boot", &["vm"]),
    ("stop", &["vm", "now", "within_s"]),
    ("pause", &["vm"]),
    ("resume", &["vm"]),
    ("link", &["vm", "device", "up"]),
    ("restore", &["vm", "force"]),
    ("recover", &["vm", "with"]),
    ("dump", &["vm", "path"]),
    ("memory", &["vm", "address", "bytes"]),
    ("resize-disk", &["vm", "disk", "size"]),
    ("preflight", UPDATE),
    ("rehearse", UPDATE),
    ("update", UPDATE),
    ("handover", &["program", "stop_before", "without"]),
    ("report", &[]),
    ("events", &[]),
    ("power-off", &["now"]),
];

/// Checks the keys of a request. Errors with a sentence that names the first key that its command does not take. Accepts
/// what is no object or has no known command: reading it as a command gives the error then.
pub(super) fn check(request: &Value) -> Result<(), String> {
    let (Some(request), Some(name)) = (request.as_object(), request["do"].as_str()) else {
        return Ok(());
    };
    let Some((_, arguments)) = COMMANDS.iter().find(|(command, _)| *command == name) else {
        return Ok(());
    };
    let takes = |key: &str| OF_ALL.contains(&key) || arguments.contains(&key);
    let Some(unknown) = request.keys().find(|key| !takes(key)) else { return Ok(()) };
    let free = OF_ALL.iter().chain(*arguments).filter(|key| !request.contains_key(**key));
    let free: Vec<&str> = free.copied().collect();
    let instead = match nearest(unknown, &free) {
        Some(meant) => format!(": did you mean `{meant}`?"),
        None if arguments.is_empty() => ", which takes no arguments".to_owned(),
        None => format!("; there is {}", arguments.join(", ")),
    };
    Err(format!("`{unknown}` is not an argument of `{name}`{instead}"))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::api::{Call, Command, HandoverCall, Line, RecoverCall, UpdateCall, With};
    use crate::live_update::Step;
    use crate::machine::VmName;

    fn refusal(line: &str) -> String {
        match Call::parse(line) {
            Err(Line::Error { id: 7, error, outcome: None }) => error.join(": "),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_key_that_the_command_does_not_take_is_refused_with_the_one_that_was_meant() {
        for (command, key, end) in [
            ("update", "stop-before", "of `update`: did you mean `stop_before`?"),
            ("update", "rehearse-within-s", "of `update`: did you mean `rehearse_within_s`?"),
            ("handover", "witout", "of `handover`: did you mean `without`?"),
            ("handover", "force", "of `handover`; there is program, stop_before, without"),
            ("recover", "vms", "of `recover`: did you mean `vm`?"),
            ("power-off", "nwo", "of `power-off`: did you mean `now`?"),
            ("status", "vm", "of `status`, which takes no arguments"),
            ("events", "since", "of `events`, which takes no arguments"),
        ] {
            let line = format!(r#"{{"id":7,"do":"{command}","{key}":null}}"#);
            let expected = format!("the request cannot be read: `{key}` is not an argument {end}");
            assert_eq!(refusal(&line), expected);
        }
        // Not the key that is there already.
        let line = r#"{"id":7,"do":"stop","vm":"db","vms":"db"}"#;
        assert!(refusal(line).ends_with("of `stop`; there is vm, now, within_s"));
        assert!(refusal(r#"{"id":7,"do":"fly","vm":"db"}"#).contains("`fly`"));
        assert!(refusal(r#"{"id":7,"did":"status"}"#).contains("`do`"));
    }

    /// Every command with all of its arguments.
    fn full() -> Vec<Command> {
        let vm = || VmName::new("web").unwrap();
        let path = || Some(PathBuf::from("/file"));
        let text = || Some("text".to_owned());
        let update = || UpdateCall {
            kernel: path(),
            initramfs: path(),
            cmdline: text(),
            stop_before: Some(Step::Jump),
            verify_frames: true,
            without: vec![vm()],
            force: vec!["driver".to_owned()],
            rehearse: Some(true),
            rehearse_within_s: Some(NonZeroU32::MIN),
        };
        let (program, stop_before, without) = (path(), Some(Step::Jump), vec![vm()]);
        vec![
            Command::Status,
            Command::Boot { vm: vm() },
            Command::Stop { vm: vm(), now: true, within_s: Some(1) },
            Command::Pause { vm: vm() },
            Command::Resume { vm: vm() },
            Command::Link { vm: vm(), device: text(), up: true },
            Command::Restore { vm: vm(), force: true },
            Command::Recover(RecoverCall { vm: Some(vm()), with: Some(With::Previous) }),
            Command::Dump { vm: vm(), path: path() },
            Command::Memory { vm: vm(), address: 1, bytes: 1 },
            Command::ResizeDisk { vm: vm(), disk: "disk".to_owned(), size: Some(1) },
            Command::Preflight(update()),
            Command::Rehearse(update()),
            Command::Update(update()),
            Command::Handover(HandoverCall { program, stop_before, without }),
            Command::Report,
            Command::Events,
            Command::PowerOff { now: true },
        ]
    }

    #[test]
    fn every_argument_of_every_command_is_known() {
        let names: Vec<&str> = COMMANDS.iter().map(|(name, _)| *name).collect();
        let unknown = serde_json::from_value::<Command>(json!({"do": ""})).unwrap_err().to_string();
        let listed = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        assert!(unknown.ends_with(&format!("expected one of {listed}")), "{unknown}");
        assert_eq!(full().len(), COMMANDS.len());
        for (command, (name, arguments)) in full().into_iter().zip(COMMANDS) {
            let written = serde_json::to_value(Call { id: 7, command: command.clone() }).unwrap();
            let mut keys: Vec<_> =
                written.as_object().unwrap().keys().map(String::as_str).collect();
            let mut known: Vec<_> = OF_ALL.iter().chain(*arguments).copied().collect();
            keys.sort_unstable();
            known.sort_unstable();
            assert_eq!((written["do"].as_str(), keys), (Some(*name), known));
            assert_eq!(Call::parse(&written.to_string()), Ok(Call { id: 7, command }));
        }
    }
}
