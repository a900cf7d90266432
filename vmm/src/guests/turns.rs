//! The turns of VMs that boot, or are restored, side by side: only a few begin at a time, and one that takes long, because a
//! disk of it hangs, keeps the next one back only as long as its turn lasts.

use std::thread;
use std::time::{Duration, Instant};

/// How long a VM that has begun keeps the next one from beginning. A VM that takes longer may hang.
const TURN: Duration = Duration::from_secs(1);

/// How many VMs have a turn at the same time. More would only share the CPUs with those that are more urgent. One more than
/// there are CPUs, because some wait for a disk.
pub fn at_once() -> usize {
    1 + thread::available_parallelism().map_or(1, usize::from)
}

/// Returns when the next VM may begin, if others, which are not done yet, `began` then: now, if fewer than `at_once` of them
/// have their turn.
pub fn next(began: impl Iterator<Item = Instant>, at_once: usize, now: Instant) -> Instant {
    let mut ends: Vec<_> = began.map(|began| began + TURN).filter(|end| *end > now).collect();
    ends.sort();
    ends.len().checked_sub(at_once).map_or(now, |too_many| ends[too_many])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_few_begin_at_once_but_one_that_takes_long_keeps_none_back_for_ever() {
        let now = Instant::now();
        let ago = |ms| now - Duration::from_millis(ms);
        let turn = |began: &[Instant]| next(began.iter().copied(), 2, now);
        assert_eq!(turn(&[]), now);
        assert_eq!(turn(&[ago(10)]), now);
        assert_eq!(turn(&[ago(10), ago(600)]), ago(600) + TURN);
        assert_eq!(turn(&[ago(600), ago(5000), ago(5000), ago(10)]), ago(600) + TURN);
        assert_eq!(turn(&[ago(5000), ago(10), ago(5000)]), now);
    }
}
