//! Errors and panics as texts to show to a user.

use std::any::Any;

/// Returns the texts of an error and of all its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect()
}

/// Most characters of a panic's message that are told.
const MOST: usize = 1000;

/// Returns the message of a panic, on one line. `panic` is what `catch_unwind` caught.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let line = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    line.chars().take(MOST).collect()
}
