//! The system calls of the serial port.

use crate::confine::Call;
use crate::devices::kind::DeviceCalls;

pub(super) const CALLS: DeviceCalls = DeviceCalls {
    // Whether the sink blocks and can be read.
    build: &[Call::one_of(libc::SYS_fcntl, 1, &[libc::F_GETFL as u32])],
    thread: &[&[
        // A sink that is a socket which the host listens on: a client comes, reads and writes, and goes.
        Call::any(libc::SYS_accept4),
        Call::any(libc::SYS_recvfrom),
        // The next log file, from the host.
        Call::any(libc::SYS_recvmsg),
        Call::any(libc::SYS_sendto),
        Call::any(libc::SYS_shutdown),
        Call::one_of(
            libc::SYS_fcntl,
            1,
            &[libc::F_GETFL as u32, libc::F_SETFL as u32, libc::F_DUPFD_CLOEXEC as u32],
        ),
        // A sink that is a terminal: its size, and whether it is one. Not TIOCSTI, which would type into the
        // shell of an operator.
        Call::ioctl(&[libc::TCGETS as u32, libc::TIOCGWINSZ as u32, libc::FIONREAD as u32]),
    ]],
    registers: &[],
};
