//! The registers of an MC146818 real-time clock with 128 bytes of CMOS memory, and its three interrupts.
//!
//! The clock counts by itself, so nothing here runs: each access first looks at what has happened since the
//! last one ([`Registers::tick`]).

use super::date::Date;

/// Bytes of CMOS memory, the registers included.
pub(super) const CMOS: usize = 128;
pub(super) const SECONDS: usize = 0;
pub(super) const SECONDS_ALARM: usize = 1;
pub(super) const MINUTES: usize = 2;
pub(super) const MINUTES_ALARM: usize = 3;
pub(super) const HOURS: usize = 4;
pub(super) const HOURS_ALARM: usize = 5;
pub(super) const WEEKDAY: usize = 6;
pub(super) const DAY: usize = 7;
pub(super) const MONTH: usize = 8;
pub(super) const YEAR: usize = 9;
pub(super) const A: usize = 10;
pub(super) const B: usize = 11;
pub(super) const C: usize = 12;
pub(super) const D: usize = 13;
/// Where PCs have the century, which the FADT tells.
pub(super) const CENTURY: usize = crate::arch::x86_64::layout::RTC_CENTURY as usize;

/// A: the registers of time are about to change.
pub(super) const UPDATING: u8 = 1 << 7;
/// A: the divider runs, and its input has 32768 Hz.
const DIVIDER: u8 = 0b010 << 4;
/// A: the rate of the periodic interrupt.
const RATE: u8 = 0x0f;
/// B: the registers of time stand still, to be set.
pub(super) const SET: u8 = 1 << 7;
/// B: numbers are binary, not binary coded decimals.
pub(super) const BINARY: u8 = 1 << 2;
/// B: hours are 0 to 23, not 1 to 12 with the highest bit for the afternoon.
pub(super) const HOURS_24: u8 = 1 << 1;
/// B, C: the interrupts, periodic, by alarm, and each second.
pub(super) const PERIODIC: u8 = 1 << 6;
pub(super) const ALARM: u8 = 1 << 5;
pub(super) const SECOND: u8 = 1 << 4;
const INTERRUPTS: u8 = PERIODIC | ALARM | SECOND;
/// C: an enabled interrupt is pending.
const PENDING: u8 = 1 << 7;
/// D: the battery has not run out.
const VALID: u8 = 1 << 7;
/// An alarm register of at least this matches any value.
const ANY: u8 = 0xc0;
/// An hour in the afternoon, unless in 24-hour mode.
const AFTERNOON: u8 = 1 << 7;

/// A time: nanoseconds since 1970. The years 0 to 9999, which a guest can set, need more than 64 bits.
pub(super) type Ns = i128;

/// Nanoseconds before the change of a second in which `UPDATING` is set (data sheet: 244 us).
const UPDATING_NS: Ns = 244_000;
const NS_PER_S: Ns = 1_000_000_000;
/// The last second that the clock can show: the end of 9999.
const LAST_S: i64 = 253_402_300_799;
/// The first: the start of the year 0.
const FIRST_S: i64 = -62_167_219_200;

/// The registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registers {
    /// The register that port 0x71 leads to.
    pub index: u8,
    /// The CMOS memory. While the clock runs, the bytes of time have no meaning; `C` has no `PENDING`.
    pub cmos: [u8; CMOS],
}

/// What an access does besides.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// The guest has set the clock to this second since 1970.
    pub(super) set_to: Option<i64>,
}

/// Returns the second that a time is in.
fn second_of(time: Ns) -> i64 {
    // Far below 2^63: at most what 64 bits of nanoseconds and the largest offset amount to.
    time.div_euclid(NS_PER_S) as i64
}

impl Default for Registers {
    /// The registers as firmware leaves them.
    fn default() -> Self {
        let mut cmos = [0; CMOS];
        cmos[A] = DIVIDER | 6;
        cmos[B] = HOURS_24;
        Self { index: D as u8, cmos }
    }
}

impl Registers {
    /// Whether an interrupt is pending.
    pub(super) fn is_pending(&self) -> bool {
        self.cmos[C] & self.cmos[B] & INTERRUPTS != 0
    }

    fn is_set_mode(&self) -> bool {
        self.cmos[B] & SET != 0
    }

    /// Sets the flags of what happened after `last` up to `now`.
    pub(super) fn tick(&mut self, last: Ns, now: Ns) {
        if now <= last {
            return;
        }
        if let Some(period) = self.period_ns()
            && last.div_euclid(period) != now.div_euclid(period)
        {
            self.cmos[C] |= PERIODIC;
        }
        if self.is_set_mode() {
            return;
        }
        let (from, to) = (second_of(last), second_of(now));
        if from != to {
            self.cmos[C] |= SECOND;
            if self.next_alarm(from + 1).is_some_and(|alarm| alarm <= to) {
                self.cmos[C] |= ALARM;
            }
        }
    }

    /// Returns when the next enabled interrupt comes after `now`. `None` while one is pending: the guest gets
    /// no other before it has read register C.
    pub(super) fn next_interrupt(&self, now: Ns) -> Option<Ns> {
        if self.is_pending() {
            return None;
        }
        let enabled = |interrupt| self.cmos[B] & interrupt != 0;
        let periodic = self.period_ns().filter(|_| enabled(PERIODIC));
        let periodic = periodic.map(|period| (now.div_euclid(period) + 1) * period);
        let next = second_of(now) + 1;
        let runs = !self.is_set_mode();
        let second = (enabled(SECOND) && runs).then_some(Ns::from(next) * NS_PER_S);
        let alarm = self.next_alarm(next).filter(|_| enabled(ALARM) && runs);
        let alarm = alarm.map(|second| Ns::from(second) * NS_PER_S);
        [periodic, second, alarm].into_iter().flatten().min()
    }

