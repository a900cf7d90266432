//! Logs that are full, renamed or removed while the port writes them.

use std::fs;
use std::path::Path;

use super::clients::Machine;
use super::*;

/// Longest time for the host's thread to send the next log.
const WITHIN_MS: i32 = 30_000;

fn log(directory: &Path, more: &str) -> SerialOptions {
    let text = format!("file={}{more}", directory.join("log").display());
    SerialOptions::parse(&text).unwrap()
}

/// Waits until the port has the next log.
fn wait_for_next(machine: &mut Machine) {
    assert!(machine.thread.run_with_timeout(WITHIN_MS).unwrap() > 0, "no other log was sent");
    machine.run();
}

#[test]
fn a_log_that_was_renamed_or_removed_is_followed_by_a_new_one_at_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("missing");
    let path = |name: &str| directory.join(name);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap();
    let mut machine = Machine::fresh(&log(&directory, ""));
    machine.send(b"first\n");
    fs::rename(path("log"), path("log-20261126")).unwrap();
    wait_for_next(&mut machine);
    machine.send(b"second\n");
    assert_eq!((read("log-20261126"), read("log")), ("first\n".to_owned(), "second\n".to_owned()));
    fs::remove_file(path("log")).unwrap();
    wait_for_next(&mut machine);
    machine.send(b"third\n");
    assert_eq!(read("log"), "third\n");
}

#[test]
fn a_full_log_is_renamed_and_so_are_its_predecessors_up_to_the_number_to_keep() {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = Machine::fresh(&log(directory.path(), ",max_size=64K,keep=2"));
    let read = |name: &str| fs::read(directory.path().join(name)).unwrap_or_default();
    for number in 0..5 {
        machine.send(&[b'0' + number; 64 << 10]);
        // The host's thread may have sent the next log already.
        let mark = [b'a' + number];
        let follows = (0..WITHIN_MS / 50).any(|_| {
            let _ = machine.thread.run_with_timeout(50).unwrap();
            machine.send(&mark);
            read("log").starts_with(&mark)
        });
        assert!(follows, "no other log was sent");
    }
    assert!(read("log.1").len() >= 64 << 10 && read("log.1").contains(&b'4'));
    assert!(read("log.2").len() >= 64 << 10 && read("log.2").contains(&b'3'));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
}
