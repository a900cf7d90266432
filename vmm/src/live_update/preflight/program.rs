//! The program that the next kernel starts: whether it can run there, where there is no other file, and whether it is
//! a `perennial` that reads what this host will hand over. It is run for that, where it can do no harm
//! ([`trial`]).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{Check, Finding};
use crate::confine::trial::{self, TrialError};
use crate::guests::memfd::document_memfd;
use crate::live_update::manifest::CARRIES_ON;

/// The remedy for a next program that is too old.
const NOT_OLDER: &str = "build the initramfs with a `perennial` that is not older than this one";
/// How long the program may take for an answer.
const WITHIN: Duration = Duration::from_secs(10);

/// Runs the program `bytes` of the initramfs `path`: it must answer as a `perennial`, decode `document`, which is
/// the manifest as this host would write it now, and accept sessions that it does not know.
pub(super) fn ask(path: &str, bytes: &[u8], document: Option<&File>) -> Option<Finding> {
    let program = match document_memfd("init", bytes) {
        Ok(program) => program,
        Err(error) => return Some(untried(path, &error.to_string())),
    };
    let run = |arguments: &[&str], files: &[BorrowedFd<'_>]| {
        trial::run(program.as_fd(), arguments, files, WITHIN)
    };
    // What the decoder says of a sound manifest shows as well that the program is a `perennial`. It is asked first, so
    // that a good program runs once: that takes seconds on a slow machine.
    let checked = document.map(|document| run(&["state", "check"], &[document.as_fd()]));
    if let Some(Ok(answer)) = &checked
        && answer.is_good
        && answer.said.contains(CARRIES_ON)
    {
        return None;
    }
    let version = match run(&["--version"], &[]) {
        Err(error @ TrialError::Silent(_)) => return Some(no_perennial(path, &error.to_string())),
        Err(error) => return Some(untried(path, &error.to_string())),
        Ok(answer) if answer.is_good && answer.said.starts_with("perennial ") => answer.said,
        Ok(answer) => {
            let said = answer.said.lines().next().unwrap_or_default();
            return Some(no_perennial(path, &format!("`--version` answered {said:?}")));
        }
    };
    let said = match checked? {
        // What it says of itself is newer than the number of the protocol.
        Ok(answer) if answer.is_good => match run(&["vmm", "--protocol"], &[]) {
            Ok(answer) if answer.is_good => return None,
            Ok(_) => return Some(older(path, version.trim())),
            Err(error) => return Some(untried(path, &error.to_string())),
        },
        Ok(answer) => answer.said.lines().last().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    let sentence = format!("the next host could not read the manifest of this host: {said}");
    Some(Finding::new(Check::InitramfsDocuments, path, sentence, NOT_OLDER))
}

fn untried(path: &str, why: &str) -> Finding {
    let sentence = format!("the first program of {path} was not run to see what it is: {why}");
    Finding::new(Check::InitramfsUntried, path, sentence, "run the preflight as root")
}

fn no_perennial(path: &str, problem: &str) -> Finding {
    let sentence = format!("the first program of {path} is not `perennial`: {problem}");
    let remedy = "build the initramfs with a static `perennial` as its first program";
    Finding::new(Check::InitramfsProgram, path, sentence, remedy)
}

fn older(path: &str, version: &str) -> Finding {
    let sentence = format!(
        "the first program of {path} ({version}) is too old to carry on sessions that it does not know: it would refuse \
         what this host (perennial {}) leaves, and lose all VMs",
        env!("CARGO_PKG_VERSION")
    );
    Finding::new(Check::InitramfsOlder, path, sentence, NOT_OLDER)
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
