//! Events: lines that the host sends to clients without a request.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Line, Status};
use crate::live_update::{Outcome, Step};
use crate::machine::VmName;

/// An event. `ready` and `jumping` are sent on the control port, and `jumping` also to the client that asked for
/// the jump; all of them to the clients of `events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The host has started. After a live update or a handover, its VMs have been resumed.
    Ready {
        /// The host's status.
        status: Value,
    },
    /// The jump follows: this is the last line of this host.
    Jumping,
    /// The state of a VM has changed. A client that begins to watch is sent one for each VM.
    Vm {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// The VM.
        vm: VmName,
        /// Its state, as in `status`.
        state: String,
        /// The process ID of its process. If this has changed and the state has not, the guest was reset.
        pid: Option<i32>,
        /// The chain of causes, outermost first, if the VM is failed, preserved or withheld.
        error: Option<Vec<String>>,
    },
    /// A step of a live update or a handover begins, or one VM has done it.
    Step {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// What is replaced.
        transaction: Transaction,
        /// The step.
        step: Step,
        /// The VM that has done the step. Without it, the step begins.
        vm: Option<VmName>,
    },
    /// A rehearsal begins or has ended.
    Rehearsal {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// Whether the update follows if nothing refuses it.
        updates: bool,
        /// Whether it refuses the update. `None`: it begins.
        refused: Option<bool>,
    },
    /// A live update or a handover did not take place.
    Undone {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// What was to be replaced.
        transaction: Transaction,
        /// The chain of causes, outermost first.
        error: Vec<String>,
        /// What became of the guests.
        outcome: Option<Outcome>,
    },
}

/// What an event of the kinds `step` and `undone` is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transaction {
    /// A live update: the kernel is replaced.
    Update,
    /// A handover: the host's program is replaced.
    Handover,
    /// systemd stops the service: its next process takes the VMs over, under this kernel or the next.
    ServiceStop,
}

impl Line {
    /// The event that the host has started.
    pub fn ready(status: &Status) -> Self {
        Self::Event(Event::Ready { status: serde_json::to_value(status).unwrap_or(Value::Null) })
    }

    /// The event that the jump follows.
    pub fn jumping() -> Self {
        Self::Event(Event::Jumping)
    }
}

/// Returns the time of an event that happens now.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object_that_names_itself() {
        let step = |vm: Option<&str>| Event::Step {
            time_ms: 7,
            transaction: Transaction::ServiceStop,
            step: Step::PreserveRam,
            vm: vm.map(|name| VmName::new(name).unwrap()),
        };
        for (event, json) in [
            (Event::Jumping, r#"{"event":"jumping"}"#),
            (
                step(None),
                r#"{"event":"step","time_ms":7,"transaction":"service-stop","step":"preserve-ram","vm":null}"#,
            ),
            (
                step(Some("web")),
                r#"{"event":"step","time_ms":7,"transaction":"service-stop","step":"preserve-ram","vm":"web"}"#,
            ),
        ] {
            let line = Line::Event(event);
            assert_eq!(line.text(), json);
            assert_eq!(serde_json::from_str::<Line>(json).unwrap(), line);
        }
    }
}
