//! The end-to-end suites, in one program: each free machine takes the next test, of any suite.
//!
//! The suites with the longest tests come first, so that no machine is idle for long at the end.

mod abort;
mod bad_input;
mod clocks;
mod cpus;
mod debian;
mod disks;
mod faults;
mod foreground;
mod handover;
mod many;
mod network;
mod power;
mod rehearsal;
mod repeat;
mod silence;
mod simple;
mod stock;
mod systemd;
mod travel;
mod two_vms;
mod versions;

use std::env;
use std::process::ExitCode;

use perennial_tests::suite::{self, Suite};

fn main() -> ExitCode {
    let mut suites = vec![
        Suite { name: "debian", tests: debian::TESTS },
        Suite { name: "repeat", tests: repeat::TESTS },
        Suite { name: "network", tests: network::TESTS },
        Suite { name: "abort", tests: abort::TESTS },
        Suite { name: "travel", tests: travel::TESTS },
        Suite { name: "versions", tests: versions::TESTS },
        Suite { name: "two_vms", tests: two_vms::TESTS },
        Suite { name: "handover", tests: handover::TESTS },
        Suite { name: "rehearsal", tests: rehearsal::TESTS },
        Suite { name: "stock", tests: stock::TESTS },
        Suite { name: "power", tests: power::TESTS },
        Suite { name: "disks", tests: disks::TESTS },
        Suite { name: "clocks", tests: clocks::TESTS },
        Suite { name: "cpus", tests: cpus::TESTS },
        Suite { name: "systemd", tests: systemd::TESTS },
        Suite { name: "bad_input", tests: bad_input::TESTS },
        Suite { name: "simple", tests: simple::TESTS },
        Suite { name: "foreground", tests: foreground::TESTS },
        Suite { name: "silence", tests: silence::TESTS },
    ];
    // `make test-guests` asks for them: they take too long for every run.
    let all = env::var_os("PERENNIAL_GUESTS").is_some();
    if all {
        suites.push(Suite { name: suite::GUESTS, tests: debian::LONG_TESTS });
        suites.push(Suite { name: suite::GUESTS, tests: cpus::LONG_TESTS });
        suites.push(Suite { name: suite::GUESTS, tests: clocks::LONG_TESTS });
        suites.push(Suite { name: suite::GUESTS, tests: travel::LONG_TESTS });
        suites.push(Suite { name: suite::GUESTS, tests: versions::LONG_TESTS });
        suites.push(Suite { name: suite::GUESTS, tests: rehearsal::LONG_TESTS });
    }
    // `make soak` asks for it.
    if env::var_os("PERENNIAL_SOAK").is_some() {
        suites.push(Suite { name: "soak", tests: repeat::LONG_TESTS });
    }
    // `make machine-faults` asks for it.
    if env::var_os(faults::WANTED).is_some() {
        suites.push(Suite { name: "faults", tests: faults::LONG_TESTS });
    }
    // It takes minutes for each number of VMs.
    if env::var_os("PERENNIAL_MANY").is_some() {
        suites.push(Suite { name: "many", tests: many::LONG_TESTS });
    }
    suite::run(&suites, all)
}
