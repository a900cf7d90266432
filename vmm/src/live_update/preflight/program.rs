//! The program that the next kernel starts: whether it can run there, where there is no other file, and whether it is
//! a `perennial` that reads what this host will hand over. It is run for that, where it can do no harm
//! ([`trial`]).

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::documents::Document;
use super::{Check, Finding, configuration};
use crate::answer::Answer;
use crate::confine::trial::{self, TrialError};
use crate::guests::memfd::document_memfd;
use crate::live_update::manifest::CARRIES_ON;
use crate::live_update::programs::own_version;

/// How long the program may take to read the documents, also on a host that is busy: meanwhile the VMs run, and a
/// sound program that is taken for a silent one keeps them from the next kernel.
const READS_WITHIN: Duration = Duration::from_secs(30);
/// How long the program may take to say what it is.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// Most documents that are named as unreadable: usually all VMs' are, for one reason.
const MOST_UNREADABLE: usize = 8;

/// Runs the program `bytes` of the initramfs `path`: it must answer as a `perennial`, and decode `documents`.
pub(super) fn ask(path: &str, bytes: &[u8], documents: &[Document]) -> Vec<Finding> {
    let untried = |why: String| {
        let sentence = format!("the first program of {path} was not run to see what it is: {why}");
        vec![Finding::new(Check::InitramfsUntried, path, sentence, "run the preflight as root")]
    };
    let wrong = |problem: String| {
        let sentence = format!("the first program of {path} is not `perennial`: {problem}");
        let remedy = "build the initramfs with a static `perennial` as its first program";
        vec![Finding::new(Check::InitramfsProgram, path, sentence, remedy)]
    };
    let program = match document_memfd("init", bytes) {
        Ok(program) => program,
        Err(error) => return untried(error.to_string()),
    };
    let deadline = Instant::now() + READS_WITHIN;
    let show = |documents: &[Document]| {
        let files: Vec<_> =
            documents.iter().map(|shown| (shown.name.as_str(), shown.file.as_fd())).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        trial::run(program.as_fd(), &["state", "check"], &files, left)
    };
    // What the decoder says of a sound manifest shows as well that the program is a `perennial`. It is asked first, so
    // that a good program runs once: that takes seconds on a slow machine.
    let shown = (!documents.is_empty()).then(|| show(documents));
    if let Some(Ok(answer)) = &shown
        && answer.is_good
        && answer.said.contains(CARRIES_ON)
    {
        return configuration::check(path, &answer.said, documents).into_iter().collect();
    }
    let version = match trial::run(program.as_fd(), &["--version"], &[], ANSWERS_WITHIN) {
        Err(error @ TrialError::Silent(_)) => return wrong(error.to_string()),
        Err(error) => return untried(error.to_string()),
        Ok(answer) if answer.is_good && answer.said.starts_with("perennial ") => answer.said,
        Ok(answer) => {
            let said = answer.said.lines().next().unwrap_or_default();
            return wrong(format!("`--version` answered {said:?}"));
        }
    };
    match shown {
        // What it says of itself is newer than the number of the protocol.
        Some(Ok(answer)) if answer.is_good => {
            match trial::run(program.as_fd(), &["vmm", "--protocol"], &[], ANSWERS_WITHIN) {
                Ok(answer) if answer.is_good => Vec::new(),
                Ok(_) => vec![older(path, version.trim())],
                Err(error) => untried(error.to_string()),
            }
        }
        Some(answer) => unreadable(path, &version, documents, answer, show),
        None => Vec::new(),
    }
}

fn older(path: &str, version: &str) -> Finding {
    let sentence = format!(
        "the first program of {path} ({version}) is too old to carry on sessions that it does not know: it would refuse \
         what this host (perennial {}) leaves, and lose all VMs",
        own_version()
    );
    Finding::new(Check::InitramfsOlder, path, sentence, NOT_OLDER)
}

