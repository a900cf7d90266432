//! The table of results, in Markdown.
//!
//! A ratio says how many times better `perennial` is than the better one of QEMU's boards in the same round:
//! 2.00 is twice as fast, or half the memory; less than 1.00 is worse. The column shows the median of all
//! rounds and the extremes.

use perennial_tests::side_by_side::{Contender, Measured, names};
use serde::Serialize;

/// How a value is shown, and whether it should be small or large.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// What one unit is in the measured value.
    one: f64,
    smaller_is_better: bool,
    /// A limit in the unit, besides that to be ahead of QEMU.
    at_most: Option<f64>,
    /// The smallest value in the unit that says something. A smaller one counts as this.
    least: f64,
}

const fn more(name: &'static str, title: &'static str, unit: &'static str, one: f64) -> Kind {
    Kind { name, title, unit, one, smaller_is_better: false, at_most: None, least: 0.0 }
}

const fn less(name: &'static str, title: &'static str, unit: &'static str, one: f64) -> Kind {
    Kind { name, title, unit, one, smaller_is_better: true, at_most: None, least: 0.0 }
}

const MIB: f64 = (1 << 20) as f64;
/// Percent of a CPU: 2 ms in the 4 s for which it is counted. An interrupt or two of an emulated host take that.
const NO_CPU: f64 = 0.05;

const KINDS: [Kind; 14] = [
    less(names::BOOT, "boot to init", "ms", 1e-3),
    more(names::RANDOM_READ, "4 KiB random read, depth 1", "1/s", 1.0),
    more(names::RANDOM_WRITE, "4 KiB random write, depth 1", "1/s", 1.0),
    more(names::RANDOM_READ_32, "4 KiB random read, depth 32", "1/s", 1.0),
    more(names::RANDOM_WRITE_32, "4 KiB random write, depth 32", "1/s", 1.0),
    more(names::READ, "1 MiB sequential read", "MiB/s", MIB),
    more(names::WRITE, "1 MiB sequential write", "MiB/s", MIB),
    more(names::STREAM_OUT, "TCP stream out", "MiB/s", MIB),
    more(names::STREAM_IN, "TCP stream in", "MiB/s", MIB),
    more(names::REQUESTS, "TCP request and response", "1/s", 1.0),
    Kind { at_most: Some(8.0), ..less(names::MEMORY, "memory of the VM's process", "MiB", MIB) },
    less(names::MEMORY_ALL, "memory of all its processes", "MiB", MIB),
    Kind { least: NO_CPU, ..less(names::IDLE, "CPU of an idle VM", "% of one", 0.01) },
    Kind { least: NO_CPU, ..less(names::PAUSED, "CPU of a paused VM", "% of one", 0.01) },
];

/// A line of the table.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) title: String,
    pub(super) unit: &'static str,
    /// Medians: `perennial`, microvm, q35. `None` where there is nothing to measure.
    pub(super) values: [Option<f64>; 3],
    /// Median, smallest and largest. `None` if there was nothing to divide by.
    pub(super) ratio: Option<[f64; 3]>,
    pub(super) aim: String,
    pub(super) met: bool,
}

pub(super) fn rows(measured: &[Measured]) -> Vec<Row> {
    KINDS.iter().map(|kind| row(kind, measured)).collect()
}

fn row(kind: &Kind, measured: &[Measured]) -> Row {
    let of = |contender: Contender, round: Option<usize>| -> Vec<f64> {
        let all = measured.iter().filter(|m| m.contender == contender);
        let all = all.filter(|m| round.is_none_or(|round| m.round == round));
        all.filter_map(|m| m.values.get(kind.name)).map(|value| value / kind.one).collect()
    };
    let values = Contender::ALL.map(|contender| median(of(contender, None)));
    let mut rounds: Vec<usize> = measured.iter().map(|m| m.round).collect();
    rounds.dedup();
    let ratios = rounds.into_iter().filter_map(|round| {
        let [ours, microvm, q35] = Contender::ALL.map(|c| of(c, Some(round)).first().copied());
        better(kind, ours?, microvm?, q35?)
    });
    let ratio = spread(ratios.collect());
    let ahead = ratio.is_some_and(|[median, ..]| median >= 1.0);
    let within = kind.at_most.is_none_or(|most| values[0].is_some_and(|ours| ours <= most));
    let aim = match kind.at_most {
        None => "at least 1.00".to_owned(),
        Some(most) => format!("at least 1.00, and at most {most} {}", kind.unit),
    };
    Row { title: kind.title.into(), unit: kind.unit, values, ratio, aim, met: ahead && within }
}

