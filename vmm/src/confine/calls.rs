//! Lists of allowed system calls, and the lists that more than one kind of thread needs. The reason for each
//! call stands beside it.

use std::ffi::c_long;

/// A system call that a thread may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number: `libc::SYS_*`.
    pub number: c_long,
    /// The arguments that are allowed.
    pub args: Args,
}

/// What is allowed as arguments of a system call. Only the low 32 bits of an argument count, as in the
/// kernel's own reading of these arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Args {
    /// Any arguments.
    Any,
    /// The argument with this index is one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument with this index has these values in the bits of the mask: index, mask, value.
    Masked(u8, u32, u32),
    /// The argument with this index is the ID of the calling process.
    OwnProcess(u8),
}

impl Call {
    /// A system call with any arguments.
    pub const fn any(number: c_long) -> Self {
        Self { number, args: Args::Any }
    }

    /// A system call whose argument `index` is one of `values`.
    pub const fn one_of(number: c_long, index: u8, values: &'static [u32]) -> Self {
        Self { number, args: Args::OneOf(index, values) }
    }

    /// A system call in whose argument `index` the bits of `mask` are 0.
    pub const fn without(number: c_long, index: u8, mask: u32) -> Self {
        Self { number, args: Args::Masked(index, mask, 0) }
    }

    /// ioctl(2) with one of these requests.
    pub const fn ioctl(requests: &'static [u32]) -> Self {
        Self::one_of(libc::SYS_ioctl, 1, requests)
    }
}

/// The signal that interrupts a vCPU's thread: the first that glibc leaves to programs, `SIGRTMIN`.
pub const KICK: u32 = 34;

const EXEC: u32 = libc::PROT_EXEC as u32;

/// What every thread may do: compute, use memory that is not executable, read and write the files that it
/// has, wait, log, and end itself or the process.
pub const EVERY_THREAD: &[Call] = &[
    // Doorbells, interrupts, the log, consoles.
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_readv),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_close),
    // A debug build checks before it closes a file that the file is open.
    Call::one_of(libc::SYS_fcntl, 1, &[libc::F_GETFD as u32]),
    // Events to the host, from any thread.
    Call::any(libc::SYS_sendmsg),
    // Locks, channels, joins.
    Call::any(libc::SYS_futex),
    Call::any(libc::SYS_sched_yield),
    // Waiting: the event loop of a device, a sink that has room, `park`.
    Call::any(libc::SYS_poll),
    Call::any(libc::SYS_ppoll),
    Call::any(libc::SYS_epoll_wait),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_pwait2),
    Call::any(libc::SYS_nanosleep),
    Call::any(libc::SYS_clock_nanosleep),
    // The kernel's own continuation of a wait that a signal interrupted.
    Call::any(libc::SYS_restart_syscall),
    // The clock of a host whose vDSO has none.
    Call::any(libc::SYS_clock_gettime),
    Call::any(libc::SYS_clock_getres),
    Call::any(libc::SYS_gettimeofday),
    Call::any(libc::SYS_time),
    // malloc and free.
    Call::any(libc::SYS_brk),
    Call::without(libc::SYS_mmap, 2, EXEC),
    Call::without(libc::SYS_mprotect, 2, EXEC),
    Call::any(libc::SYS_munmap),
    Call::any(libc::SYS_mremap),
    Call::any(libc::SYS_madvise),
    // Keys of hash maps.
    Call::any(libc::SYS_getrandom),
    // Signals: the return from a handler, the mask around a fork or an abort.
    Call::any(libc::SYS_rt_sigreturn),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_sigaltstack),
    // abort(3) and the handler of a stack overflow set these back to their default; vCPUs are interrupted
    // with `KICK`; glibc handles the two before it when the first thread starts. SIGSYS is not among them:
    // its handler reports what the filter forbids.
    Call::one_of(
        libc::SYS_rt_sigaction,
        0,
        &[libc::SIGABRT as u32, libc::SIGSEGV as u32, libc::SIGBUS as u32, 32, 33, KICK],
    ),
    // abort(3), and interrupting a vCPU. No other process.
    Call { number: libc::SYS_tgkill, args: Args::OwnProcess(0) },
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_gettid),
    // The thread's name: its own at the start, and in the report of a forbidden call. The filter of a
    // thread needs PR_SET_NO_NEW_PRIVS.
    Call::one_of(
        libc::SYS_prctl,
        0,
        &[
            libc::PR_SET_NAME as u32,
            libc::PR_GET_NAME as u32,
            libc::PR_SET_NO_NEW_PRIVS as u32,
            // Names of anonymous mappings, by newer versions of glibc. Harmless.
            0x5356_4d41,
        ],
    ),
    // One filter more, which can only forbid more.
    Call::one_of(libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER]),
    // The start of a thread, and its stack's address.
    Call::any(libc::SYS_set_robust_list),
    Call::any(libc::SYS_rseq),
    Call::any(libc::SYS_sched_getaffinity),
    Call::any(libc::SYS_getcpu),
    // The ends of the thread and of the process.
    Call::any(libc::SYS_exit),
    Call::any(libc::SYS_exit_group),
];

/// The flags of clone(2) that make a thread.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD) as u32;
/// The flags of clone(2) that make namespaces, as a mask.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Starting threads, but no processes. glibc tries clone3(2) first, whose flags a filter cannot read; every
/// filter answers ENOSYS to that, and glibc then uses clone(2).
pub const START_THREADS: &[Call] = &[
    Call::any(libc::SYS_clone3),
    Call { number: libc::SYS_clone, args: Args::Masked(0, THREAD | NAMESPACES, THREAD) },
    // Waits until a thread's filter is there.
    Call::any(libc::SYS_membarrier),
];

/// The event loop of a device: its epoll instance, and the eventfd by which it is woken.
pub const EVENT_LOOP: &[Call] = &[
    Call::any(libc::SYS_epoll_create1),
    Call::any(libc::SYS_epoll_ctl),
    Call::any(libc::SYS_eventfd2),
    // Timers that the loop waits for.
    Call::any(libc::SYS_timerfd_create),
    Call::any(libc::SYS_timerfd_settime),
    Call::any(libc::SYS_timerfd_gettime),
];
