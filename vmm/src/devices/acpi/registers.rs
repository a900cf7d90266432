//! The PM1 registers and the PM timer as the guest accesses them: 16 ports.
//!
//! | offset | bytes | register (ACPI 6.5, 4.8.3) |
//! |--:|--:|---|
//! | 0 | 2 | PM1 status: a bit is cleared by writing a 1 to it |
//! | 2 | 2 | PM1 enable: which status bits raise the SCI |
//! | 4 | 2 | PM1 control: power-off |
//! | 8 | 4 | PM timer, read-only |

use std::sync::Arc;

use super::timer::{self, PmTimer};
use crate::arch::x86_64::layout::{PM_LEN, SLEEP_TYPE_S5};
use crate::kvm::clock::GuestClock;

/// Status and enable: the highest bit of the PM timer has changed.
pub(super) const TIMER: u16 = 1 << 0;
/// Enable only: the guest's ACPI code sets it for the firmware's lock, which is never contended.
const GLOBAL_LOCK: u16 = 1 << 5;
/// Status and enable: the power button was pressed.
pub(super) const POWER_BUTTON: u16 = 1 << 8;
/// Enable only: the guest's driver of the RTC sets it, and complains if it does not stay. The RTC raises an
/// interrupt of its own instead.
const RTC: u16 = 1 << 10;
/// The status bits that can be set.
pub(super) const STATUS: u16 = TIMER | POWER_BUTTON;
/// The enable bits that a guest can set.
pub(super) const ENABLE: u16 = TIMER | GLOBAL_LOCK | POWER_BUTTON | RTC;
/// Control: events raise the SCI and not an SMI. Always set, because there is no legacy mode.
const SCI_ENABLE: u16 = 1 << 0;
/// Control: the bits that keep what the guest writes: bus master reload and the sleep type.
pub(super) const CONTROL: u16 = 1 << 1 | SLEEP_TYPE;
const SLEEP_TYPE: u16 = 0b111 << 10;
/// Control: enter the sleep type. Reads as 0.
const SLEEP_ENABLE: u16 = 1 << 13;

/// The registers.
pub(super) struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    timer: PmTimer,
    /// [`timer::halves`] when `status` last learned of the timer.
    halves: u64,
}

/// What the registers hold, without the clock: PM1 status, enable and control, and the timer's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, without the bit that is always set.
    pub control: u16,
    /// The PM timer's value, of which the guest sees the low 24 bits.
    pub timer: u64,
}

impl Contents {
    /// The registers after reset.
    pub(super) const RESET: Self = Self { status: 0, enable: 0, control: 0, timer: 0 };
}

impl Registers {
    /// Creates registers whose timer is paused.
    pub(super) fn new(contents: Contents, clock: Arc<dyn GuestClock>) -> Self {
        let Contents { status, enable, control, timer } = contents;
        let halves = timer::halves(timer);
        Self { status, enable, control, timer: PmTimer::new(clock, timer), halves }
    }

    /// Returns what the registers hold. The timer is paused.
    pub(super) fn contents(&self) -> Contents {
        let Self { status, enable, control, timer, halves: _ } = self;
        Contents { status: *status, enable: *enable, control: *control, timer: timer.newest() }
    }

    /// Reads the clock, and sets the timer's status bit if its highest bit has changed.
    pub(super) fn tick(&mut self) -> u64 {
        let value = self.timer.now();
        if timer::halves(value) != self.halves {
            self.halves = timer::halves(value);
            self.status |= TIMER;
        }
        value
    }

    /// Lets the timer go on after a pause. The last call of [`tick`](Self::tick) was at the pause.
    pub(super) fn resume(&mut self) {
        self.timer.resume();
    }

    /// Presses the power button.
    pub(super) fn press(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// Whether the SCI is raised.
    pub(super) fn raises_sci(&self) -> bool {
        self.status & self.enable != 0
    }

    /// Whether the timer can raise the SCI.
    pub(super) fn watches_timer(&self) -> bool {
        self.enable & TIMER != 0
    }

    /// Reads the ports from `offset` on.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let timer = timer::register(self.tick()).to_le_bytes();
        let mut image = [0; PM_LEN as usize];
        image[0..2].copy_from_slice(&self.status.to_le_bytes());
        image[2..4].copy_from_slice(&self.enable.to_le_bytes());
        image[4..6].copy_from_slice(&(self.control | SCI_ENABLE).to_le_bytes());
        image[8..12].copy_from_slice(&timer);
        // The bus passes on only accesses within the ports.
        for (byte, value) in data.iter_mut().zip(image.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    /// Writes the ports from `offset` on. Returns whether the guest powers its machine off.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        self.tick();
        let mut off = false;
        for (port, byte) in (offset..).zip(data) {
            // A byte of a register is the upper one at an odd port.
            let shift = port % 2 * 8;
            let (value, mask) = (u16::from(*byte) << shift, 0xff << shift);
            match port / 2 {
                0 => self.status &= !value,
                1 => self.enable = self.enable & !mask | value & ENABLE,
                2 => {
                    self.control = self.control & !mask | value & CONTROL;
                    let sleep = (self.control & SLEEP_TYPE) >> 10;
                    off |= value & SLEEP_ENABLE != 0 && sleep == u16::from(SLEEP_TYPE_S5);
                }
                _ => {}
            }
        }
        off
    }

    /// Returns the nanoseconds until the timer's status bit is set next.
    pub(super) fn until_timer_ns(&mut self) -> u64 {
        timer::until_next_half_ns(self.tick())
    }
}