/// How many times better the first is than the better of the other two. `None` if that cannot be said.
fn better(kind: &Kind, ours: f64, microvm: f64, q35: f64) -> Option<f64> {
    let [ours, microvm, q35] = [ours, microvm, q35].map(|value| value.max(kind.least));
    let ratio = match kind.smaller_is_better {
        true => microvm.min(q35) / ours,
        false => ours / microvm.max(q35),
    };
    ratio.is_finite().then_some(ratio)
}

/// Median, smallest and largest.
pub(super) fn spread(mut all: Vec<f64>) -> Option<[f64; 3]> {
    all.sort_by(f64::total_cmp);
    Some([median(all.clone())?, *all.first()?, *all.last()?])
}

fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    let (upper, lower) = (all.get(all.len() / 2)?, all.get((all.len() - 1) / 2)?);
    Some(f64::midpoint(*upper, *lower))
}

/// Prints the table, ready to be pasted into a document.
pub(super) fn print(rows: &[Row]) {
    println!("| | unit | perennial | microvm | q35 | ratio | aim | met |");
    println!("|---|---|--:|--:|--:|--:|---|---|");
    for Row { title, unit, values, ratio, aim, met } in rows {
        let [ours, microvm, q35] = values.map(|value| value.map_or("–".to_owned(), shown));
        let ratio = ratio.map_or("–".to_owned(), |[median, least, most]| {
            format!("{median:.2} ({least:.2}–{most:.2})")
        });
        let met = if *met { "yes" } else { "**no**" };
        println!("| {title} | {unit} | {ours} | {microvm} | {q35} | {ratio} | {aim} | {met} |");
    }
}

/// Three digits or more.
fn shown(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(values: &[(Contender, usize, f64)], name: &str) -> Vec<Measured> {
        let one = |(contender, round, value): &(Contender, usize, f64)| Measured {
            round: *round,
            contender: *contender,
            values: [(name.to_owned(), *value)].into(),
        };
        values.iter().map(one).collect()
    }

    fn find(name: &str) -> &'static Kind {
        KINDS.iter().find(|kind| kind.name == name).unwrap()
    }

    #[test]
    fn every_value_has_a_row() {
        for name in names::ALL {
            find(name);
        }
    }

    #[test]
    fn a_ratio_is_taken_within_a_round_against_the_better_board() {
        use Contender::{Microvm, Perennial, Q35};
        let name = names::READ;
        // The second round is slow for all.
        let rounds = [
            (Perennial, 0, 300.0),
            (Microvm, 0, 200.0),
            (Q35, 0, 100.0),
            (Q35, 1, 20.0),
            (Perennial, 1, 30.0),
            (Microvm, 1, 10.0),
        ];
        let row = row(find(name), &measured(&rounds, name));
        assert_eq!(row.ratio, Some([1.5, 1.5, 1.5]));
        assert!(row.met);
    }

    #[test]
    fn less_memory_is_better_but_not_enough_above_the_limit() {
        use Contender::{Microvm, Perennial, Q35};
        let name = names::MEMORY;
        let with = |ours: f64| {
            let values =
                [(Perennial, 0, ours * MIB), (Microvm, 0, 40.0 * MIB), (Q35, 0, 36.0 * MIB)];
            row(find(name), &measured(&values, name))
        };
        assert_eq!((with(6.0).ratio, with(6.0).met), (Some([6.0; 3]), true));
        assert_eq!((with(9.0).ratio, with(9.0).met), (Some([4.0; 3]), false));
    }

    #[test]
    fn a_vm_that_uses_hardly_any_cpu_is_not_behind_one_that_uses_none() {
        use Contender::{Microvm, Perennial, Q35};
        let name = names::PAUSED;
        let with = |ours: f64| {
            let values = [(Perennial, 0, ours), (Microvm, 0, 0.0), (Q35, 0, 0.0)];
            row(find(name), &measured(&values, name))
        };
        for ours in [0.0, 0.0004] {
            assert_eq!((with(ours).ratio, with(ours).met), (Some([1.0; 3]), true));
        }
        assert!(!with(0.02).met);
    }
}
