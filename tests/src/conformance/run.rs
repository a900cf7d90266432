//! Runs cases: each on a new system, or all of them on one machine.
//!
//! On one machine the cases take turns. A case that requests the switch waits until every other case
//! has ended or waits as well; then one switch serves all of them. Cases that cannot share a switch run
//! last, one after the other.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use luo::Errno;

use super::machine::{Shared, Turn};
use super::profile::{Deviation, Profile};
use super::rows::{Class, Row};
use super::system::{Next, System};
use super::world::World;
use crate::host::Failure;
use crate::mutex::lock;
use crate::paths;

/// The result of a case on a system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The system behaved as the list of cases says of Linux.
    Passed,
    /// The system showed deviations that its profile lists.
    Deviates(BTreeSet<Deviation>),
    /// The system lacks what the case needs, with the reason.
    Lacks(&'static str),
    Failed(String),
}

/// Verdicts by the numbers of their cases.
pub(crate) type Verdicts = BTreeMap<u16, Verdict>;

/// Why a system cannot run a case. `None` if it can.
pub(crate) fn lacking(row: &Row, profile: &Profile) -> Option<&'static str> {
    let mut needs: Vec<_> = row.needs().collect();
    // The need of the case's class, the last one, has the most general reason.
    needs.reverse();
    needs.into_iter().find_map(|need| profile.lacks(need))
}

/// Runs a case on a new system.
pub(crate) fn alone<S: System + 'static>(
    row: &Row,
    profile: &Profile,
    start: impl FnOnce() -> Result<S, String>,
) -> Verdict {
    match lacking(row, profile) {
        Some(reason) => Verdict::Lacks(reason),
        None => tell(row, || Ok(World::new(Box::new(start()?)))),
    }
}

fn tell(row: &Row, world: impl FnOnce() -> Result<World, String>) -> Verdict {
    let told = catch_unwind(AssertUnwindSafe(|| {
        let mut world = world()?;
        (row.run)(&mut world).map_err(|failure| failure.0)?;
        Ok(world.deviated())
    }));
    match told {
        Ok(Ok(deviations)) if deviations.is_empty() => Verdict::Passed,
        Ok(Ok(deviations)) => Verdict::Deviates(deviations),
        Ok(Err(failure)) => Verdict::Failed(failure),
        Err(panic) => Verdict::Failed(words(&*panic)),
    }
}

/// Calls a function and returns its panic, if any, as an error.
pub(crate) fn caught<T>(call: impl FnOnce() -> Result<T, Failure>) -> Result<T, String> {
    let result = catch_unwind(AssertUnwindSafe(call));
    result.map_err(|panic| words(&*panic))?.map_err(|failure| failure.to_string())
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// Runs all these cases on one machine.
pub(crate) fn on_one_machine(guest: &Shared, rows: &[&'static Row]) -> Verdicts {
    let profile = lock(guest).profile();
    let lack = |row: &&'static Row| lacking(row, profile).map(|reason| (row.number, reason));
    let mut verdicts: Verdicts = rows
        .iter()
        .filter_map(lack)
        .map(|(number, reason)| (number, Verdict::Lacks(reason)))
        .collect();
    let told = rows.iter().copied().filter(|row| !verdicts.contains_key(&row.number));
    let (last, mut together): (Vec<_>, Vec<_>) = told.partition(|row| row.alone);
    // Cases without a switch run first, so that they end before a waiting case leaves sessions in the
    // machine.
    together.sort_by_key(|row| row.class == Class::G);
    let told = in_turns(guest, &together);
    verdicts.extend(told);
    for row in last {
        let verdict = tell(row, || Ok(World::new(Box::new(Turn::new(guest)))));
        report(row.number, &verdict);
        verdicts.insert(row.number, verdict);
    }
    verdicts
}

/// Prints a verdict at once if `PERENNIAL_VERBOSE` is set: the harness prints results only after all
/// cases of the machine have run.
fn report(number: u16, verdict: &Verdict) {
    if paths::verbose() {
        eprintln!("case {number:03}: {verdict:?}");
    }
}

/// Why a case's turn is over.
enum Event {
    Waits,
    Ended(Verdict),
}

/// A case in a separate thread, which runs only during its turns.
struct Lane {
    number: u16,
    /// Starts a turn, with the result of the switch that the case waited for.
    turn: Sender<Result<(), Errno>>,
}

fn in_turns(guest: &Shared, rows: &[&'static Row]) -> Verdicts {
    let (events, said) = channel();
    let mut lanes: Vec<Lane> =
        rows.iter().map(|row| lane(Arc::clone(guest), row, events.clone())).collect();
    let (mut verdicts, mut switched) = (Verdicts::new(), Ok(()));
    while !lanes.is_empty() {
        lanes.retain(|lane| {
            let event = lane.turn.send(switched).ok().and_then(|()| said.recv().ok());
            match event {
                Some(Event::Waits) => true,
                Some(Event::Ended(verdict)) => {
                    report(lane.number, &verdict);
                    verdicts.insert(lane.number, verdict);
                    false
                }
                None => false,
            }
        });
        if !lanes.is_empty() {
            let switch = || lock(guest).switch(Next::Kernel, || ());
            // If the machine has ended, the waiting cases fail with this errno.
            switched = catch_unwind(AssertUnwindSafe(switch)).unwrap_or(Err(Errno::IO));
        }
    }
    verdicts
}

fn lane(guest: Shared, row: &'static Row, events: Sender<Event>) -> Lane {
    let (turn, turns) = channel();
    thread::spawn(move || {
        let turns: Receiver<Result<(), Errno>> = turns;
        if turns.recv().is_err() {
            return;
        }
        let waiting = events.clone();
        let verdict = tell(row, || {
            let wait = move || {
                waiting.send(Event::Waits).map_err(|_| Errno::CANCELED)?;
                turns.recv().unwrap_or(Err(Errno::CANCELED))
            };
            let system = Turn::new(&guest).waiting(wait);
            Ok(World::scoped(Box::new(system), format!("-{}", row.number)))
        });
        let _ = events.send(Event::Ended(verdict));
    });
    Lane { number: row.number, turn }
}
