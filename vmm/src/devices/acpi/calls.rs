//! The system calls of the ACPI hardware.

use crate::confine::Call;
use crate::devices::kind::DeviceCalls;
use crate::kvm::calls::{CLOCK, LINE};

/// The PM timer and its alarm, the SCI.
const TIMER: &[Call] = &[CLOCK, LINE, Call::any(libc::SYS_timerfd_settime)];

pub(super) const CALLS: DeviceCalls = DeviceCalls {
    build: &[Call::any(libc::SYS_timerfd_create)],
    thread: &[TIMER],
    registers: TIMER,
};
