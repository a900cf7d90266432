//! Limits on the bytes and the operations of a device, in the option words of Cloud Hypervisor: token buckets.
//!
//! A bucket of `size` tokens fills evenly within `refill_time` milliseconds. An operation takes its tokens when
//! it begins, and it begins as soon as the bucket has one token. If the operation takes more than there are, the
//! level becomes negative, and the next operation waits longer. So the average rate is exact, and no operation is
//! too large to ever begin.
//!
//! The fill levels are not part of the saved state: after a live update each bucket is full.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::options::{Options, parse_size};
use crate::state::{Node, Reader, StateError};

/// The option keys of the limits.
pub const KEYS: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];
/// The properties of the limits in a state document. Bandwidth is counted in bytes.
const PROPERTIES: [&str; 2] = ["bandwidth-limit", "operations-limit"];

/// The limits of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RateLimits {
    /// Limits bytes (`bw_`).
    pub bandwidth: Option<RateLimit>,
    /// Limits operations (`ops_`).
    pub operations: Option<RateLimit>,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RateLimit {
    /// Tokens of a full bucket. Not 0.
    pub size: u64,
    /// Tokens that the device may use once, before those of the bucket.
    pub one_time_burst: u64,
    /// Time in which an empty bucket becomes full, in milliseconds. Not 0.
    pub refill_ms: u64,
}

impl RateLimits {
    /// Reads the limits from a device's options. Errors if a limit is incomplete.
    pub fn parse(options: &Options<'_>) -> Result<Self, String> {
        let [bw_size, bw_burst, bw_time, ops_size, ops_burst, ops_time] = KEYS;
        Ok(Self {
            bandwidth: RateLimit::parse(options, [bw_size, bw_burst, bw_time])?,
            operations: RateLimit::parse(options, [ops_size, ops_burst, ops_time])?,
        })
    }

    /// Writes the limits into the node of a device's options.
    pub fn encode(&self, node: &mut Node) {
        let Self { bandwidth, operations } = self;
        for (property, limit) in PROPERTIES.iter().zip([bandwidth, operations]) {
            if let Some(RateLimit { size, one_time_burst, refill_ms }) = limit {
                node.put_u64s(property, &[*size, *one_time_burst, *refill_ms]);
            }
        }
    }

    /// Reads the limits from the node of a device's options.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let mut limit = |property| match reader.has(property) {
            false => Ok(None),
            true => match *reader.u64s(property)? {
                [size, one_time_burst, refill_ms] if size > 0 && refill_ms > 0 => {
                    Ok(Some(RateLimit { size, one_time_burst, refill_ms }))
                }
                _ => {
                    let problem = "it must be size, one-time burst and refill time; the size and the \
                                   time must not be 0";
                    Err(reader.invalid(property, problem))
                }
            },
        };
        Ok(Self { bandwidth: limit(PROPERTIES[0])?, operations: limit(PROPERTIES[1])? })
    }
}

impl RateLimit {
    fn parse(options: &Options<'_>, keys: [&str; 3]) -> Result<Option<Self>, String> {
        let [size, burst, time] = keys;
        let number = |key: &str| {
            let text = options.get(key);
            text.map(|text| parse_size(text).map_err(|error| format!("{key}: {error}"))).transpose()
        };
        let milliseconds = |key: &str| {
            let parse = |text: &str| {
                let number = text.parse::<u64>();
                number.map_err(|_| format!("{key}: it is a number of milliseconds, not `{text}`"))
            };
            options.get(key).map(parse).transpose()
        };
        match (number(size)?, number(burst)?, milliseconds(time)?) {
            (None, None, None) => Ok(None),
            (Some(size @ 1..), burst, Some(refill_ms @ 1..)) => {
                Ok(Some(Self { size, one_time_burst: burst.unwrap_or(0), refill_ms }))
            }
            _ => Err(format!("{size} and {time} must both be given, and neither may be 0")),
        }
    }
}

/// The buckets of one device.
#[derive(Debug)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// Full buckets for `limits`. `now` is the time of their last filling.
    pub fn new(limits: &RateLimits, now: Instant) -> Self {
        let RateLimits { bandwidth, operations } = limits;
        let bucket = |limit: &Option<RateLimit>| limit.map(|limit| Bucket::new(limit, now));
        Self { bandwidth: bucket(bandwidth), operations: bucket(operations) }
    }

    /// Returns whether anything is limited.
    pub fn limits_anything(&self) -> bool {
        self.bandwidth.is_some() || self.operations.is_some()
    }

    /// Returns how long the next operation has to wait. Zero: it may begin now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let buckets = [&mut self.bandwidth, &mut self.operations];
        let waits = buckets.into_iter().flatten().map(|bucket| bucket.wait(now));
        waits.max().unwrap_or_default()
    }

    /// Takes the tokens of one operation of `bytes` bytes.
    pub fn take(&mut self, bytes: u64) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens as f64);
            }
        }
    }
}

