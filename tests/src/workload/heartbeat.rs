//! The heartbeat: a line that a guest sends about ten times a second, and its decoder.
//!
//! `@perennial {"boot":"7d3f09a1c2b4e5f6","seq":12,...} 1f2e3d4c`: a marker, one JSON object, and
//! the CRC-32 of the object's text in hex. The marker distinguishes the line from the messages of the
//! guest's kernel; the checksum detects a line that lost a byte. A serial port causes one VM exit for
//! each byte, so the keys are short and the line stays below 200 bytes.

use serde::{Deserialize, Serialize};

/// The start of every heartbeat.
pub const MARKER: &str = "@perennial ";

/// The start of every note: start-up facts, a kernel warning, an answer.
pub const NOTE_MARKER: &str = "@perennial-note ";

/// The state of the workload in one guest at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heartbeat {
    /// The first 16 hex digits of the guest kernel's boot id.
    pub boot: String,
    /// Number of this line, from 1; each line has its predecessor's number plus one.
    pub seq: u64,
    /// One counter for each vCPU that is online: steps of the thread pinned to it, in thousands.
    #[serde(rename = "cpu")]
    pub counters: Vec<u64>,
    /// Times that a counter thread found changed registers.
    #[serde(rename = "ce")]
    pub cpu_errors: u64,
    /// Complete passes over the checksummed memory.
    #[serde(rename = "mem")]
    pub memory_passes: u64,
    /// Pages whose contents were not those last written.
    #[serde(rename = "me")]
    pub memory_errors: u64,
    /// Records written to the disk and acknowledged by it.
    #[serde(rename = "dsk")]
    pub disk_seq: u64,
    /// Disk requests that failed and records that read back wrong.
    #[serde(rename = "de")]
    pub disk_errors: u64,
    /// Times that the machine's entropy device returned new bytes.
    #[serde(rename = "rng")]
    pub entropy_draws: u64,
    /// CLOCK_MONOTONIC in microseconds.
    #[serde(rename = "m")]
    pub monotonic_us: u64,
    /// CLOCK_REALTIME in microseconds since the epoch.
    #[serde(rename = "r")]
    pub realtime_us: u64,
    /// Times that the guest saw one of its clocks go backward.
    #[serde(rename = "bk")]
    pub clock_backward: u64,
    /// Warnings of the guest's kernel: lockups, stalls, hung tasks, I/O errors, unstable clocks.
    #[serde(rename = "wn")]
    pub kernel_warnings: u64,
}

/// Why a line with the marker is not a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// The line ends before its checksum.
    #[error("the line has no checksum: {0:?}")]
    NoChecksum(String),
    /// The checksum does not match: bytes were lost, added or changed.
    #[error("the line's checksum is {stated}, that of its text {computed}: {line:?}")]
    Checksum {
        /// As written in the line.
        stated: String,
        /// Computed over the text that arrived.
        computed: String,
        /// The whole line.
        line: String,
    },
    /// The text is not a heartbeat of the format that this build knows.
    #[error("the line is not a heartbeat ({problem}): {line:?}")]
    Json {
        /// The parser's error.
        problem: String,
        /// The whole line.
        line: String,
    },
}

/// A line of `marker`, `payload` and the payload's checksum, with a newline.
pub fn sealed(marker: &str, payload: &str) -> String {
    format!("{marker}{payload} {:08x}\n", crc32fast::hash(payload.as_bytes()))
}

/// The payload of a line that starts with `marker`. `None` for any other line.
pub fn unseal<'a>(marker: &str, line: &'a str) -> Option<Result<&'a str, LineError>> {
    let line = line.trim_end_matches(['\r', '\n']);
    // An unfinished line of the kernel may precede the marker.
    let rest = &line[line.find(marker)? + marker.len()..];
    let Some((payload, stated)) = rest.rsplit_once(' ') else {
        return Some(Err(LineError::NoChecksum(line.to_owned())));
    };
    let computed = format!("{:08x}", crc32fast::hash(payload.as_bytes()));
    Some(if computed == stated {
        Ok(payload)
    } else {
        Err(LineError::Checksum { stated: stated.to_owned(), computed, line: line.to_owned() })
    })
}

impl Heartbeat {
    /// The line as it is sent, with its newline.
    pub fn to_line(&self) -> String {
        // A struct of strings and numbers always serializes.
        let json = serde_json::to_string(self).unwrap_or_default();
        sealed(MARKER, &json)
    }

    /// Reads one line. `None` if it is not marked as a heartbeat.
    pub fn parse(line: &str) -> Option<Result<Self, LineError>> {
        let payload = match unseal(MARKER, line)? {
            Ok(payload) => payload,
            Err(error) => return Some(Err(error)),
        };
        Some(serde_json::from_str(payload).map_err(|error| LineError::Json {
            problem: error.to_string(),
            line: line.trim_end().to_owned(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Heartbeat {
        Heartbeat {
            boot: "0123456789abcdef".into(),
            seq: 123_456,
            counters: vec![12_345_678, 23_456_789],
            cpu_errors: 0,
            memory_passes: 1234,
            memory_errors: 0,
            disk_seq: 123_456,
            disk_errors: 0,
            entropy_draws: 123_456,
            monotonic_us: 12_345_678_901,
            realtime_us: 1_800_000_000_000_000,
            clock_backward: 0,
            kernel_warnings: 0,
        }
    }

    #[test]
    fn a_line_reads_back_as_it_was_written_and_stays_short() {
        let line = sample().to_line();
        assert_eq!(Heartbeat::parse(&line), Some(Ok(sample())));
        assert!(line.len() < 200, "{} bytes: {line}", line.len());
    }

    #[test]
    fn carriage_returns_and_text_before_the_marker_are_tolerated() {
        let line = sample().to_line().replace('\n', "\r\n");
        assert_eq!(Heartbeat::parse(&line), Some(Ok(sample())));
        assert_eq!(Heartbeat::parse(&format!("[    0.1] cut off{line}")), Some(Ok(sample())));
    }

    #[test]
    fn other_lines_are_not_heartbeats() {
        assert_eq!(Heartbeat::parse("[    0.000000] Linux version 7.3"), None);
        assert_eq!(Heartbeat::parse(&sealed(NOTE_MARKER, "{}")), None);
        assert_eq!(Heartbeat::parse(""), None);
    }

    #[test]
    fn a_line_that_lost_or_changed_any_byte_is_an_error() {
        let line = sample().to_line();
        let whole = line.trim_end();
        for at in MARKER.len()..whole.len() {
            let lost = format!("{}{}", &whole[..at], &whole[at + 1..]);
            assert!(matches!(Heartbeat::parse(&lost), Some(Err(_))), "without byte {at}: {lost}");
            let mut flipped = whole.as_bytes().to_vec();
            flipped[at] ^= 1;
            let flipped = String::from_utf8(flipped).unwrap();
            assert!(matches!(Heartbeat::parse(&flipped), Some(Err(_))), "byte {at}: {flipped}");
        }
    }

    #[test]
    fn every_prefix_is_an_error_or_no_heartbeat() {
        let line = sample().to_line();
        for end in 0..line.trim_end().len() {
            assert!(!matches!(Heartbeat::parse(&line[..end]), Some(Ok(_))), "{}", &line[..end]);
        }
    }
}
