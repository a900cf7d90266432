//! Generates `docs/conformance.md`, the table of results.
//!
//! A run of every case on every system compares its results with the file, and fails if they differ.
//! With `PERENNIAL_WRITE_TABLE` set it writes the file instead.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Write as _;
use std::fs;

use super::profile::Deviation;
use super::rows;
use super::run::Verdict;
use super::subject::SUBJECTS;
use crate::kernels::{self, Role};
use crate::paths;

const FILE: &str = "docs/conformance.md";
const WRITE: &str = "PERENNIAL_WRITE_TABLE";

const HEAD: &str = "\
# Conformance

Results of the project's list of 190 cases for each implementation of the Live Update Orchestrator. The \
conformance suite (`tests/src/conformance`) generates this file, and every run of `make test` fails if its results \
differ. The code of each case is in `rows/` and is the same for all implementations.

- Class U needs one kernel, class G a switch to the next, class K the kernel's own boot and memory management.
- ✓: behaves as the list says of Linux. D and a number: deviates as described below; the suite also tests the \
deviating behaviour. – and a letter: lacks what the case needs.
";

type Column = BTreeMap<u16, Verdict>;

/// Compares the file with the results. The error names the first difference and the remedy.
pub(crate) fn check() -> Result<(), String> {
    let columns: Vec<Column> = SUBJECTS.iter().map(|subject| subject.known()).collect();
    for (subject, column) in SUBJECTS.iter().zip(&columns) {
        if column.len() < rows::CASES.into() {
            println!("{FILE} is not compared: not every case ran on {}", subject.name);
            return Ok(());
        }
    }
    let linux = kernels::find(Role::HostA).map_err(|error| error.to_string())?;
    let version = linux.release.split('-').next().unwrap_or_default();
    let (seen, path) = (text(&columns, version), paths::workspace().join(FILE));
    if env::var_os(WRITE).is_some() {
        return fs::write(&path, seen).map_err(|error| format!("{}: {error}", path.display()));
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if committed == seen {
        return Ok(());
    }
    let mut lines = seen.lines().zip(committed.lines().chain(std::iter::repeat("nothing")));
    let (seen, committed) = lines.find(|(a, b)| a != b).unwrap_or(("nothing", "more lines"));
    Err(format!(
        "{FILE} differs from the results of this run; set {WRITE} to write it, and review the \
        difference\n  run: {seen}\n  file: {committed}"
    ))
}

/// The deviations and reasons behind the marks in the table, in the order of the marks.
#[derive(Default)]
struct Notes {
    deviations: BTreeSet<Deviation>,
    lacks: Vec<&'static str>,
}

impl Notes {
    fn of(columns: &[Column]) -> Self {
        let mut notes = Self::default();
        for verdict in rows::all().flat_map(|row| columns.iter().map(|c| &c[&row.number])) {
            match verdict {
                Verdict::Deviates(deviations) => notes.deviations.extend(deviations),
                Verdict::Lacks(reason) if !notes.lacks.contains(reason) => notes.lacks.push(reason),
                _ => {}
            }
        }
        notes
    }

    fn mark(&self, verdict: &Verdict) -> String {
        match verdict {
            Verdict::Passed => "✓".to_owned(),
            Verdict::Failed(_) => "failed".to_owned(),
            Verdict::Deviates(deviations) => {
                let place = |one: &Deviation| self.deviations.iter().position(|d| d == one);
                let marks = deviations.iter().filter_map(place).map(|at| format!("D{}", at + 1));
                marks.collect::<Vec<_>>().join(" ")
            }
            Verdict::Lacks(reason) => {
                let at = self.lacks.iter().position(|known| known == reason).unwrap_or(0);
                format!("–{}", letter(at))
            }
        }
    }
}

fn letter(at: usize) -> char {
    ('a'..='z').nth(at).unwrap_or('?')
}

fn text(columns: &[Column], version: &str) -> String {
    let mut out = HEAD.to_owned();
    // Writing to a String cannot fail.
    let _ = write(&mut out, columns, version);
    out
}

fn write(out: &mut String, columns: &[Column], version: &str) -> std::fmt::Result {
    let notes = Notes::of(columns);
    writeln!(out, "\n| name | implementation | ✓ | D | – |\n|---|---|--:|--:|--:|")?;
    for (subject, column) in SUBJECTS.iter().zip(columns) {
        let count = |is: fn(&Verdict) -> bool| column.values().filter(|v| is(v)).count();
        let passed = count(|verdict| *verdict == Verdict::Passed);
        let deviates = count(|verdict| matches!(verdict, Verdict::Deviates(_)));
        let lacks = count(|verdict| matches!(verdict, Verdict::Lacks(_)));
        let (name, what) = (name(subject.name, version), subject.what);
        writeln!(out, "| {name} | {what} | {passed} | {deviates} | {lacks} |")?;
    }
    writeln!(out, "\n## Deviations\n")?;
    for (at, deviation) in notes.deviations.iter().enumerate() {
        writeln!(out, "- **D{}**: {}", at + 1, deviation.reason())?;
    }
    writeln!(out, "\n## Lacking features\n")?;
    for (at, reason) in notes.lacks.iter().enumerate() {
        writeln!(out, "- **–{}**: {reason}.", letter(at))?;
    }
    writeln!(out, "\n## Cases\n")?;
    let names: Vec<_> = SUBJECTS.iter().map(|subject| name(subject.name, version)).collect();
    writeln!(out, "| | | case | {} |", names.join(" | "))?;
    writeln!(out, "|--:|---|---|{}", ":-:|".repeat(columns.len()))?;
    let mut rows: Vec<_> = rows::all().collect();
    rows.sort_by_key(|row| row.number);
    for row in rows {
        let marks: Vec<_> = columns.iter().map(|c| notes.mark(&c[&row.number])).collect();
        let (number, class, what) = (row.number, row.class, row.what);
        writeln!(out, "| {number} | {class:?} | {what} | {} |", marks.join(" | "))?;
    }
    Ok(())
}

fn name(name: &str, version: &str) -> String {
    if name == "Linux" { format!("Linux {version}") } else { name.to_owned() }
}
