//! The table: every case by its number.
//!
//! The numbers are those of the project's list of 190 cases, which has for each case the behaviour of
//! Linux 7.3 and its place in the source. A case that not every system can run lists what it needs. A
//! case for which a system deviates asks [`World::deviates`] and checks the deviating behaviour.

mod concurrent;
mod create;
mod decode;
mod device;
mod finish;
mod frozen;
mod incoming;
mod memory;
mod outgoing;
mod preserve;
mod retrieve;
mod switch;
mod wire;

use super::profile::Need;
use super::world::{Failure, Outcome, World};

/// Number of cases in the list.
pub(crate) const CASES: u16 = 190;

/// What a system must be able to do for a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// One kernel.
    U,
    /// A switch to the next.
    G,
    /// A kernel's own boot and memory.
    K,
}

/// One case.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) number: u16,
    pub(crate) class: Class,
    pub(crate) what: &'static str,
    needs: &'static [Need],
    /// Whether the case cannot share a switch with others: its switch is refused, or the next kernel
    /// panics.
    pub(crate) alone: bool,
    pub(crate) run: fn(&mut World) -> Outcome,
}

impl Row {
    /// The features that the case needs and not every system has.
    pub(crate) fn needs(&self) -> impl Iterator<Item = Need> {
        let of_class = (self.class == Class::K).then_some(Need::Kernel);
        self.needs.iter().copied().chain(of_class)
    }

    const fn needing(self, needs: &'static [Need]) -> Self {
        Self { needs, ..self }
    }

    const fn alone(self) -> Self {
        Self { alone: true, ..self }
    }
}

const fn row(number: u16, class: Class, what: &'static str, run: fn(&mut World) -> Outcome) -> Row {
    Row { number, class, what, needs: &[], alone: false, run }
}

/// The function of a case that no system can run yet, because all lack something that the case needs.
fn untold(_: &mut World) -> Outcome {
    Err(Failure("this case is not written, although a system now has what it needs".to_owned()))
}

/// All cases, by section of the list.
pub(crate) fn all() -> impl Iterator<Item = &'static Row> {
    let sections = [
        device::ROWS,
        decode::ROWS,
        create::ROWS,
        preserve::ROWS,
        frozen::ROWS,
        outgoing::ROWS,
        switch::ROWS,
        incoming::ROWS,
        retrieve::ROWS,
        memory::ROWS,
        finish::ROWS,
        concurrent::ROWS,
        wire::ROWS,
    ];
    sections.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_told_once() {
        let mut numbers: Vec<u16> = all().map(|row| row.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=CASES).collect::<Vec<_>>());
    }
}
