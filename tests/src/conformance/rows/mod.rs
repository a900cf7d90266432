//! The table: every case by its number.
//!
//! Numbers are those of the project's list of 190 cases, which says for each what Linux 7.3 does and
//! where that stands in its source. A case that a system cannot take part in says what it needs; a case
//! that a system answers otherwise asks [`World::deviates`] and says what it sees instead.

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

/// How many cases the list has.
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
    /// It cannot share a switch with others: it has one refused, or ends the next kernel.
    pub(crate) alone: bool,
    pub(crate) run: fn(&mut World) -> Outcome,
}

impl Row {
    /// What not every system has.
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

/// What is written down of a case that no system can take part in, for want of something that it needs.
fn untold(_: &mut World) -> Outcome {
    Err(Failure("a system has what this case needs: it is to be written".to_owned()))
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
