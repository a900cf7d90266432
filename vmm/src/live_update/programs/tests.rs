//! Programs that are whole, and programs that are not.

use std::io::Read;

use luo::builtin::keeper::Keeper;
use luo::builtin::pool::{Options, Pool};

use super::*;
use crate::live_update::next_host::NextHost;

/// A program that is not run.
const SHELL: &[u8] = b"#!/bin/sh\n";

fn listed(bytes: &[u8]) -> IndexedFile {
    let (token, kind) = (PROGRAM_TOKEN.0, FileKind::Program);
    IndexedFile { token, kind, bytes: bytes.len() as u64, digest: crc32fast::hash(bytes) }
}

/// A host's program in a session of this name, of which the index says `file`.
fn held(name: &str, contents: &[u8], file: IndexedFile) -> Held {
    let name = SessionName::new(name).unwrap();
    let keeper = Keeper::start();
    let session = keeper.create_session(&name).unwrap();
    let memory = File::from(luo::memfd("program", contents.len() as u64).unwrap());
    memory.write_all_at(contents, 0).unwrap();
    session.preserve(memory.as_fd(), PROGRAM_TOKEN).unwrap();
    let next = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    Held::new(next.retrieve_session(&name).unwrap(), vec![file])
}

fn program(contents: &[u8], file: IndexedFile) -> Program {
    Program::of(held("perennial-program-00000000-0.1.0", contents, file)).unwrap()
}

#[test]
fn a_program_that_is_whole_can_be_executed_and_not_changed() {
    let program = program(SHELL, listed(SHELL));
    assert_eq!(program.version(), Some("0.1.0"));
    let mut copy = program.executable().unwrap();
    let mut contents = Vec::new();
    copy.read_to_end(&mut contents).unwrap();
    assert_eq!(contents, SHELL);
    copy.write_all_at(b"x", 0).unwrap_err();
    copy.set_len(0).unwrap_err();
    // Nothing is consumed: it can be tried again.
    program.executable().unwrap();
}

#[test]
fn a_program_that_is_damaged_truncated_or_gone_says_so_and_stays() {
    let error = |program: &Program| program.executable().unwrap_err().to_string();
    let damaged = program(b"#!/bin/xh\n", listed(SHELL));
    assert!(error(&damaged).contains("digest") && error(&damaged).contains("the index says"));
    let truncated = program(&SHELL[..5], listed(SHELL));
    assert!(error(&truncated).contains("it has 5 bytes, the index says 10"));
    let keeper = Keeper::start();
    let name = SessionName::new("perennial-program-00000000-0.1.0").unwrap();
    let _empty = keeper.create_session(&name).unwrap();
    let keeper = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    let empty = Held::new(keeper.retrieve_session(&name).unwrap(), vec![listed(SHELL)]);
    let mut gone = Program::of(empty).unwrap();
    assert!(error(&gone).contains("token 0"), "{}", error(&gone));
    gone.take(&keeper, false).unwrap_err();
    let huge = program(SHELL, IndexedFile { bytes: u64::MAX, ..listed(SHELL) });
    assert!(error(&huge).contains("10 bytes"));
}

#[test]
fn a_file_that_is_no_perennial_is_refused() {
    for (contents, said) in [
        (&b"no program at all"[..], "cannot execute the earlier perennial 0.1.0"),
        (&std::fs::read("/bin/true").unwrap(), "is not a `perennial` program"),
    ] {
        let program = program(contents, listed(contents));
        let copy = program.executable().unwrap();
        let error = NextHost::of(copy, program.describe().into(), None).unwrap_err();
        let why = chain(&error).join(": ");
        assert!(why.contains(said), "{why}");
    }
}

#[test]
fn other_sessions_are_no_programs() {
    for (name, kind, token) in [
        ("perennial-program-00000000-0.1.0", FileKind::Ram, 0),
        ("perennial-program-00000000-0.1.0", FileKind::Program, 1),
        ("perennial-vm-web", FileKind::Program, 0),
    ] {
        let file = IndexedFile { kind, token, ..listed(SHELL) };
        assert!(Program::of(held(name, SHELL, file)).is_err(), "{name} {kind:?} {token}");
    }
    // A name without a version is no obstacle.
    let file = listed(SHELL);
    let program = Program::of(held("perennial-program-00000000", SHELL, file)).unwrap();
    assert_eq!(program.version(), None);
    assert!(program.describe().contains("unknown version"));
}

/// The programs with these contents, which are one byte each.
fn programs(all: &[u8]) -> Vec<Program> {
    all.iter().map(|byte| program(&[*byte], listed(&[*byte]))).collect()
}

