//! What the machine and the host know of a device that keeps its data on storage of the host: a disk.
//!
//! Storage may fail, and it may hang. The calls of [`Storage`] return all the same, so that an operator learns
//! of it from the VM's status.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// An operation that the storage has not answered for this long counts as stalled.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);

/// The storage of one device. Any thread may call it.
pub trait Storage: Send + Sync {
    /// Returns the state of the storage. Returns at once, also if the storage hangs.
    fn report(&self) -> StorageReport;

    /// Errors if operations are stalled, and names the storage: a pause or a sync would wait for them in vain.
    fn check_answers(&self) -> Result<(), StorageFailure>;

    /// Begins to make durable what the guest wrote until now. Returns at once.
    fn begin_sync(&self);

    /// Waits for the end of the last [`begin_sync`](Self::begin_sync). Errors if that failed, or if the storage has
    /// not answered at `deadline`.
    fn end_sync(&self, deadline: Instant) -> Result<(), StorageFailure>;

    /// Makes the device as large as its storage is now, and tells the guest. With `bytes` grows the storage to
    /// this size before that. Returns at once; `on_resized` is called on any thread when the storage has answered.
    fn resize(&self, bytes: Option<u64>, on_resized: OnResized);
}

/// Why an operation on the storage failed, with the name of the storage.
pub type StorageFailure = Box<dyn std::error::Error + Send + Sync>;

/// Is called with the size of the device in bytes, or with why the size stays as it is: for example because the
/// device would become smaller.
pub type OnResized = Box<dyn FnOnce(Result<u64, StorageFailure>) + Send>;

/// The state of a device's storage. All counts begin with the process of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageReport {
    /// What executes the operations.
    pub engine: Engine,
    /// Whether operations bypass the host's page cache.
    pub direct: bool,
    /// Number of queues of the device.
    pub queues: u16,
    /// Size of the device in bytes, as the guest was told.
    pub bytes: u64,
    /// Number of operations that failed.
    pub errors: u64,
    /// The last one of them.
    pub last_error: Option<StorageError>,
    /// Number of operations that the storage has not answered yet.
    pub in_flight: u32,
    /// Number of those that it has not answered for longer than [`STALLED_AFTER`].
    pub stalled: u32,
    /// For how long the storage has not answered the oldest operation, in seconds. 0 if it has answered all.
    pub waiting_s: u64,
}

/// What executes the operations of a device on its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    /// io_uring.
    #[serde(rename = "io_uring")]
    IoUring,
    /// A pool of threads.
    #[serde(rename = "threads")]
    Threads,
}

/// An operation on storage that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageError {
    /// The operation.
    pub operation: Operation,
    /// The cause.
    pub cause: Cause,
    /// Time since then, in seconds.
    pub seconds_ago: u64,
}

/// An operation on storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Reads data.
    Read,
    /// Writes data.
    Write,
    /// Writes zeroes.
    WriteZeroes,
    /// Discards data.
    Discard,
    /// Makes earlier writes durable.
    Flush,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write of zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
        })
    }
}

/// Why an operation failed. A number instead of a text, because the process of a VM sends it to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// An error number of the kernel.
    Errno(i32),
    /// The storage ends before the device does.
    End,
}

impl From<&io::Error> for Cause {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::Errno(errno),
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::End,
            None => Self::Errno(libc::EIO),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno @ (libc::ENOSPC | libc::EDQUOT)) => {
                let error = io::Error::from_raw_os_error(*errno);
                write!(f, "{error}: free space on its file system")
            }
            Self::Errno(errno) => io::Error::from_raw_os_error(*errno).fmt(f),
            Self::End => f.write_str("its storage ends there: it has become smaller"),
        }
    }
}
