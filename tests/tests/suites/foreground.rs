//! A person at a terminal: `perennial run` and `perennial console`.

use perennial_tests::foreground;
use perennial_tests::suite::{Test, kernel, seldom_on_pool};

pub(crate) const TESTS: &[Test] = &[
    kernel("a_guest_has_the_terminal_and_gives_it_back", foreground::run),
    seldom_on_pool("consoles_are_attached_to_again_over_updates", foreground::consoles),
];
