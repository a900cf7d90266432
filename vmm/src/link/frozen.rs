//! Every message of the protocol, as the file `golden/link-PROTOCOL.txt` has it: one a line.
//!
//! `recover VM --with previous` lets a host speak with the VM's process of an earlier program if both have the same
//! [`PROTOCOL`]. So a message that looks different now needs another number.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;
use crate::devices::catalog::KindInfo;
use crate::devices::storage::{Cause, Engine, Operation, StorageError};
use crate::machine::{self, place};
use crate::state::contract::golden_path;

fn machine() -> Machine {
    Machine { devices: place(KindInfo::samples()), ..machine::tests::sample() }
}

/// Every request, with every role among the files of the first.
fn requests() -> Vec<Envelope> {
    let device = |identity| Role::Device { node: "disk@1".into(), role: "image".into(), identity };
    let (serial, unit, others) = ("a".into(), None, Vec::new());
    let block = Identity::BlockDevice { major: 254, minor: 16, serial, unit, others };
    let roles = vec![
        Role::Kvm,
        Role::Kernel,
        Role::Initramfs,
        device(None),
        device(Some(Identity::File { file_system: 1, inode: 2, born: None })),
        device(Some(block)),
        Role::Segment,
        Role::State,
    ];
    let (ram, bytes) = (Ram::Memfd, 28_624);
    let mut requests = vec![
        Request::Confine { user: 65_533 },
        Request::Boot { machine: machine(), ram, nested: true },
        Request::Restore { machine: machine(), ram, bytes, hints: MissingHints::Accept },
        Request::Restore {
            machine: machine(),
            ram: Ram::DaxFile,
            bytes,
            hints: MissingHints::Refuse,
        },
    ];
    requests.extend([Request::Resume, Request::Pause, Request::Save, Request::SaveFirst]);
    requests.extend([Request::Sync, Request::PressPowerButton, Request::ReportStorage]);
    requests.push(Request::SetLink { device: "net@2".into(), up: true });
    requests.push(Request::Resize { device: "disk@1".into(), bytes: None });
    requests.push(Request::Resize { device: "disk@1".into(), bytes: Some(1 << 20) });
    let mut roles = Some(roles);
    let envelope = |request| Envelope { request, roles: roles.take().unwrap_or_default() };
    requests.into_iter().map(envelope).collect()
}

fn replies() -> Vec<FromVm> {
    let error =
        StorageError { operation: Operation::WriteZeroes, cause: Cause::Errno(28), seconds_ago: 5 };
    let report = |engine, last_error| StorageReport {
        engine,
        direct: true,
        queues: 2,
        bytes: 1 << 20,
        errors: 3,
        last_error,
        in_flight: 4,
        stalled: 1,
        waiting_s: 11,
    };
    let end = StorageError { operation: Operation::Flush, cause: Cause::End, seconds_ago: 0 };
    let storage = vec![
        ("disk@1".to_owned(), report(Engine::IoUring, Some(error))),
        ("disk@2".to_owned(), report(Engine::Threads, Some(end))),
        ("disk@3".to_owned(), report(Engine::Threads, None)),
    ];
    let replies = [
        Reply::Confined { missing: vec!["landlock: not there".into()] },
        Reply::Built,
        Reply::Restored { missing_hints: vec!["erms".into()] },
        Reply::Resumed { first_entry_ticks: 1 },
        Reply::Paused { last_exit_ticks: 2 },
        Reply::Saved { bytes: 28_624 },
        Reply::Synced,
        Reply::Pressed,
        Reply::LinkSet,
        Reply::Storage(storage),
        Reply::Resizing,
        Reply::Failed(vec!["cannot save".into(), "why".into()]),
    ];
    let device = || "net@2".to_owned();
    let events = [
        Event::Shutdown,
        Event::Reset,
        Event::Crashed("vCPU 0".into()),
        Event::Link { device: device(), link: Link::Up },
        Event::Link { device: device(), link: Link::Down },
        Event::Link { device: device(), link: Link::Gone },
        Event::Resized { device: device(), resized: Ok(1) },
        Event::Resized { device: device(), resized: Err(vec!["no room".into()]) },
        Event::Booted { entry: "`Debian`".into(), warnings: vec!["no initrd".into()] },
    ];
    replies.map(FromVm::Reply).into_iter().chain(events.map(FromVm::Event)).collect()
}

/// Does not compile if a message has been added: add it above, too.
#[allow(dead_code)]
fn all_are_there(request: &Request, reply: &Reply, event: &Event) {
    match request {
        Request::Confine { .. } | Request::Boot { .. } | Request::Restore { .. } => {}
        Request::Resume | Request::Pause | Request::Save | Request::SaveFirst | Request::Sync => {}
        Request::PressPowerButton | Request::SetLink { .. } | Request::ReportStorage => {}
        Request::Resize { .. } => {}
    }
    match reply {
        Reply::Confined { .. } | Reply::Built | Reply::Restored { .. } | Reply::Resumed { .. } => {}
        Reply::Paused { .. } | Reply::Saved { .. } | Reply::Synced | Reply::Pressed => {}
        Reply::LinkSet | Reply::Storage(_) | Reply::Resizing | Reply::Failed(_) => {}
    }
    match event {
        Event::Shutdown | Event::Reset | Event::Crashed(_) | Event::Link { .. } => {}
        Event::Resized { .. } | Event::Booted { .. } => {}
    }
}

/// Checks that the messages are written as in `lines`, and that these are read.
fn same<T: Serialize + DeserializeOwned + Debug>(messages: &[T], lines: &[&str]) {
    const REMEDY: &str = "A process of an earlier program speaks as golden/link-*.txt says. Raise PROTOCOL, and write the \
                          messages of the new number with PERENNIAL_WRITE_GOLDEN=1";
    for (message, line) in messages.iter().zip(lines) {
        let text = serde_json::to_string(message).unwrap();
        assert_eq!(text, *line, "this message is written differently now. {REMEDY}");
        let read: T = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{line} is not read any more: {error}. {REMEDY}"));
        assert_eq!(serde_json::to_string(&read).unwrap(), text, "{REMEDY}");
    }
}

#[test]
fn the_messages_are_those_of_their_number() {
    let path = golden_path(&format!("link-{PROTOCOL}.txt"));
    let (requests, replies) = (requests(), replies());
    if std::env::var_os("PERENNIAL_WRITE_GOLDEN").is_some() && !path.exists() {
        let lines = requests.iter().map(|message| serde_json::to_string(message).unwrap());
        let replies = replies.iter().map(|message| serde_json::to_string(message).unwrap());
        let lines: String = lines.chain(replies).map(|line| line + "\n").collect();
        std::fs::write(&path, lines).unwrap();
    }
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}: see link/frozen.rs", path.display()));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), requests.len() + replies.len());
    let (of_host, of_vm) = lines.split_at(requests.len());
    same(&requests, of_host);
    same(&replies, of_vm);
}
