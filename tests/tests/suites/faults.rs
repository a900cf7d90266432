//! Faults at the steps of a live update in a machine. The host is PID 1 there and does the damage itself, as the command
//! line of its kernel says: a program with the feature `faults` (`vmm/src/live_update/breakpoint/damage.rs`).
//!
//! Each kernel has a fault for its arrival and one for its departure, so one machine goes through all cells. After each
//! cell the cause is removed, and what is preserved is restored. No guest may be lost that memory could have saved. The
//! results are the last tables of `docs/faults.md`.
//!
//! `PERENNIAL_MACHINE_FAULTS` selects the cells: `all`, or texts of which each word of a cell has one, such as
//! `take/one: sync:killed`.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use perennial_tests::control::ControlError;
use perennial_tests::host::{ANSWER, Failure, Host, STEPS, WORK};
use perennial_tests::plan::{HostPlan, Luo, VmPlan};
use perennial_tests::report::Status;
use perennial_tests::suite::{Test, both};
use serde_json::json;

/// The environment variable with the words of the cells.
pub(crate) const WANTED: &str = "PERENNIAL_MACHINE_FAULTS";
/// Set to write the tables instead of comparing them.
const WRITE: &str = "PERENNIAL_WRITE_TABLE";

pub(crate) const LONG_TESTS: &[Test] =
    &[both("no_fault_at_any_step_loses_a_guest_that_memory_could_have_saved", run)];

/// The VMs. The first one is the most urgent, and is struck.
const VMS: [&str; 2] = ["one", "two"];

/// Steps of arriving. At `look` nothing is mounted yet, and no port is open.
const ARRIVING: [&str; 7] =
    ["retrieve/one", "open/one", "restore/one", "take/one", "resume/one", "finish", "report"];

/// The faults, by the heads of their columns. The first word is for leaving, the second for arriving. `/dev/vdb` is the
/// disk of the VM that is struck.
const FAULTS: [(&str, Option<&str>, Option<&str>); 6] = [
    // Leaving, the suite `abort` has it.
    ("error", None, Some("hidden=/dev/vdb")),
    ("VM's process hangs", Some("hangs=/dev/vdb"), Some("hangs=/dev/vdb")),
    ("VM's process killed", Some("killed=/dev/vdb"), Some("killed=/dev/vdb")),
    // Arriving, a host that is PID 1 writes no file.
    ("ENOSPC", Some("no-space="), None),
    ("ENOMEM", Some("no-memory"), Some("no-memory")),
    ("EMFILE", Some("few-files"), Some("no-files")),
];

/// What becomes of the guests: of the one that is struck, and of the other one.
type Fates = BTreeMap<String, String>;

/// The words of a half's cells.
fn words(luo: Luo, leaves: bool) -> Vec<String> {
    let steps: &[&str] = if leaves { &STEPS } else { &ARRIVING };
    let of_step = |step: &&'static str| {
        let step = *step;
        FAULTS.iter().filter_map(move |fault| word(luo, step, leaves, fault))
    };
    steps.iter().flat_map(of_step).collect()
}

fn word(
    luo: Luo,
    step: &str,
    leaves: bool,
    (_, leaving, arriving): &(&str, Option<&str>, Option<&str>),
) -> Option<String> {
    let fault = if leaves { (*leaving)? } else { (*arriving)? };
    // There is no process of the VM yet.
    let is_of_process = fault.ends_with("/dev/vdb") && !fault.starts_with("hidden");
    if step == "retrieve/one" && is_of_process {
        return None;
    }
    let filled = match luo {
        Luo::Kernel => "/data",
        Luo::Pool => "/pool",
    };
    let filled = if fault.ends_with('=') { filled } else { "" };
    Some(format!("{step}:{fault}{filled}"))
}

/// Whether the fault ends the guest: only the process has its state then.
fn ends_guest(word: &str) -> bool {
    let (step, fault) = word.split_once(':').unwrap_or_default();
    let only_the_process_has_it =
        ["load", "preserve-ram", "pause", "save", "finish", "report"].contains(&step);
    fault.starts_with("killed") && only_the_process_has_it
}

