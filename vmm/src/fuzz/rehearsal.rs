//! Target `rehearsal`: what the serial port of a rehearsal's VM writes. The first byte is the length of the pieces in
//! which it comes.

use crate::live_update::preflight::{Check, Finding, Severity};
use crate::live_update::rehearsal::report::Transcript;

/// The findings must not depend on the pieces, must fit on a terminal, and say that the update was rehearsed only if
/// the report has a beginning and an end.
pub fn rehearsal(input: &[u8]) {
    let [length, text @ ..] = input else { return };
    let (has_ended, findings) = read(text, usize::from(*length).max(1));
    assert_eq!(read(text, text.len().max(1)), (has_ended, findings.clone()));
    for Finding { severity, name, subject, sentence, remedy, can_be_forced } in &findings {
        for text in [subject, sentence, remedy] {
            assert!(!text.contains(char::is_control), "{text:?}");
        }
        assert!(*severity != Severity::Refusal || *can_be_forced, "{name}");
        assert!(!can_be_forced || Check::to_force(name.name()) == Ok(*name), "{name}");
    }
    let is = |check| move |finding: &&Finding| finding.name == check;
    let rehearsed = findings.iter().filter(is(Check::Rehearsed)).count();
    let not_booted = findings.iter().any(|finding| {
        finding.name == Check::RehearsalBoot && finding.severity == Severity::Refusal
    });
    assert!(rehearsed <= 1 && (rehearsed == 1 || not_booted), "{findings:?}");
    let said = String::from_utf8_lossy(text);
    assert!(rehearsed == 0 || (said.contains("begun") && said.contains("ended") && has_ended));
}

fn read(text: &[u8], length: usize) -> (bool, Vec<Finding>) {
    let mut transcript = Transcript::default();
    text.chunks(length).for_each(|piece| transcript.add(piece));
    (transcript.has_ended(), transcript.findings("/next/bzImage", Some("powered off")))
}
