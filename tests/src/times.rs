//! Run times of tests: the sum for each suite, and the slowest tests.
//!
//! If `PERENNIAL_TIMES` names a file, a line with seconds and name of each test is appended to it, so
//! that `make test`, which runs several programs, can list the slowest tests of all.

use std::env;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use crate::mutex::lock;

/// Number of tests in the list of the slowest.
const SLOWEST: usize = 10;

/// Suite, test and time.
type Time = (&'static str, String, Duration);

static TIMES: Mutex<Vec<Time>> = Mutex::new(Vec::new());

/// Records how long a test of a suite took.
pub(crate) fn record(suite: &'static str, test: &str, took: Duration) {
    if let Some(path) = env::var_os("PERENNIAL_TIMES") {
        let line = format!("{:.1} {test}\n", took.as_secs_f64());
        let file = OpenOptions::new().create(true).append(true).open(&path);
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            eprintln!("{}: {error}", path.display());
        }
    }
    let mut times = lock(&TIMES);
    times.push((suite, test.to_owned(), took));
}

/// Prints the recorded times.
pub(crate) fn print() {
    let mut times = lock(&TIMES);
    print!("{}", text(&mut times));
}

fn text(times: &mut [Time]) -> String {
    let mut suites: Vec<(&str, usize, Duration)> = Vec::new();
    for (suite, _, took) in times.iter() {
        match suites.iter_mut().find(|(name, ..)| name == suite) {
            Some((_, tests, sum)) => (*tests, *sum) = (*tests + 1, *sum + *took),
            None => suites.push((suite, 1, *took)),
        }
    }
    let mut out =
        "seconds of each suite (the sum over its tests, also of those that ran in parallel):\n"
            .to_owned();
    // Writing to a String cannot fail.
    for (suite, tests, sum) in suites {
        let _ = writeln!(out, "{:8.1} {suite}, {tests} tests", sum.as_secs_f64());
    }
    times.sort_by_key(|(_, _, took)| std::cmp::Reverse(*took));
    let _ = writeln!(out, "seconds of the slowest tests:");
    for (_, test, took) in times.iter().take(SLOWEST) {
        let _ = writeln!(out, "{:8.1} {test}", took.as_secs_f64());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_summed_up_and_the_slowest_tests_come_first() {
        let mut times: Vec<Time> =
            (0..11).map(|n| ("simple", format!("simple::{n}"), Duration::from_secs(n))).collect();
        times.push(("abort", "abort::one".to_owned(), Duration::from_millis(5500)));
        let text = text(&mut times);
        assert!(text.contains("\n    55.0 simple, 11 tests\n     5.5 abort, 1 tests\n"), "{text}");
        let slowest = text.split_once("slowest tests:\n").unwrap().1;
        assert_eq!(slowest.lines().count(), SLOWEST);
        assert!(slowest.starts_with("    10.0 simple::10\n     9.0 simple::9\n"), "{slowest}");
    }
}