/// The cells that are wanted, in the order in which they are taken: the last ones end the guest.
fn wanted(luo: Luo, leaves: bool) -> Vec<String> {
    let wanted = env::var(WANTED).unwrap_or_default();
    let is_wanted = |word: &String| {
        wanted == "all" || wanted.split_whitespace().any(|text| word.contains(text))
    };
    let mut words: Vec<_> = words(luo, leaves).into_iter().filter(is_wanted).collect();
    words.sort_by_key(|word| ends_guest(word));
    words
}

fn run(luo: Luo) -> Result<(), Failure> {
    let mut arriving = wanted(luo, false).into_iter().peekable();
    let mut leaving = wanted(luo, true).into_iter().peekable();
    if arriving.peek().is_none() && leaving.peek().is_none() {
        return Err(format!("{WANTED}: no cell has a word of `{}`", env::var(WANTED)?).into());
    }
    // A guest that boots again under one kernel must be able to run under the other, which may offer fewer CPU features.
    // A guest whose process hangs finds that its CPU stood still.
    let parameters = "nosoftlockup rcupdate.rcu_cpu_stall_suppress=1";
    let vm =
        |name, line| VmPlan { line, parameters, cpu: "x86-64-v2", ..VmPlan::new(name, 128, 1) };
    let mut plan =
        HostPlan::new(vec![vm(VMS[0], "priority = 90\n"), vm(VMS[1], "priority = 10\n")]);
    plan.luo = luo;
    plan.with_faults = true;
    // A process that hangs uses all of it.
    plan.edit_a = Some(with_budget);
    plan.edit_b = Some(with_budget);
    let (host, _) = Host::boot(&plan)?;
    host.wait_for_guests()?;
    let mut cells = Cells { host, fates: Fates::new(), is_checked: false };
    let mut at_leaving: Option<String> = None;
    loop {
        // Those that end the guest come when nothing else is left.
        let others_are_left = |word: &String, other: Option<&String>| {
            ends_guest(word) && other.is_some_and(|other| !ends_guest(other))
        };
        let (next_arriving, next_leaving) = (arriving.peek().cloned(), leaving.peek().cloned());
        let arrives = arriving.next_if(|word| !others_are_left(word, next_leaving.as_ref()));
        let leaves = leaving.next_if(|word| !others_are_left(word, next_arriving.as_ref()));
        if arrives.is_none() && leaves.is_none() && at_leaving.is_none() {
            break;
        }
        let faults: Vec<_> = arrives.iter().chain(&leaves).cloned().collect();
        let cmdline = format!("{} perennial.fault={}", plan.cmdline(), faults.join(","));
        cells.next_kernel(&cmdline, at_leaving.take(), arrives)?;
        at_leaving = leaves;
    }
    let missed: Vec<_> = cells.fates.keys().filter(|word| !cells.was_struck(word)).collect();
    if !missed.is_empty() || cells.host.console().contains("ERROR perennial.fault=") {
        return Err(format!("no damage was done: {missed:?}").into());
    }
    let Cells { host, fates, is_checked } = cells;
    match is_checked {
        false => host.check_guests()?,
        // A guest that was booted again must have written to its disk before the disk is checked.
        true => host.guests().iter().try_for_each(|guest| {
            guest.mark();
            guest.wait_until_settled(WORK)
        })?,
    }
    host.power_off_and_check_disks()?;
    check_table(luo, &fates)
}

fn with_budget(config: String) -> String {
    config.replace("[update]\n", "[update]\nbudget = 10\n")
}

/// A host that goes from fault to fault.
struct Cells {
    host: Host,
    fates: Fates,
    /// Whether all that the guests are to keep was checked. From then on a guest may be booted again.
    is_checked: bool,
}

