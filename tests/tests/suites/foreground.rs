//! A person at a terminal: `perennial run` and `perennial console`.

use perennial_tests::foreground;
use perennial_tests::suite::{Test, kernel, pool};

pub(crate) const TESTS: &[Test] = &[
    kernel("a_guest_has_the_terminal_and_gives_it_back", foreground::run),
    kernel(CONSOLES, foreground::consoles),
];

/// Tests that take longer: `make test-guests`.
pub(crate) const LONG_TESTS: &[Test] = &[pool(CONSOLES, foreground::consoles)];

const CONSOLES: &str = "consoles_are_attached_to_again_over_updates";
