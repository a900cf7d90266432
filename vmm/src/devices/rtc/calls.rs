//! The system calls of the real-time clock.

use crate::confine::Call;
use crate::devices::kind::DeviceCalls;
use crate::kvm::calls::CLOCK;

/// The guest's clock, and the alarm of the next interrupt.
const TIMER: &[Call] = &[CLOCK, Call::any(libc::SYS_timerfd_settime)];

pub(super) const CALLS: DeviceCalls = DeviceCalls {
    build: &[Call::any(libc::SYS_timerfd_create)],
    thread: &[TIMER],
    registers: TIMER,
};
