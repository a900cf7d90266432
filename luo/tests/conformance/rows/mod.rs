//! The table: every case by its number, or the reason why it is not told.
//!
//! Numbers are those of the project's list of 190 cases, which says for each what Linux 7.3 does and
//! where that stands in its source.

mod create;
mod decode;
mod device;
mod finish;
mod incoming;
mod outgoing;
mod preserve;
mod retrieve;
mod switch;
mod unexpressed;
mod wire;

pub(crate) use unexpressed::UNEXPRESSED;

use crate::world::{Outcome, World};

/// What a system must be able to do for a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// One kernel.
    U,
    /// A switch to the next.
    G,
}

/// One case.
pub(crate) struct Row {
    pub(crate) number: u16,
    pub(crate) class: Class,
    pub(crate) what: &'static str,
    pub(crate) run: fn(&mut World) -> Outcome,
}

const fn row(number: u16, class: Class, what: &'static str, run: fn(&mut World) -> Outcome) -> Row {
    Row { number, class, what, run }
}

/// All cases that are told.
pub(crate) fn all() -> impl Iterator<Item = &'static Row> {
    let sections = [
        device::ROWS,
        decode::ROWS,
        create::ROWS,
        preserve::ROWS,
        outgoing::ROWS,
        switch::ROWS,
        incoming::ROWS,
        retrieve::ROWS,
        finish::ROWS,
        wire::ROWS,
    ];
    sections.into_iter().flatten()
}
