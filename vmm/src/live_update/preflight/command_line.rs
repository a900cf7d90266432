//! The next kernel's command line: whether the kernel reads it as the operator meant it, and what the host adds.

use kexec::CommandLineError;

use super::{Check, Finding};
use crate::live_update::next_kernel::Candidate;

/// Checks the command line by itself; whether it suits the kernels is the matter of other checks.
pub(super) fn check(candidate: &Candidate) -> Vec<Finding> {
    let error = match &candidate.command_line {
        Ok(line) => {
            let own: Vec<_> = kexec::parameters(&candidate.next.cmdline).collect();
            let all: Vec<_> = kexec::parameters(line.as_str()).collect();
            let added = all.iter().filter(|parameter| !own.contains(parameter));
            let added: Vec<String> = added
                .map(|parameter| match parameter.value {
                    // A ticket or a mark is another one each time.
                    Some(_) if parameter.name.starts_with("perennial.") => {
                        format!("{}=...", parameter.name)
                    }
                    Some(value) => format!("{}={value}", parameter.name),
                    None => parameter.name.to_owned(),
                })
                .collect();
            if added.is_empty() {
                return Vec::new();
            }
            let sentence = format!("the host adds `{}`", added.join(" "));
            return vec![Finding::new(Check::CommandLineAdded, "", sentence, "")];
        }
        Err(error) => error,
    };
    let check = match error {
        CommandLineError::SwitchedOff { .. } => Check::CommandLineSwitch,
        CommandLineError::TooLong { .. } => Check::CommandLineLength,
        _ => Check::CommandLine,
    };
    vec![Finding::of_error(check, error)]
}
