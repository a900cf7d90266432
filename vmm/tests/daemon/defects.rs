//! A panic of the host's own thread: the host goes on with everything else.

use std::fs;
use std::io::Read;

use rustix::process::Signal;
use serde_json::json;

use crate::errands::Client;
use crate::host::{Host, PERENNIAL};
use crate::travel::Predecessor;

/// What a breakpoint that panics says.
const SAID: &str = "as the test asked";

#[test]
fn a_defect_in_each_round_leaves_the_host_able_to_answer_and_is_said_once() {
    for step in ["keep-disks", "wait"] {
        let (mut command, directory) = Host::command(|_| String::new());
        let file = directory.path().join("breakpoint");
        command.env("PERENNIAL_BREAKPOINT", &file);
        let mut host = Host::run(command, directory);
        host.wait_until_ready("boot cold");
        fs::write(&file, format!("panics {step}")).unwrap();
        // Each answer takes a round or more.
        (0..5).for_each(|_| host.answers());
        host.signal(Signal::TERM);
        assert!(host.child.wait().unwrap().success());
        let mut log = String::new();
        host.log.read_to_string(&mut log).unwrap();
        let places = log.matches("panicked at").count();
        let defects =
            log.lines().filter(|l| l.contains("has a defect") && l.contains(SAID)).count();
        assert_eq!((places, defects), (1, 1), "{step}: {log}");
    }
}

#[test]
fn a_defect_in_one_restore_costs_no_other_vm_its_memory() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("breakpoint");
    let breakpoint = format!("PERENNIAL_BREAKPOINT={}", file.display());
    let program = ["env", &breakpoint, PERENNIAL];
    let left = Predecessor::new(&["web", "db"]).hand_over(&program, |_, _| ());
    fs::write(&file, "panic restoring").unwrap();
    // So that the host finds both requests at the same time.
    left.host.signal(Signal::STOP);
    let mut client = Client::of(left.host.connect());
    client.says(1, &json!({"do": "restore", "vm": "web"}));
    client.says(2, &json!({"do": "restore", "vm": "db"}));
    left.host.signal(Signal::CONT);
    let mut answers = [client.hears(), client.hears()];
    answers.sort_by_key(|answer| answer["id"].as_u64());
    let [web, db] = answers.map(|answer| answer["error"].to_string());
    assert!(web.contains("a defect of this host"), "{web}");
    assert!(db.contains("its memory is still preserved"), "{db}");
    let states: Vec<_> = left.vms().into_iter().map(|(name, state, _)| (name, state)).collect();
    let expected = [("web", "failed"), ("db", "preserved")];
    assert_eq!(states, expected.map(|(name, state)| (name.to_owned(), state.to_owned())));
    assert!(left.holds(1));
}