/// Returns a finding for each document that the program cannot read. It stops at the first one, so the documents
/// behind that one are shown again. `answer` is that about all.
fn unreadable(
    path: &str,
    version: &str,
    documents: &[Document],
    mut answer: Result<Answer, TrialError>,
    mut show: impl FnMut(&[Document]) -> Result<Answer, TrialError>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut rest = documents;
    let (why, remedy) = loop {
        let said = match answer {
            Ok(answer) if answer.is_good => return findings,
            Ok(answer) => answer.said.lines().last().unwrap_or_default().to_owned(),
            Err(error @ TrialError::Silent(_)) => break (error.to_string(), LATER),
            Err(error) => break (error.to_string(), NOT_OLDER),
        };
        let named = |(at, shown): (usize, &Document)| Some((said.find(&shown.name)?, at));
        let Some((start, at)) = rest.iter().enumerate().filter_map(named).min() else {
            break (said, NOT_OLDER);
        };
        let why = said[start + rest[at].name.len()..].trim_start_matches(": ");
        findings.push(rest[at].unreadable(path, version, why));
        rest = &rest[at + 1..];
        if rest.is_empty() {
            return findings;
        }
        if findings.len() == MOST_UNREADABLE {
            break (format!("{} others were unreadable", findings.len()), NOT_OLDER);
        }
        answer = show(rest);
    };
    let sentence = format!(
        "the next host ({version}) was not shown, or did not read, {} and what follows it: {why}",
        rest[0].name
    );
    let check = match findings.is_empty() {
        true => rest[0].check,
        false => Check::InitramfsDocumentUnknown,
    };
    findings.push(Finding::new(check, path, sentence, remedy));
    findings
}

const NOT_OLDER: &str = "build the initramfs with a `perennial` that is not older than this one";
/// The program has said its version, so it is a `perennial`, on a host that is busy.
const LATER: &str = "try again when the host is less busy; if that does not help, build the initramfs with another \
                     `perennial`";

impl Document {
    fn unreadable(&self, path: &str, version: &str, why: &str) -> Finding {
        let own = own_version();
        let name = &self.name;
        let (written, remedy) = match self.check {
            Check::InitramfsPreserved => (
                "which is preserved here",
                "the VM stays preserved there; build the initramfs with a `perennial` that reads it, or give the \
                 VM up with `stop`",
            ),
            _ => ("as this host writes it", NOT_OLDER),
        };
        let sentence = format!(
            "the next host ({version}) could not read {name}, {written} (perennial {own}): {why}"
        );
        Finding::new(self.check, path, sentence, remedy)
    }
}

/// `EM_X86_64`, `ET_EXEC`, `ET_DYN` and `PT_INTERP` of the ELF format.
const X86_64: u16 = 62;
const EXECUTABLE: u16 = 2;
const SHARED: u16 = 3;
const INTERPRETER: u32 = 3;
/// Most program headers that are looked at. Linux accepts no more than fit into 64 KiB.
const MOST_HEADERS: usize = (64 << 10) / 56;

