//! The disks of a VM in the answer to `status`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::storage::{Engine, Operation, StorageError, StorageReport};
use crate::guests::storage::DiskReport;

/// A disk fails from an error of its storage on for as long as this, in seconds.
const FAILING_S: u64 = 60;

/// One disk in [`VmStatus`](super::VmStatus). All counts begin with the process of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The device's node in the state document.
    pub device: String,
    /// The file or block device of the host.
    pub path: PathBuf,
    /// How the storage does.
    pub state: DiskState,
    /// `io_uring` or `threads`: what executes the operations.
    pub engine: Engine,
    /// Whether operations bypass the host's page cache.
    pub direct: bool,
    /// Number of queues.
    pub queues: u16,
    /// Size in bytes, as the guest was told.
    pub bytes: u64,
    /// Number of operations that failed.
    pub errors: u64,
    /// The last one of them.
    pub last_error: Option<DiskError>,
    /// Number of operations that the storage has not answered yet.
    pub in_flight: u32,
    /// Number of those that it has not answered for more than 10 s.
    pub stalled: u32,
    /// For how long the storage has not answered the oldest operation, in seconds.
    pub waiting_s: u64,
    /// Time since the VM's process reported all this, in seconds. More than 1 if the process does not answer.
    pub age_s: u64,
}

/// How the storage of a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// No operation is stalled, and none has failed in the last minute.
    Working,
    /// An operation failed in the last minute.
    Failing,
    /// The storage has not answered an operation for more than 10 s.
    Stalled,
}

/// An operation that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskError {
    /// The operation.
    pub operation: Operation,
    /// Why it failed.
    pub error: String,
    /// Time since then, in seconds.
    pub seconds_ago: u64,
}

impl From<DiskReport> for DiskStatus {
    fn from(DiskReport { device, path, report, age }: DiskReport) -> Self {
        let StorageReport {
            engine,
            direct,
            queues,
            bytes,
            errors,
            last_error,
            in_flight,
            stalled,
            waiting_s,
        } = report;
        let state = match last_error {
            _ if stalled > 0 => DiskState::Stalled,
            Some(last) if last.seconds_ago < FAILING_S => DiskState::Failing,
            _ => DiskState::Working,
        };
        let last_error = last_error.map(|StorageError { operation, cause, seconds_ago }| {
            DiskError { operation, error: cause.to_string(), seconds_ago }
        });
        Self {
            device,
            path,
            state,
            engine,
            direct,
            queues,
            bytes,
            errors,
            last_error,
            in_flight,
            stalled,
            waiting_s,
            age_s: age.as_secs(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::storage::Cause;

    fn report() -> StorageReport {
        StorageReport {
            engine: Engine::IoUring,
            direct: true,
            queues: 4,
            bytes: 1 << 30,
            errors: 0,
            last_error: None,
            in_flight: 2,
            stalled: 0,
            waiting_s: 3,
        }
    }

    fn status(report: StorageReport) -> DiskStatus {
        let age = std::time::Duration::from_millis(1999);
        DiskReport { device: "d@1".to_owned(), path: "/a".into(), report, age }.into()
    }

    #[test]
    fn a_disk_that_works_says_what_it_is() {
        let json = serde_json::to_string(&status(report())).unwrap();
        assert_eq!(
            json,
            r#"{"device":"d@1","path":"/a","state":"working","engine":"io_uring","direct":true,"#
                .to_owned()
                + r#""queues":4,"bytes":1073741824,"errors":0,"last_error":null,"in_flight":2,"stalled":0,"waiting_s":3,"age_s":1}"#
        );
    }

    #[test]
    fn an_error_is_told_in_words_and_is_the_state_for_a_minute() {
        let failed = |errno, seconds_ago| {
            let (operation, cause) = (Operation::WriteZeroes, Cause::Errno(errno));
            let last_error = Some(StorageError { operation, cause, seconds_ago });
            status(StorageReport { errors: 7, last_error, ..report() })
        };
        let full = failed(libc::ENOSPC, 59);
        assert_eq!((full.state, full.errors), (DiskState::Failing, 7));
        let last = serde_json::to_string(&full.last_error).unwrap();
        let told = r#"{"operation":"write-zeroes","error":"No space left on device (os error 28): free space on its file system","seconds_ago":59}"#;
        assert_eq!(last, told);
        assert_eq!(failed(libc::EIO, 60).state, DiskState::Working);
        // Numbers of a VM's process that was taken over.
        assert_eq!(failed(i32::MIN, u64::MAX).state, DiskState::Working);
    }

    #[test]
    fn an_operation_without_an_answer_is_the_state_before_all_others() {
        let (operation, cause) = (Operation::Read, Cause::End);
        let last_error = Some(StorageError { operation, cause, seconds_ago: 0 });
        let stalled = StorageReport { stalled: 1, last_error, ..report() };
        assert_eq!(status(stalled).state, DiskState::Stalled);
    }
}
