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

/// What a thread of the pool does: one job after the other.
pub(super) const POOL: &[Call] = &[
    Call::any(libc::SYS_preadv2),
    Call::any(libc::SYS_pwritev2),
    Call::any(libc::SYS_fsync),
    Call::any(libc::SYS_fdatasync),
    // Discards and writes zeroes.
    Call::any(libc::SYS_fallocate),
];

pub(super) const CALLS: DeviceCalls = DeviceCalls {
    build: &[
        Call::any(libc::SYS_lseek),
        Call::any(libc::SYS_fstat),
        // What O_DIRECT needs; the timer of a disk with limits.
        Call::any(libc::SYS_statx),
        Call::any(libc::SYS_timerfd_create),
        GEOMETRY,
        // The magic number of a disk's format, and the partition table of a disk to boot from.
        Call::any(libc::SYS_pread64),
        // The ring, which is then restricted to the disk's file and to four operations.
        Call::any(libc::SYS_io_uring_setup),
        Call::any(libc::SYS_io_uring_register),
    ],
    thread: &[
        &[Call::any(libc::SYS_io_uring_enter)],
        // The next request that the limits allow.
        &[Call::any(libc::SYS_timerfd_settime)],
        // Without io_uring: the threads of the pool, and the jobs that need not wait.
        START_THREADS,
        POOL,
    ],
    registers: &[
        // The size, which may have grown.
        Call::any(libc::SYS_lseek),
        GEOMETRY,
        // Sync.
        Call::any(libc::SYS_fsync),
        Call::any(libc::SYS_fdatasync),
    ],
};
