//! Seconds since 1970 as year, month, day and time of day in the Gregorian calendar, and back.

const DAY_S: i64 = 24 * 3600;

/// A date and a time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Date {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 1 (Sunday) to 7.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: u8) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to the first day of `year`.
fn days_before(year: i64) -> i64 {
    let leap_days = |before: i64| {
        let last = before - 1;
        last.div_euclid(4) - last.div_euclid(100) + last.div_euclid(400)
    };
    (year - 1970) * 365 + leap_days(year) - leap_days(1970)
}

impl Date {
    /// The date `seconds` after 1970.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let (mut days, rest) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
        // 1970-01-01 was a Thursday.
        let weekday = ((days + 4).rem_euclid(7) + 1) as u8;
        // A few years too late at most, or too early before 1970.
        let mut year = 1970 + days.div_euclid(365);
        while days_before(year) > days {
            year -= 1;
        }
        while days_before(year + 1) <= days {
            year += 1;
        }
        days -= days_before(year);
        let mut month = 1;
        while days >= days_in(year, month) {
            days -= days_in(year, month);
            month += 1;
        }
        let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
        Self {
            year,
            month,
            day: days as u8 + 1,
            weekday,
            hour: hour as u8,
            minute: minute as u8,
            second: second as u8,
        }
    }

    /// Seconds from 1970 to the date. A day, an hour, a minute or a second that is too large counts on into
    /// the next month, day, hour or minute. The weekday has no influence.
    pub(super) fn to_seconds(self) -> i64 {
        let Self { year, month, day, weekday: _, hour, minute, second } = self;
        let months: i64 = (1..month.min(12)).map(|month| days_in(year, month)).sum();
        let days = days_before(year) + months + i64::from(day) - 1;
        days * DAY_S + i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates_are_right_in_both_directions() {
        for (seconds, [year, month, day, weekday, hour, minute, second]) in [
            (0, [1970, 1, 1, 5, 0, 0, 0]),
            (951_782_400, [2000, 2, 29, 3, 0, 0, 0]),
            (951_868_799, [2000, 2, 29, 3, 23, 59, 59]),
            (1_735_689_599, [2024, 12, 31, 3, 23, 59, 59]),
            (1_772_323_200, [2026, 3, 1, 1, 0, 0, 0]),
            (4_107_542_400, [2100, 3, 1, 2, 0, 0, 0]),
            (-1, [1969, 12, 31, 4, 23, 59, 59]),
        ] {
            let date = Date::from_seconds(seconds);
            let Date { month: m, day: d, weekday: w, hour: h, minute: n, second: s, .. } = date;
            let found = [date.year, m.into(), d.into(), w.into(), h.into(), n.into(), s.into()];
            assert_eq!(found, [year, month, day, weekday, hour, minute, second], "{seconds}");
            assert_eq!(date.to_seconds(), seconds);
        }
    }

    #[test]
    fn every_day_of_five_centuries_is_followed_by_the_next() {
        let mut before = Date::from_seconds(days_before(1900) * DAY_S - DAY_S);
        for day in days_before(1900)..days_before(2400) {
            let date = Date::from_seconds(day * DAY_S);
            assert_eq!(date.to_seconds(), day * DAY_S);
            assert_eq!(date.weekday, before.weekday % 7 + 1);
            let follows = date.day == before.day + 1 && date.month == before.month;
            assert!(follows || date.day == 1 && date.month == before.month % 12 + 1, "{date:?}");
            before = date;
        }
    }
}
