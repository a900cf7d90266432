//! Runs a fuzz target as an ordinary test.

use std::env;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use crate::Mutator;

/// Number of inputs for each target, unless `PERENNIAL_FUZZ_INPUTS` sets another.
const INPUTS: usize = 2000;

/// Calls `target` with every seed in the directory `seeds`, and with 2000 inputs made from the seeds
/// (`PERENNIAL_FUZZ_INPUTS` sets another number). A failing input is written to a temporary file.
///
/// # Panics
///
/// If the target panics, or the directory has no seeds.
pub fn replay(seeds: impl AsRef<Path>, target: fn(&[u8])) {
    let directory = seeds.as_ref();
    let seeds = read_all(directory);
    assert!(!seeds.is_empty(), "there are no seeds in {}", directory.display());
    seeds.iter().for_each(|seed| try_one(directory, seed, target));
    let mut mutator = Mutator::new(number_of(directory));
    for _ in 0..inputs() {
        try_one(directory, &mutator.input(&seeds), target);
    }
}

fn inputs() -> usize {
    match env::var("PERENNIAL_FUZZ_INPUTS") {
        Ok(text) => text.parse().expect("PERENNIAL_FUZZ_INPUTS is a number"),
        Err(_) => INPUTS,
    }
}

/// All files of the directory, in the order of their names.
fn read_all(directory: &Path) -> Vec<Vec<u8>> {
    let read = || {
        let entries = fs::read_dir(directory)?;
        let mut paths = entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        paths.iter().map(fs::read).collect::<io::Result<_>>()
    };
    read().unwrap_or_else(|error| panic!("cannot read {}: {error}", directory.display()))
}

fn try_one(directory: &Path, input: &[u8], target: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = env::temp_dir().join(format!("perennial-fuzz-{name}"));
        match fs::write(&file, input) {
            Ok(()) => eprintln!("the failing input is in {}", file.display()),
            Err(error) => {
                eprintln!("the failing input is {input:x?} ({}: {error})", file.display())
            }
        }
        resume_unwind(panic);
    }
}

/// A number computed from a directory's name, so that targets get different changes.
fn number_of(directory: &Path) -> u64 {
    let name = directory.file_name().unwrap_or_default().as_encoded_bytes();
    name.iter().fold(0, |number: u64, byte| number.wrapping_mul(257).wrapping_add((*byte).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses_long_inputs(input: &[u8]) {
        assert!(input.len() < 20, "too long");
    }

    #[test]
    fn what_no_seed_shows_is_found_and_kept() {
        let directory = env::temp_dir().join(format!("perennial-fuzz-test-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(directory.join("seed"), [7; 19]).expect("a seed");
        let found = catch_unwind(|| replay(&directory, refuses_long_inputs));
        found.expect_err("19 bytes become 20");
        let name = directory.file_name().expect("it has one").to_string_lossy();
        let kept = env::temp_dir().join(format!("perennial-fuzz-{name}"));
        assert!(fs::read(&kept).expect("the input").len() >= 20);
        fs::remove_file(kept).expect("it is there");
        fs::remove_dir_all(&directory).expect("it is there");
        catch_unwind(|| replay(&directory, refuses_long_inputs)).expect_err("there are no seeds");
    }
}