    /// Period of the periodic interrupt, in nanoseconds: a power of 2 of the input's 32768 Hz.
    fn period_ns(&self) -> Option<Ns> {
        let shift = match self.cmos[A] & RATE {
            0 => return None,
            // The data sheet's table: these two are slow as well.
            rate @ 1..=2 => rate + 6,
            rate => rate - 1,
        };
        Some((NS_PER_S << shift) / 32768)
    }

    /// The first second from `from` on that the alarm registers match. `None` if none ever does.
    fn next_alarm(&self, from: i64) -> Option<i64> {
        let chosen = |register: usize| Some(self.cmos[register]).filter(|value| *value < ANY);
        let hour = chosen(HOURS_ALARM).map(|value| i64::from(self.hour(value)));
        let minute = chosen(MINUTES_ALARM).map(|value| i64::from(self.number(value)));
        let second = chosen(SECONDS_ALARM).map(|value| i64::from(self.number(value)));
        // So that the search is short: 24, 60 and 60 steps at most.
        if hour > Some(23) || minute > Some(59) || second > Some(59) {
            return None;
        }
        let is = |wanted: Option<i64>, value: i64| wanted.is_none_or(|wanted| wanted == value);
        let mut at = from;
        while at < from + 24 * 3600 {
            if !is(hour, at.div_euclid(3600).rem_euclid(24)) {
                at = (at.div_euclid(3600) + 1) * 3600;
            } else if !is(minute, at.div_euclid(60).rem_euclid(60)) {
                at = (at.div_euclid(60) + 1) * 60;
            } else if !is(second, at.rem_euclid(60)) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// Reads the register that `index` selects, at time `now`.
    pub(super) fn read(&mut self, now: Ns) -> u8 {
        let index = usize::from(self.index);
        match index {
            A => {
                let close = now.rem_euclid(NS_PER_S) >= NS_PER_S - UPDATING_NS;
                let updating = if close && !self.is_set_mode() { UPDATING } else { 0 };
                self.cmos[A] & !UPDATING | updating
            }
            C => {
                let flags = std::mem::take(&mut self.cmos[C]);
                let pending = flags & self.cmos[B] & INTERRUPTS != 0;
                flags | if pending { PENDING } else { 0 }
            }
            D => VALID,
            _ => {
                self.show(now);
                self.cmos[index]
            }
        }
    }

    /// Writes the register that `index` selects, at time `now`.
    pub(super) fn write(&mut self, value: u8, now: Ns) -> Effect {
        let index = usize::from(self.index);
        let mut effect = Effect::default();
        match index {
            A => self.cmos[A] = value & !UPDATING,
            B => {
                // The registers of time keep what they show now, or what the guest has written.
                self.show(now);
                if self.is_set_mode() && value & SET == 0 {
                    effect.set_to = Some(self.second_set());
                }
                self.cmos[B] = value;
            }
            C | D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                self.show(now);
                self.cmos[index] = value;
                if !self.is_set_mode() {
                    effect.set_to = Some(self.second_set());
                }
            }
            _ => self.cmos[index] = value,
        }
        effect
    }

    /// Writes the time `now` into the bytes of time, unless the guest is setting them.
    fn show(&mut self, now: Ns) {
        if self.is_set_mode() {
            return;
        }
        let date = Date::from_seconds(second_of(now).clamp(FIRST_S, LAST_S));
        // 0 to 9999.
        let (century, year) = ((date.year / 100) as u8, (date.year % 100) as u8);
        let hour = match self.cmos[B] & HOURS_24 {
            0 => {
                let afternoon = if date.hour >= 12 { AFTERNOON } else { 0 };
                self.coded((date.hour + 11) % 12 + 1) | afternoon
            }
            _ => self.coded(date.hour),
        };
        for (register, value) in [
            (SECONDS, self.coded(date.second)),
            (MINUTES, self.coded(date.minute)),
            (HOURS, hour),
            (WEEKDAY, self.coded(date.weekday)),
            (DAY, self.coded(date.day)),
            (MONTH, self.coded(date.month)),
            (YEAR, self.coded(year)),
            (CENTURY, self.coded(century)),
        ] {
            self.cmos[register] = value;
        }
    }

    /// Returns the time in the bytes of time. Those that are out of range count as the next that is in range.
    fn second_set(&self) -> i64 {
        let number = |register: usize| self.number(self.cmos[register]);
        let date = Date {
            year: i64::from(number(CENTURY).min(99)) * 100 + i64::from(number(YEAR).min(99)),
            month: number(MONTH).clamp(1, 12),
            day: number(DAY).clamp(1, 31),
            weekday: 1,
            hour: self.hour(self.cmos[HOURS]).min(23),
            minute: number(MINUTES).min(59),
            second: number(SECONDS).min(59),
        };
        date.to_seconds()
    }

    /// Returns a number below 100 as the registers show it.
    fn coded(&self, number: u8) -> u8 {
        match self.cmos[B] & BINARY {
            0 => ((number / 10) << 4) | (number % 10),
            _ => number,
        }
    }

    /// Returns the number that a register shows.
    fn number(&self, coded: u8) -> u8 {
        match self.cmos[B] & BINARY {
            // At most 15 * 10 + 15.
            0 => (coded >> 4) * 10 + (coded & 0x0f),
            _ => coded,
        }
    }

    /// Returns the hour that a register shows, 0 to 23 if the guest wrote an hour.
    fn hour(&self, coded: u8) -> u8 {
        if self.cmos[B] & HOURS_24 != 0 {
            return self.number(coded);
        }
        let half = if coded & AFTERNOON != 0 { 12 } else { 0 };
        self.number(coded & !AFTERNOON) % 12 + half
    }
}
