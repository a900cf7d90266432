//! Statistics of repeated measurements.

use serde::Serialize;

use crate::timeline::human;

/// Measurements in nanoseconds, with their minimum, median and maximum.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Samples {
    min: u64,
    median: u64,
    max: u64,
    all: Vec<u64>,
}

impl Samples {
    /// Takes the measurements in the order in which they were made.
    pub fn new(all: Vec<u64>) -> Self {
        let mut sorted = all.clone();
        sorted.sort_unstable();
        let median = match (sorted.get(all.len() / 2), all.len() % 2) {
            (None, _) => 0,
            (Some(upper), 1) => *upper,
            (Some(upper), _) => sorted[all.len() / 2 - 1].midpoint(*upper),
        };
        let (min, max) = (sorted.first(), sorted.last());
        Self { min: *min.unwrap_or(&0), median, max: *max.unwrap_or(&0), all }
    }

    /// The median: for an even number of measurements the mean of the two in the middle, for none 0.
    pub fn median(&self) -> u64 {
        self.median
    }

    /// This median divided by that of `other`. `None` if either is 0.
    pub fn ratio(&self, other: &Self) -> Option<f64> {
        (other.median > 0 && self.median > 0).then(|| self.median as f64 / other.median as f64)
    }

    /// `min / median / max`.
    pub fn text(&self) -> String {
        let [min, median, max] = [self.min, self.median, self.max].map(human);
        format!("{min:>10} / {median:>10} / {max:>10}  (n={})", self.all.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_odd_an_even_and_no_number_of_samples() {
        assert_eq!(Samples::new(vec![3, 1, 2]).median(), 2);
        assert_eq!(Samples::new(vec![4, 1, 2, 3]).median(), 2);
        assert_eq!(Samples::new(vec![u64::MAX, u64::MAX]).median(), u64::MAX);
        assert_eq!(Samples::new(vec![]), Samples::default());
    }

    #[test]
    fn a_ratio_to_nothing_is_none() {
        let (some, none) = (Samples::new(vec![3]), Samples::new(vec![]));
        assert_eq!(some.ratio(&none), None);
        assert_eq!(none.ratio(&some), None);
        assert_eq!(some.ratio(&Samples::new(vec![2])), Some(1.5));
    }
}