/// One bucket. Its numbers are fractions of tokens, because few nanoseconds fill less than one.
#[derive(Debug)]
struct Bucket {
    size: f64,
    /// Tokens per second.
    rate: f64,
    /// Tokens that are left of the one-time burst.
    burst: f64,
    /// Tokens in the bucket; negative if it owes tokens.
    level: f64,
    filled: Instant,
}

impl Bucket {
    fn new(limit: RateLimit, now: Instant) -> Self {
        let RateLimit { size, one_time_burst, refill_ms } = limit;
        let (size, burst) = (size as f64, one_time_burst as f64);
        Self { size, rate: size / (refill_ms as f64 / 1000.0), burst, level: size, filled: now }
    }

    fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.level = (self.level + passed * self.rate).min(self.size);
        let missing = 1.0 - self.burst - self.level;
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(missing / self.rate).unwrap_or(Duration::MAX)
    }

    fn take(&mut self, tokens: f64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level -= tokens - from_burst;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn parse(text: &str) -> Result<RateLimits, String> {
        RateLimits::parse(&Options::parse(text, &KEYS)?)
    }

    /// Runs operations of `bytes` for `time`, and returns how many begin.
    fn operations(limiter: &mut RateLimiter, start: Instant, time: Duration, bytes: u64) -> u32 {
        let (mut now, mut count) = (start, 0);
        loop {
            now += limiter.wait(now);
            if now >= start + time {
                return count;
            }
            limiter.take(bytes);
            count += 1;
        }
    }

    #[test]
    fn a_limit_needs_its_size_and_its_time() {
        let limit = RateLimit { size: 1 << 20, one_time_burst: 0, refill_ms: 100 };
        let bandwidth = RateLimits { bandwidth: Some(limit), operations: None };
        assert_eq!(parse("bw_size=1M,bw_refill_time=100"), Ok(bandwidth));
        let limit = RateLimit { size: 5, one_time_burst: 7, refill_ms: 9 };
        let operations = RateLimits { bandwidth: None, operations: Some(limit) };
        assert_eq!(parse("ops_size=5,ops_one_time_burst=7,ops_refill_time=9"), Ok(operations));
        for wrong in
            ["bw_size=1", "bw_refill_time=1", "bw_one_time_burst=5", "ops_size=0,ops_refill_time=1"]
        {
            assert!(parse(wrong).unwrap_err().contains("must both be given"), "{wrong}");
        }
        assert!(parse("ops_size=x,ops_refill_time=1").unwrap_err().starts_with("ops_size: `x`"));
    }

    #[test]
    fn over_time_the_rate_is_exact_whatever_the_sizes_of_the_operations() {
        let limits = parse("bw_size=1M,bw_refill_time=100").unwrap();
        for (bytes, count) in [(4096, 25_600 + 256), (1 << 20, 100 + 1), (32 << 20, 4)] {
            let now = Instant::now();
            let mut limiter = RateLimiter::new(&limits, now);
            let begun = operations(&mut limiter, now, 10 * SECOND, bytes);
            assert!(begun.abs_diff(count) <= 1, "{begun} of {bytes} bytes instead of {count}");
        }
    }

    #[test]
    fn a_one_time_burst_comes_on_top_and_once() {
        let now = Instant::now();
        let limits = parse("ops_size=10,ops_refill_time=1000,ops_one_time_burst=100").unwrap();
        let mut limiter = RateLimiter::new(&limits, now);
        assert_eq!(operations(&mut limiter, now, SECOND, 4096), 119);
        assert_eq!(operations(&mut limiter, now + SECOND, SECOND, 4096), 10);
    }

    #[test]
    fn what_is_not_limited_never_waits() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(&RateLimits::default(), now);
        assert!(!limiter.limits_anything());
        limiter.take(u64::MAX);
        assert_eq!(limiter.wait(now), Duration::ZERO);
    }

    #[test]
    fn the_largest_numbers_neither_overflow_nor_panic() {
        let now = Instant::now();
        let most = RateLimit { size: u64::MAX, one_time_burst: u64::MAX, refill_ms: u64::MAX };
        let least = RateLimit { size: 1, one_time_burst: 0, refill_ms: u64::MAX };
        let limits = RateLimits { bandwidth: Some(least), operations: Some(most) };
        let mut limiter = RateLimiter::new(&limits, now);
        limiter.take(u64::MAX);
        assert!(limiter.wait(now) > SECOND);
        assert!(limiter.wait(now + 100 * SECOND) > SECOND);
    }
}
