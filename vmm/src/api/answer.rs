//! The answers to commands, as values. An answer becomes JSON when its line is written, no earlier.

use serde::Serialize;

use super::report::Report;
use super::{Line, Status};
use crate::live_update::preflight::Finding;
use crate::live_update::{Outcome, Step};
use crate::machine::VmName;

/// What a command that succeeded has to say. `docs/api.md` lists the fields by command.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// The command was carried out; no field.
    Done {},
    /// Of `status`.
    Status(Box<Status>),
    /// Of `report`.
    Report(Box<Report>),
    /// Of `dump` without a path.
    Document {
        /// The state document, in hexadecimal.
        document: String,
    },
    /// Of `memory`.
    Memory {
        /// The bytes, in hexadecimal.
        memory: String,
    },
    /// Of `resize-disk`.
    Resized {
        /// Size of the disk in bytes, as the guest was told.
        bytes: u64,
    },
    /// Of `preflight` and `rehearse`.
    Findings {
        /// Whether an update would be refused.
        refused: bool,
        /// All findings, in their order.
        findings: Vec<Finding>,
    },
    /// Of `stop`, when the VM has ended.
    Ended {
        /// How.
        ended: Ended,
    },
    /// Of `recover`, unless it hands over, and of a `restore` that finds nothing to restore.
    Recovered {
        /// The VMs that run again.
        recovered: Vec<VmName>,
        /// The VMs that boot from their disks, because no live update entered this kernel and so nothing was left of them.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        boots: Vec<VmName>,
    },
    /// Of `update` under systemd, before systemd has done anything.
    LeftToSystemd {
        /// The guests run.
        outcome: Outcome,
        /// A sentence about the kexec.
        kexec: &'static str,
    },
    /// Of `update` or `handover` with `stop_before`, after everything was undone.
    Stopped {
        /// The guests run.
        outcome: Outcome,
        /// The step that was not performed.
        stopped_before: Step,
    },
}

/// How a VM ended that was to be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// Its guest shut down.
    ByGuest,
    /// The plug was pulled, or there was no guest that could shut down.
    Pulled,
    /// Its process failed.
    Failed,
    /// It had ended before, or had failed, and was not about to boot.
    WasStopped,
}

impl Line {
    /// The reply to request `id` with `answer`.
    pub fn ok(id: u64, answer: &Answer) -> Self {
        match serde_json::to_value(answer) {
            Ok(ok) => Self::Ok { id, ok },
            Err(error) => {
                let error = vec!["the answer cannot be written as JSON".into(), error.to_string()];
                Self::Error { id, error, outcome: None }
            }
        }
    }

    /// The line as text, without the line feed at its end.
    pub fn text(&self) -> String {
        // Its types have no map whose keys are not strings, the one thing that JSON cannot write.
        serde_json::to_string(self).expect("a line is JSON")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn each_answer_has_the_fields_of_its_command_only() {
        let outcome = Outcome::Running;
        for (answer, json) in [
            (Answer::Done {}, "{}"),
            (Answer::Document { document: "d00d".into() }, r#"{"document":"d00d"}"#),
            (Answer::Ended { ended: Ended::ByGuest }, r#"{"ended":"by-guest"}"#),
            (Answer::Ended { ended: Ended::WasStopped }, r#"{"ended":"was-stopped"}"#),
            (Answer::Memory { memory: "00ff".into() }, r#"{"memory":"00ff"}"#),
            (Answer::Resized { bytes: 512 }, r#"{"bytes":512}"#),
            (Answer::Recovered { recovered: Vec::new(), boots: Vec::new() }, r#"{"recovered":[]}"#),
            (
                Answer::Recovered {
                    recovered: Vec::new(),
                    boots: vec![VmName::new("db").unwrap()],
                },
                r#"{"recovered":[],"boots":["db"]}"#,
            ),
            (
                Answer::Findings { refused: false, findings: Vec::new() },
                r#"{"refused":false,"findings":[]}"#,
            ),
            (
                Answer::LeftToSystemd { outcome, kexec: "asked of systemd" },
                r#"{"outcome":"running","kexec":"asked of systemd"}"#,
            ),
            (
                Answer::Stopped { outcome, stopped_before: Step::PreserveRam },
                r#"{"outcome":"running","stopped_before":"preserve-ram"}"#,
            ),
        ] {
            let ok = serde_json::from_str::<Value>(json).unwrap();
            assert_eq!(Line::ok(7, &answer), Line::Ok { id: 7, ok });
        }
    }
}
