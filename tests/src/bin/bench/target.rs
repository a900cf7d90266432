//! Upper limits for measurements.

use perennial_tests::samples::Samples;
use serde::Serialize;

/// A measured ratio and its upper limit.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    name: &'static str,
    ratio: Option<f64>,
    at_most: f64,
    met: bool,
}

impl Target {
    /// A limit for the ratio of the medians of `one` and `other`.
    pub(crate) fn ratio(name: &'static str, one: &Samples, other: &Samples, at_most: f64) -> Self {
        Self::new(name, one.ratio(other), at_most)
    }

    /// A limit of `nanoseconds` for a measured time.
    pub(crate) fn time(name: &'static str, measured: &Samples, nanoseconds: u64) -> Self {
        let wanted = Samples::new(vec![nanoseconds]);
        Self::new(name, measured.ratio(&wanted), 1.0)
    }

    fn new(name: &'static str, ratio: Option<f64>, at_most: f64) -> Self {
        Self { name, ratio, at_most, met: ratio.is_some_and(|ratio| ratio <= at_most) }
    }
}

/// Prints each ratio with its limit.
pub(crate) fn print(targets: &[Target]) {
    println!("\nTargets");
    for target in targets {
        let ratio = target.ratio.map_or("unknown".to_owned(), |ratio| format!("{ratio:.3}"));
        let met = if target.met { "met" } else { "NOT met" };
        println!("  {:44} {ratio:>8}  at most {:.2}: {met}", target.name, target.at_most);
    }
}
