//! Generates `docs/faults.md`, and compares it with the results of a run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::cell::Cell;
use super::{ARRIVING, Backend, FAULTS, Fault, Half, LEAVING};

/// Set to write the file instead of comparing it.
const WRITE: &str = "PERENNIAL_WRITE_TABLE";

const TITLES: [(Backend, &str); 3] = [
    (Backend::Keeper, "A handover by the keeper"),
    (Backend::Pool, "A handover by a pool"),
    (Backend::Systemd, "A restart of the service under systemd"),
];
/// The tables that follow are made by the suite `faults`, in a machine.
const OTHERS: &str = "## A live update";

type Results = BTreeMap<Cell, Result<String, String>>;

/// The tables of those backends of which there are results.
pub(super) fn text(results: &Results) -> String {
    let mut text = String::new();
    for (backend, title) in TITLES {
        if !results.keys().any(|cell| cell.backend == backend) {
            continue;
        }
        let _ = writeln!(text, "## {title}");
        for (half, name, steps) in
            [(Half::Leaving, "Leaving", &LEAVING[..]), (Half::Arriving, "Arriving", &ARRIVING)]
        {
            let heads: Vec<_> = FAULTS.iter().map(|fault| head(*fault)).collect();
            let _ = writeln!(text, "\n| {name} | {} |", heads.join(" | "));
            let _ = writeln!(text, "|---|{}", "---|".repeat(FAULTS.len()));
            for step in steps {
                let cells = FAULTS.iter().map(|fault| {
                    let cell = Cell { backend, half, step, fault: *fault };
                    match results.get(&cell) {
                        None => "–",
                        Some(Ok(text)) => text,
                        Some(Err(_)) => "FAILED",
                    }
                });
                let cells: Vec<_> = cells.collect();
                let _ = writeln!(text, "| `{step}` | {} |", cells.join(" | "));
            }
        }
        text.push('\n');
    }
    text
}

fn head(fault: Fault) -> &'static str {
    match fault {
        Fault::Error => "error",
        Fault::Hang => "VM's process hangs",
        Fault::KillVm => "VM's process killed",
        Fault::KillHost => "host killed",
        Fault::NoSpace => "ENOSPC",
        Fault::NoMemory => "ENOMEM",
        Fault::NoFiles => "EMFILE",
    }
}

/// The cells of the tables in a text, by what stands at their heads.
fn cells(text: &str) -> BTreeMap<[String; 4], String> {
    let (mut title, mut heads, mut cells) = (String::new(), Vec::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(words) = line.strip_prefix("## ") {
            title = words.to_owned();
        }
        let row: Vec<_> =
            line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
        match row[0].starts_with('`') {
            true => {
                for (head, cell) in heads.iter().zip(&row).skip(1) {
                    let half: &String = &heads[0];
                    cells.insert([&title, half, &row[0], head].map(String::clone), cell.clone());
                }
            }
            false if line.starts_with("| ") => heads = row,
            false => {}
        }
    }
    cells
}

/// Compares the results with the file: all of them, or those that there are. With [`WRITE`], writes the file if
/// these are all.
pub(super) fn check(results: &Results, are_all: bool) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let at = committed.find(TITLES[0].1).map_or(committed.len(), |at| at - "## ".len());
    let end = committed.find(OTHERS).unwrap_or(committed.len());
    let seen = text(results);
    if are_all && std::env::var_os(WRITE).is_some() {
        let (before, after) = (&committed[..at], &committed[end..]);
        let text = format!("{before}{}\n\n{after}", seen.trim_end());
        return fs::write(&path, text.trim_end().to_owned() + "\n").unwrap();
    }
    let known = cells(&committed);
    let mut differs: Vec<_> = cells(&seen)
        .into_iter()
        .filter(|(place, text)| (are_all || text != "–") && known.get(place) != Some(text))
        .map(|(place, text)| format!("{place:?}: {text}, and in the file: {:?}", known.get(&place)))
        .collect();
    if are_all && committed[at..end].trim_end() != seen.trim_end() {
        differs.push("the file has other tables".to_owned());
    }
    assert!(
        differs.is_empty(),
        "docs/faults.md differs from this run; set {WRITE} in a run of all cells (`make faults`) to write it, and \
         review the difference:\n{}",
        differs.join("\n")
    );
}