/// Checks that a program is a static one for this machine. Contents that are not known pass: the finding that they
/// are not known is not worth more. Errors with a clause about the program.
pub(super) fn check(contents: Option<&[u8]>) -> Result<(), String> {
    let Some(bytes) = contents else { return Ok(()) };
    let number = |offset: usize, size: usize| -> Option<u64> {
        let field = bytes.get(offset..offset.checked_add(size)?)?;
        Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    if !bytes.starts_with(b"\x7fELF") {
        let start = bytes[..bytes.len().min(8)].escape_ascii();
        return Err(format!("it is no ELF program, it begins with `{start}`"));
    }
    // A 64-bit, little-endian header.
    if bytes.get(4..6) != Some(&[2, 1]) || number(18, 2) != Some(X86_64.into()) {
        return Err("it is no program for x86-64".to_owned());
    }
    let kind = number(16, 2).unwrap_or(0);
    if ![u64::from(EXECUTABLE), u64::from(SHARED)].contains(&kind) {
        return Err(format!("it is an ELF file of type {kind}, not a program"));
    }
    let truncated = || "it is truncated".to_owned();
    let table = number(32, 8).and_then(|at| usize::try_from(at).ok()).ok_or_else(truncated)?;
    let size = number(54, 2).ok_or_else(truncated)? as usize;
    let count = number(56, 2).ok_or_else(truncated)? as usize;
    for index in 0..count.min(MOST_HEADERS) {
        let offset = table.checked_add(index * size).ok_or_else(truncated)?;
        if number(offset, 4).ok_or_else(truncated)? == u64::from(INTERPRETER) {
            return Err("it is not static: it needs a dynamic linker".to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The smallest program that passes, with program headers of these types.
    pub(in super::super) fn elf(headers: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56 * headers.len()];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16..18].copy_from_slice(&SHARED.to_le_bytes());
        bytes[18..20].copy_from_slice(&X86_64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&(headers.len() as u16).to_le_bytes());
        for (index, kind) in headers.iter().enumerate() {
            bytes[64 + 56 * index..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    fn document(name: &str, check: Check) -> Document {
        Document { name: name.to_owned(), file: tempfile::tempfile().unwrap(), check }
    }

    /// The findings about documents of which these cannot be read.
    fn about(documents: &[Document], bad: &[&str]) -> Vec<Finding> {
        let show = |shown: &[Document]| {
            let is_bad = |document: &&Document| bad.contains(&document.name.as_str());
            let first = shown.iter().find(is_bad);
            let why =
                "perennial: NAME: /serial: the document has serial-v1, this build knows serial-v9";
            let said = first.map_or(String::new(), |bad| {
                format!("others: a sound manifest\n{}", why.replace("NAME", &bad.name))
            });
            Ok(Answer { is_good: first.is_none(), said })
        };
        unreadable("/initramfs", "perennial 0.3.0", documents, show(documents), show)
    }

    #[test]
    fn each_document_that_the_next_host_cannot_read_is_named_with_both_versions() {
        let names =
            ["the manifest", "the state document of VM `a`", "the state document of VM `b`"];
        let [manifest, a, b] = names;
        let documents = [
            document(manifest, Check::InitramfsDocuments),
            document(a, Check::InitramfsDocuments),
            document(b, Check::InitramfsPreserved),
        ];
        assert_eq!(about(&documents, &[]), []);
        let findings = about(&documents, &[a]);
        assert_eq!(findings.len(), 1);
        let text = findings[0].to_string();
        for part in [a, "perennial 0.3.0", env!("CARGO_PKG_VERSION"), "this build knows serial-v9"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains(": /serial: the document") && text.contains("not older"), "{text}");
        let findings = about(&documents, &names);
        let checks: Vec<_> = findings.iter().map(|finding| finding.name).collect();
        let refused = Check::InitramfsDocuments;
        assert_eq!(checks, [refused, refused, Check::InitramfsPreserved]);
        assert!(findings[2].remedy.contains("`stop`"), "{findings:?}");
    }

    #[test]
    fn a_program_that_says_nothing_of_a_document_or_too_much_is_bounded() {
        let names: Vec<_> = (0..20).map(|n| format!("the document {n:02}")).collect();
        let documents: Vec<_> =
            names.iter().map(|name| document(name, Check::InitramfsDocuments)).collect();
        let bad: Vec<_> = names.iter().map(String::as_str).collect();
        let findings = about(&documents, &bad);
        assert_eq!(findings.len(), MOST_UNREADABLE + 1);
        let last = findings.last().unwrap();
        assert_eq!(last.name, Check::InitramfsDocumentUnknown);
        assert!(last.sentence.contains("the document 08 and what follows"), "{last}");
        let silent = Ok(Answer { is_good: false, said: String::new() });
        let again = |_: &[Document]| unreachable!();
        let findings = unreadable("/i", "perennial 0.3.0", &documents, silent, again);
        assert_eq!((findings.len(), findings[0].name), (1, Check::InitramfsDocuments));
        let late = Err(TrialError::Silent(READS_WITHIN));
        let findings = unreadable("/i", "perennial 0.3.0", &documents, late, again);
        assert!(findings[0].sentence.contains("did not answer within 30 s"), "{findings:?}");
        assert!(findings[0].remedy.contains("less busy"), "{findings:?}");
    }

    #[test]
    fn a_static_program_for_this_machine_passes() {
        assert_eq!(check(Some(&elf(&[1, 1, 2]))), Ok(()));
        assert_eq!(check(None), Ok(()));
    }

    #[test]
    fn what_cannot_run_alone_says_why() {
        let changed = |at: usize, with: &[u8]| {
            let mut bytes = elf(&[1, 1]);
            bytes[at..at + with.len()].copy_from_slice(with);
            check(Some(&bytes)).unwrap_err()
        };
        assert!(check(Some(b"#!/bin/sh\n")).unwrap_err().contains("`#!/bin/s`"));
        assert!(check(Some(b"")).unwrap_err().contains("no ELF"));
        assert!(changed(4, &[1]).contains("x86-64"));
        assert!(changed(18, &183_u16.to_le_bytes()).contains("x86-64"));
        assert!(changed(16, &[1, 0]).contains("type 1"));
        assert!(changed(64 + 56, &[3]).contains("dynamic linker"));
    }

    #[test]
    fn any_prefix_and_any_header_is_answered_without_a_panic() {
        let whole = elf(&[1, 1, 2]);
        for length in 0..whole.len() {
            let _ = check(Some(&whole[..length]));
        }
        for at in 0..64 {
            let mut bytes = whole.clone();
            bytes[at] = 0xff;
            let _ = check(Some(&bytes));
        }
    }
}