impl Cells {
    /// Updates to a kernel with this command line, with the fault `leaving` on the way out of the running kernel and
    /// `arriving` on the way into the next one.
    fn next_kernel(
        &mut self,
        cmdline: &str,
        leaving: Option<String>,
        arriving: Option<String>,
    ) -> Result<(), Failure> {
        if !self.is_checked && leaving.iter().chain(&arriving).any(|word| ends_guest(word)) {
            self.host.check_guests()?;
            self.is_checked = true;
        }
        let mut status = update(&mut self.host, cmdline)?;
        // A slow machine may refuse an update before it comes to the step.
        if status.is_none() && leaving.as_ref().is_some_and(|word| !self.was_struck(word)) {
            status = update(&mut self.host, cmdline)?;
        }
        if let Some(word) = leaving {
            let after = match &status {
                Some(after) => after.clone(),
                None => self.settled(&word)?,
            };
            let fate = if status.is_some() { "runs" } else { "undone" };
            // With a fault on the way in as well, only the departure counts here.
            let fates = VMS.map(|name| match state(&after, name) {
                "failed" | "stopped" if status.is_none() => "ended",
                _ => fate,
            });
            self.note(&word, fates);
            if status.is_none() {
                self.repair(&word)?;
                status = update(&mut self.host, cmdline)?;
            }
        }
        if status.is_none() {
            return Err(format!("without a fault the update to {cmdline} fails").into());
        }
        match arriving {
            Some(word) => {
                let status = self.settled(&word)?;
                let fates = VMS.map(|name| match state(&status, name) {
                    "running" => "runs",
                    "failed" | "stopped" => "ended",
                    other => other,
                });
                let fates = fates.map(str::to_owned);
                self.note(&word, [&fates[0], &fates[1]]);
                self.repair(&word)
            }
            None => self.repair(cmdline),
        }
    }

    /// Whether a host has done this damage.
    fn was_struck(&self, word: &str) -> bool {
        let told = format!("WARN perennial.fault={word}");
        self.host.console().lines().any(|line| line.trim_end().ends_with(&told))
    }

    fn note(&mut self, word: &str, [struck, other]: [&str; 2]) {
        let fate = match struck == other {
            true => struck.to_owned(),
            false => format!("{struck}; {other}"),
        };
        eprintln!("{word}: {fate}");
        self.fates.insert(word.to_owned(), fate);
    }

    /// The host's status when it has noticed the end of a process that was killed.
    fn settled(&mut self, word: &str) -> Result<Status, Failure> {
        let deadline = Instant::now() + ANSWER;
        loop {
            let status = self.host.status()?;
            if !ends_guest(word) || state(&status, VMS[0]) != "running" || Instant::now() > deadline
            {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Removes the cause, restores what is preserved, boots a guest that only its process could have saved, and waits
    /// until all guests work.
    fn repair(&mut self, word: &str) -> Result<(), Failure> {
        let boots = self.host.guests().iter().map(|guest| guest.last().map(|beat| beat.boot));
        let boots: Vec<_> = boots.collect();
        for name in VMS {
            // Also removes the cause. A VM that is not preserved cannot be restored.
            let _ = self.host.request(json!({"do": "restore", "vm": name}));
        }
        if ends_guest(word) && state(&self.host.status()?, VMS[0]) == "failed" {
            self.host.request(json!({"do": "boot", "vm": VMS[0]}))?;
        }
        let status = self.host.status()?;
        if VMS.iter().any(|name| state(&status, name) != "running") {
            return Err(format!("{word}: not all run: {status:?}").into());
        }
        for (guest, before) in self.host.guests().iter().zip(boots) {
            guest.resumed();
            let works = |error| format!("{word}: {error}");
            guest.wait_for_heartbeats(3, WORK).map_err(works)?;
            let boot = guest.last().map(|beat| beat.boot);
            if boot != before && !ends_guest(word) {
                return Err(format!("{word}: {} was booted again", guest.name()).into());
            }
        }
        Ok(())
    }
}

fn state<'a>(status: &'a Status, name: &str) -> &'a str {
    let vm = status.vms.iter().find(|vm| vm.name == name);
    vm.map_or("gone", |vm| &vm.state)
}

/// Updates. Returns the status of the next host; `None` if the update was undone.
fn update(host: &mut Host, cmdline: &str) -> Result<Option<Status>, Failure> {
    let refused = |error: &Failure| {
        matches!(error.downcast_ref(), Some(ControlError::Refused { outcome: Some(_), .. }))
    };
    match host.update(json!({"cmdline": cmdline})) {
        Ok(status) => Ok(Some(status)),
        Err(error) if refused(&error) => {
            eprintln!("{error}");
            Ok(None)
        }
        Err(error) => Err(format!("{cmdline}: {error}").into()),
    }
}

fn title(luo: Luo) -> &'static str {
    match luo {
        Luo::Kernel => "## A live update by the kernel's LUO, in a machine",
        Luo::Pool => "## A live update by a pool, in a machine",
    }
}

