//! Standard output of the commands of an operator. Who reads it may leave before its end (`ctl status | grep -q running`),
//! which is no error. `println!` panics then.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::process;

use super::log;

/// Prints text and a line feed on standard output.
pub(super) fn line(text: impl Display) {
    print(format_args!("{text}\n"));
}

/// Prints text on standard output. Does nothing if nobody reads it any more. If it cannot be written for another reason, says
/// so and ends this process with an error.
pub(super) fn print(text: impl Display) {
    let mut output = io::stdout().lock();
    match write!(output, "{text}").and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            log::say(&format!("perennial: cannot write to standard output: {error}\n"));
            process::exit(1);
        }
        Ok(()) | Err(_) => {}
    }
}
