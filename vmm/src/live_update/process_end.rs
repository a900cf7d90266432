//! The end of this process at a stop by systemd, which starts no other host before it has taken place.
//!
//! systemd waits for the end of every thread of this process, and for the end of every process of its service. A thread or a
//! process that is stuck in the kernel, on a server that is gone for example, does not end for any signal. All guests that
//! are in the fd store would stand still until then, so the host looks for such work before it pauses a guest.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::{confine, work};

/// Waits until nothing keeps this process, or another one of its service, from ending, for `within` at most. Returns what
/// does so then. Each continues the words "this host is still".
pub fn unended(within: Duration) -> Vec<String> {
    let mut unended = work::unended(within);
    unended.extend(confine::unended());
    unended
}

/// Ends this process and drops nothing, because dropping sessions would abandon them. `lock` is the machine's lock on
/// hosts: a thread that is stuck in the kernel would keep it, and the next host could not start.
pub(super) fn end(lock: Option<BorrowedFd<'_>>) -> ! {
    if let Some(Err(errno)) = lock.map(|lock| flock(lock, FlockOperation::Unlock)) {
        tracing::warn!("the lock of this host cannot be released before its end: {errno}");
    }
    std::process::exit(0)
}
