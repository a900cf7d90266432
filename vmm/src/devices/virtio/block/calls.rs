//! The system calls of a disk.

use crate::confine::Call;
use crate::confine::calls::START_THREADS;
use crate::devices::kind::DeviceCalls;

/// The size and the geometry of a disk (Linux include/uapi/linux/fs.h): no request that changes anything.
const GEOMETRY: Call = Call::ioctl(&[
    0x1260,      // BLKGETSIZE
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET: bytes of a logical block
    0x127b,      // BLKPBSZGET: bytes of a physical block
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127a,      // BLKALIGNOFF
    0x127c,      // BLKDISCARDZEROES
    0x125e,      // BLKROGET: whether it is read-only
]);

/// BLKDISCARD.
const DISCARD: u32 = 0x1277;

/// What a thread of the pool does: one job after the other.
pub(super) const POOL: &[Call] = &[
    Call::any(libc::SYS_preadv2),
    Call::any(libc::SYS_pwritev2),
    Call::any(libc::SYS_fsync),
    Call::any(libc::SYS_fdatasync),
    // Discards, and writes zeroes.
    Call::any(libc::SYS_fallocate),
    Call::ioctl(&[DISCARD]),
];

pub(super) const CALLS: DeviceCalls = DeviceCalls {
    build: &[
        Call::any(libc::SYS_lseek),
        Call::any(libc::SYS_fstat),
        // What O_DIRECT needs; the timer of a disk with limits.
        Call::any(libc::SYS_statx),
        Call::any(libc::SYS_timerfd_create),
        GEOMETRY,
        // Whether the disk can discard.
        Call::any(libc::SYS_fallocate),
        Call::ioctl(&[DISCARD]),
        // The magic number of a disk's format, and the partition table of a disk to boot from.
        Call::any(libc::SYS_pread64),
        // The ring, which is then restricted to the disk's file and to four operations.
        Call::any(libc::SYS_io_uring_setup),
        Call::any(libc::SYS_io_uring_register),
    ],
    thread: &[
        &[Call::any(libc::SYS_io_uring_enter)],
        // The next request that the limits allow; the next look for stalled operations.
        &[Call::any(libc::SYS_timerfd_settime)],
        // The size, which the operator says has grown.
        &[Call::any(libc::SYS_lseek), Call::any(libc::SYS_fstat)],
        // Without io_uring: the threads of the pool, and the jobs that need not wait.
        START_THREADS,
        POOL,
    ],
    registers: &[
        // The size, which may have grown.
        Call::any(libc::SYS_lseek),
        GEOMETRY,
    ],
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::Args;
    use crate::confine::calls::{EVENT_LOOP, EVERY_THREAD};

    /// The kernel keeps a bitmap of the system calls that a filter allows whatever their arguments are, and does
    /// not run the filter for these (Linux kernel/seccomp.c, `seccomp_is_const_allow`).
    #[test]
    fn the_calls_of_every_request_are_allowed_with_any_arguments() {
        let lists = [&[EVENT_LOOP, EVERY_THREAD], CALLS.thread].concat();
        for number in [
            libc::SYS_epoll_wait,
            libc::SYS_write,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_io_uring_enter,
        ] {
            let mut calls = lists.iter().flat_map(|list| list.iter());
            let found = calls.any(|call| call.number == number && matches!(call.args, Args::Any));
            assert!(found, "system call {number}");
        }
    }
}
