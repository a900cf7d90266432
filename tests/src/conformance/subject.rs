//! The systems on which the cases run: the columns of the table.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use super::backed::{Backed, KeeperBackend, PoolBackend};
use super::handover;
use super::machine::{self, Guest, Owner, Shared};
use super::processes::{Device, Processes};
use super::profile;
use super::rows::{self, Row};
use super::run::{self, Verdict, Verdicts};
use super::simulated::Simulated;
use crate::binaries;
use crate::mutex::lock;

/// A system under test, which is a column of the table.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    /// Its description, for the head of the table.
    pub(crate) what: &'static str,
    place: Place,
    known: Mutex<BTreeMap<u16, Verdict>>,
}

/// Where a system is.
enum Place {
    /// In this process: a new system for every case.
    Here(fn(&Row) -> Verdict),
    /// Processes under the emulator: a new system for every case.
    Emulated,
    /// In a QEMU machine: one for all cases.
    Machine(Owner, OnceLock<Result<Machine, String>>),
}

/// The results from one machine.
struct Machine {
    verdicts: Verdicts,
    handover: Verdict,
}

pub(crate) static SUBJECTS: [Subject; 6] = [
    Subject::new("machine", "the state machine", Place::Here(state_machine)),
    Subject::new("keeper", "the keeper", Place::Here(keeper)),
    Subject::new("pool", "the pool, on any file system", Place::Here(pool)),
    Subject::new("emulator", "`perennial luo emulate`", Place::Emulated),
    Subject::new(
        "pool over kexec",
        "the pool in memory that a kexec leaves alone, on kernels whose LUO is off",
        Place::Machine(Owner::Pool, OnceLock::new()),
    ),
    Subject::new("Linux", "the kernel's own", Place::Machine(Owner::Kernel, OnceLock::new())),
];

fn state_machine(row: &Row) -> Verdict {
    run::alone(row, &profile::MACHINE, || Ok(Simulated::new()))
}

fn keeper(row: &Row) -> Verdict {
    run::alone(row, &profile::KEEPER, || Ok(Backed::new(KeeperBackend::new())))
}

fn pool(row: &Row) -> Verdict {
    run::alone(row, &profile::POOL, || Ok(Backed::new(PoolBackend::new())))
}

impl Subject {
    const fn new(name: &'static str, what: &'static str, place: Place) -> Self {
        Self { name, what, place, known: Mutex::new(BTreeMap::new()) }
    }

    /// The verdict of a case. `Err`: the reason why it cannot run on this computer.
    pub(crate) fn verdict(&self, row: &'static Row) -> Result<Verdict, String> {
        let verdict = match &self.place {
            Place::Here(tell) => tell(row),
            Place::Emulated => {
                emulator_missing()?;
                let binaries = binaries::build()?;
                let perennial = binaries::with_tools()?.to_owned();
                let agent = binaries.conformance_agent();
                let device = Device::Emulated { perennial, agent };
                let start = || Processes::start(device).map_err(|errno| errno.to_string());
                run::alone(row, &profile::EMULATOR, start)
            }
            Place::Machine(owner, machine) => {
                let machine = machine.get_or_init(|| tell_all(*owner)).as_ref()?;
                let verdict = machine.verdicts.get(&row.number).cloned();
                verdict.unwrap_or_else(|| Verdict::Failed("the case did not run".to_owned()))
            }
        };
        let mut known = lock(&self.known);
        known.insert(row.number, verdict.clone());
        Ok(verdict)
    }

    /// The verdicts of all cases so far.
    pub(crate) fn known(&self) -> BTreeMap<u16, Verdict> {
        lock(&self.known).clone()
    }
}

/// The verdict of reading the handover that Linux writes.
pub(crate) fn handover() -> Result<Verdict, String> {
    let machines = SUBJECTS.iter().filter_map(|subject| match &subject.place {
        Place::Machine(Owner::Kernel, machine) => Some(machine),
        _ => None,
    });
    let machine = machines.last().ok_or("no subject runs the kernel's LUO")?;
    Ok(machine.get_or_init(|| tell_all(Owner::Kernel)).as_ref()?.handover.clone())
}

fn tell_all(owner: Owner) -> Result<Machine, String> {
    if let Some(missing) = machine::missing(owner) {
        return Err(missing);
    }
    let failed = |failure: String| {
        let all = rows::all().map(|row| (row.number, Verdict::Failed(failure.clone()))).collect();
        Ok(Machine { verdicts: all, handover: Verdict::Failed(failure) })
    };
    let guest: Shared = match run::caught(|| Guest::boot(owner)) {
        Ok(guest) => Arc::new(Mutex::new(guest)),
        Err(failure) => return failed(failure),
    };
    let handover = match owner {
        Owner::Kernel => run::caught(|| handover::check(&guest))
            .map_or_else(Verdict::Failed, |()| Verdict::Passed),
        Owner::Pool => Verdict::Lacks("only Linux has it"),
    };
    let rows: Vec<&'static Row> = rows::all().collect();
    Ok(Machine { verdicts: run::on_one_machine(&guest, &rows), handover })
}

/// Errors with the reason if programs cannot run under the emulator on this computer.
fn emulator_missing() -> Result<(), String> {
    static MISSING: OnceLock<Result<(), String>> = OnceLock::new();
    let look = || {
        let perennial = binaries::with_tools()?;
        let output = Command::new(perennial).args(["luo", "emulate", "--", "true"]).output();
        match output {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    MISSING.get_or_init(look).clone()
}