fn chosen(all: &[u8], is_needed: bool) -> Vec<u32> {
    let mut programs = programs(all);
    choose(&mut programs, is_needed);
    programs.iter().map(|program| program.file.digest).collect()
}

fn digests(all: &[u8]) -> Vec<u32> {
    all.iter().map(|byte| crc32fast::hash(&[*byte])).collect()
}

#[test]
fn the_last_hosts_program_stays_and_older_ones_while_a_vm_may_need_them() {
    assert_eq!(chosen(b"", false), digests(b""));
    assert_eq!(chosen(b"abc", false), digests(b"c"));
    assert_eq!(chosen(b"abcd", true), digests(b"abcd"));
    assert_eq!(chosen(b"abcdef", true), digests(b"adef"), "the oldest and the newest");
}

#[test]
fn the_running_program_is_not_held() {
    let (file, bytes) = own().unwrap();
    let mut contents = Vec::new();
    { &file }.read_to_end(&mut contents).unwrap();
    let own = program(&contents, listed(&contents));
    assert!(own.is_own() && contents.len() as u64 == bytes);
    contents[100] ^= 1;
    let other = program(&contents, listed(&contents));
    assert!(!other.is_own());
    let mut all = vec![other, own];
    choose(&mut all, true);
    assert_eq!(all.len(), 1);
    assert!(!all[0].is_own());
}

#[test]
fn the_running_program_goes_along_with_those_that_are_held() {
    let keeper = Keeper::start();
    let mut all = programs(b"ab");
    all[1].held = held("perennial-program-11111111-0.2.0", b"b", listed(b"b"));
    for program in &mut all {
        program.held.collect(&keeper, false).unwrap();
        program.held.release().unwrap();
    }
    let travelling = preserve(&keeper, &all);
    let names: Vec<_> = travelling.indexed.iter().map(|session| session.name.as_str()).collect();
    let own = travelling.indexed[2].files[0];
    let expected = format!("perennial-program-{:08x}-{}", own.digest, env!("CARGO_PKG_VERSION"));
    let (a, b) = ("perennial-program-00000000-0.1.0", "perennial-program-11111111-0.2.0");
    assert_eq!(names, [a, b, expected.as_str()]);
    let next = Keeper::arrive(keeper.switch().unwrap()).unwrap();
    for IndexedSession { name, files } in &travelling.indexed {
        let session = next.retrieve_session(&SessionName::new(name.as_str()).unwrap()).unwrap();
        let program = Program::of(Held::new(session, files.clone())).unwrap();
        program.executable().unwrap();
        assert_eq!(program.is_own(), name == &expected);
    }
}

#[test]
fn the_version_of_the_running_program_has_the_digest_that_its_session_has() {
    let own = std::fs::read("/proc/self/exe").unwrap();
    let expected = format!("{}+{:08x}", env!("CARGO_PKG_VERSION"), crc32fast::hash(&own));
    assert_eq!(own_version(), expected);
    let travelling = preserve(&Keeper::start(), &[]);
    assert_eq!(travelling.indexed[0].files[0].digest, own_digest().unwrap());
}

#[test]
fn a_program_goes_along_in_a_pool_and_takes_no_room_there_when_it_has_arrived() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { without_dax: true, reserve_bytes: 0, ..Options::default() };
    let start = || Pool::start(directory.path(), &options).unwrap();
    let files = || std::fs::read_dir(directory.path().join("files")).unwrap().count();
    let mut program = program(SHELL, listed(SHELL));
    program.take(&Keeper::start(), false).unwrap();
    for _ in 0..2 {
        let pool = start();
        let session = program.preserve(&pool).unwrap().unwrap();
        assert_eq!(files(), 1);
        pool.hand_over(|| Ok::<_, std::convert::Infallible>(())).unwrap();
        drop((session, pool));
        let pool = start();
        let session = pool.retrieve_session(program.held.name()).unwrap();
        program = Program::of(Held::new(session, vec![program.file])).unwrap();
        program.take(&pool, false).unwrap();
        program.executable().unwrap();
        pool.collect();
        assert_eq!(files(), 0);
        // What is undone leaves nothing either.
        drop(program.preserve(&pool).unwrap());
        pool.collect();
        assert_eq!(files(), 0);
        // Done twice, it does nothing.
        program.take(&pool, false).unwrap();
    }
}

#[test]
fn a_program_that_does_not_fit_costs_nothing_but_a_line_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        without_dax: true,
        // More than any file system has.
        reserve_bytes: u64::MAX,
        ..Default::default()
    };
    let pool = Pool::start(directory.path(), &options).unwrap();
    assert!(preserve(&pool, &[]).indexed.is_empty());
}