/// The results of cells by step, half and head of their column.
type Known = BTreeMap<[String; 3], String>;

/// Reads the tables of a section.
fn known(section: &str) -> Known {
    let (mut heads, mut known) = (Vec::new(), Known::new());
    for line in section.lines().filter(|line| line.starts_with('|')) {
        let row: Vec<_> =
            line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
        match row[0].starts_with('`') {
            true => {
                for (head, cell) in heads.iter().zip(&row).skip(1) {
                    let half: &String = &heads[0];
                    known.insert([&row[0], half, head].map(String::clone), cell.clone());
                }
            }
            false if !line.starts_with("|-") => heads = row,
            false => {}
        }
    }
    known
}

/// The section of `docs/faults.md` with these results. Cells that were not run have what is known.
fn section(luo: Luo, fates: &Fates, known: &Known) -> String {
    let mut text = format!("{}\n", title(luo));
    for (leaves, half, steps) in [(true, "Leaving", &STEPS[..]), (false, "Arriving", &ARRIVING)] {
        let heads = FAULTS.map(|(head, ..)| head);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n| {half} | {} |", heads.join(" | "));
        let _ = writeln!(text, "|---|{}", "---|".repeat(FAULTS.len()));
        for step in steps {
            let shown = format!("`{}`", step.trim_end_matches("/one"));
            let fate = |fault: &(&str, Option<&str>, Option<&str>)| {
                let Some(word) = word(luo, step, leaves, fault) else { return "–" };
                let place = [&shown, half, fault.0].map(str::to_owned);
                fates.get(&word).or_else(|| known.get(&place)).map_or("not run", String::as_str)
            };
            let row: Vec<_> = FAULTS.iter().map(fate).collect();
            let _ = writeln!(text, "| {shown} | {} |", row.join(" | "));
        }
    }
    text
}

/// Compares the results with the section of `docs/faults.md`; with [`WRITE`], writes them there.
fn check_table(luo: Luo, fates: &Fates) -> Result<(), Failure> {
    // Two LUOs may come to their ends at the same time.
    static FILE: Mutex<()> = Mutex::new(());
    let _file = FILE.lock();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
    let text = fs::read_to_string(&path)?;
    let start = text.find(title(luo)).ok_or_else(|| format!("no {:?} there", title(luo)))?;
    let end = text[start + 1..].find("\n## ").map_or(text.len(), |end| start + 1 + end);
    let seen = section(luo, fates, &known(&text[start..end]));
    if env::var_os(WRITE).is_some() {
        return Ok(fs::write(&path, format!("{}{seen}{}", &text[..start], &text[end..]))?);
    }
    match text[start..end].trim_end() == seen.trim_end() {
        true => Ok(()),
        false => {
            let remedy = "`make machine-faults WRITE=1` writes it";
            Err(format!("docs/faults.md differs from this run: {remedy}\n{seen}").into())
        }
    }
}
