//! `make bench`: measures the blackout, the cost of the built-in LUO's calls, and the machine that a guest gets.
//!
//! All numbers of one run come from one computer and one set of binaries, so that their ratios are
//! meaningful even where the absolute numbers are not. Slowness is no failure: the targets are printed
//! beside the results. `bench blackout`, `bench luo` and `bench machine` measure
//! only one part.

mod blackout;
mod luo;
mod machine;
mod target;

use std::env;
use std::fs;
use std::process::ExitCode;

use perennial_tests::host::Failure;
use perennial_tests::paths;
use serde_json::{Map, Value};

fn main() -> ExitCode {
    let part = env::args().nth(1);
    let done = match part.as_deref() {
        Some(luo::CALLER) => luo::caller(),
        Some(luo::FILLER) => luo::filler(),
        None => bench(&["luo", "blackout", "machine"]),
        Some("luo") => bench(&["luo"]),
        Some("blackout") => bench(&["blackout"]),
        Some("machine") => bench(&["machine"]),
        Some(other) => {
            Err(format!("unknown part `{other}`; the parts are luo, blackout, machine").into())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(parts: &[&str]) -> Result<(), Failure> {
    let mut report = Map::new();
    for part in parts {
        let measured: Value = match *part {
            "luo" => luo::bench()?,
            "machine" => machine::bench()?,
            _ => blackout::bench()?,
        };
        report.insert((*part).to_owned(), measured);
        println!();
    }
    let path = paths::results("bench")?.join("report.json");
    fs::write(&path, serde_json::to_string_pretty(&report)?)?;
    println!("Wrote {}", path.display());
    Ok(())
}
