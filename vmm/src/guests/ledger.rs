//! The ledger: when each phase of a live update began and ended, in one clock across both kernels.
//!
//! Timestamps are ticks of a counter that runs on over a kexec, which no kernel clock does. The counter
//! depends on the architecture (on x86 it is the host's TSC), so a ledger names its counter. Ticks become
//! nanoseconds only in the report.

use crate::arch::x86_64::tsc;
use crate::state::{Node, Reader, Schema, StateError};

/// Most phases of one ledger. A live update has about twenty.
const MAX_PHASES: usize = 256;

/// A phase: a name with its begin and end in ticks of the counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phase {
    /// Name of the phase, such as `pause`.
    pub name: String,
    /// Ticks at its beginning.
    pub start: u64,
    /// Ticks at its end, at least `start`.
    pub end: u64,
}

/// Phases in the order in which they ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// The phases.
    pub phases: Vec<Phase>,
}

impl Ledger {
    /// Appends a phase. An `end` before `start` counts as `start`.
    pub fn enter(&mut self, name: &str, start: u64, end: u64) {
        self.phases.push(Phase { name: name.to_owned(), start, end: end.max(start) });
    }
}

/// `perennial,ledger-v1`.
impl Schema for Ledger {
    const COMPATIBLE: &'static [&'static str] = &["perennial,ledger-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { phases } = self;
        node.put_str("counter", tsc::NAME);
        let names: Vec<&str> = phases.iter().map(|p| p.name.as_str()).collect();
        // Without phases the property has no bytes: a list of no strings, not of one empty string.
        node.put_strings("phases", &names);
        node.put_u64s("start-ticks", &phases.iter().map(|p| p.start).collect::<Vec<_>>());
        node.put_u64s("end-ticks", &phases.iter().map(|p| p.end).collect::<Vec<_>>());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let counter = reader.str("counter")?;
        if counter != tsc::NAME {
            let problem = format!("the document counts `{counter}`, this machine `{}`", tsc::NAME);
            return Err(reader.invalid("counter", problem));
        }
        let names = reader.string_list("phases")?;
        let starts = reader.u64s("start-ticks")?;
        let ends = reader.u64s("end-ticks")?;
        if names.len() > MAX_PHASES || starts.len() != names.len() || ends.len() != names.len() {
            let problem = format!(
                "{} phases (at most {MAX_PHASES}), {} starts, {} ends",
                names.len(),
                starts.len(),
                ends.len()
            );
            return Err(reader.invalid("phases", problem));
        }
        let phases: Vec<Phase> = names
            .into_iter()
            .zip(starts)
            .zip(ends)
            .map(|((name, start), end)| Phase { name, start, end })
            .collect();
        match phases.iter().find(|p| p.end < p.start) {
            Some(p) => {
                Err(reader.invalid("end-ticks", format!("`{}` ends before it starts", p.name)))
            }
            None => Ok(Self { phases }),
        }
    }
}

/// The rate of the host's TSC, to turn ticks into nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscRate {
    khz: u32,
}

impl TscRate {
    /// A rate in kHz. 0 counts as 1, so that a wrong rate gives absurd numbers instead of a panic.
    pub fn from_khz(khz: u32) -> Self {
        Self { khz: khz.max(1) }
    }

    /// The rate in kHz.
    pub fn khz(self) -> u32 {
        self.khz
    }

    /// Nanoseconds from `start` to `end`, 0 if `end` is earlier.
    pub fn nanoseconds(self, start: u64, end: u64) -> u64 {
        tsc::ns(end.saturating_sub(start), self.khz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;

    impl Ledger {
        pub(crate) fn sample() -> Self {
            let mut ledger = Self::default();
            ledger.enter("pause", 10, 20);
            ledger.enter("save", 20, 35);
            ledger
        }
    }

    contract_tests! {
        Ledger,
        sample: Ledger::sample,
        changes: [
            |l| l.phases[0].name.clear(),
            |l| l.phases[0].start += 1,
            |l| l.phases[1].end += 1,
            |l| l.phases.swap(0, 1),
            |l| l.phases.clear(),
        ],
        golden: "ledger-v1",
    }

    #[test]
    fn a_ledger_survives_its_node_even_when_empty() {
        for ledger in [Ledger::sample(), Ledger::default()] {
            assert_eq!(read_node::<Ledger>(&ledger.to_node("ledger"), ""), Ok(ledger));
        }
    }

    #[test]
    fn a_ledger_that_contradicts_itself_is_refused() {
        let mut node = Ledger::sample().to_node("ledger");
        node.properties.insert("end-ticks".to_owned(), 9u64.to_be_bytes().to_vec());
        assert!(read_node::<Ledger>(&node, "").is_err(), "one end for two phases");
        let ends = [9u64.to_be_bytes(), 35u64.to_be_bytes()].concat();
        node.properties.insert("end-ticks".to_owned(), ends);
        let error = read_node::<Ledger>(&node, "").unwrap_err().to_string();
        assert!(error.contains("`pause` ends before it starts"), "{error}");
    }

    #[test]
    fn a_ledger_by_another_counter_is_refused_with_both_sides() {
        let mut node = Ledger::sample().to_node("ledger");
        node.properties.insert("counter".to_owned(), b"arm-cntvct\0".to_vec());
        let error = read_node::<Ledger>(&node, "").unwrap_err().to_string();
        assert!(error.contains("counts `arm-cntvct`, this machine `x86-tsc`"), "{error}");
    }

    #[test]
    fn ticks_become_nanoseconds_without_overflow() {
        let rate = TscRate::from_khz(2_500_000);
        assert_eq!(rate.nanoseconds(0, 2_500_000_000), 1_000_000_000);
        assert_eq!(rate.nanoseconds(5, 0), 0);
        assert_eq!(TscRate::from_khz(1).nanoseconds(0, u64::MAX), u64::MAX);
        assert_eq!(TscRate::from_khz(0).nanoseconds(0, 1), 1_000_000);
    }
}
