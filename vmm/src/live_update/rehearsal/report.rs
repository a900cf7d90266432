//! What the next host tells in a rehearsal: lines of JSON behind a mark on the serial port, between the lines of its
//! kernel.
//!
//! The host that reads them trusts them as far as the kernel that it would enter, and no further: every line, their
//! number and every text are bounded, and only whole reports count.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::live_update::preflight::{Check, Finding, Severity};

/// What the lines of a report begin with.
const MARK: &str = "perennial-rehearsal: ";
/// What the names of the next host's findings begin with.
const PREFIX: &str = "rehearsal-";
/// Longest line that is kept, in bytes.
const LONGEST: usize = 16 << 10;
/// Most characters of a text of a finding.
const MOST_TEXT: usize = 2000;
/// Most findings of a report, and bytes of all their texts: the reply to the client must fit into what the host keeps
/// for one.
const MOST_FINDINGS: usize = 1000;
const MOST_BYTES: usize = 1 << 20;
/// How many of the last lines of the kernel are kept, and how many characters of each.
const LAST_LINES: usize = 8;
const MOST_OF_LINE: usize = 160;
/// What a kernel says before it lists the calls that led to its end.
const PANIC: &str = "Kernel panic";

/// A line of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The next host has begun.
    Begun {
        /// Its version.
        version: String,
        /// Its kernel.
        kernel: String,
    },
    /// It found something.
    Finding(Said),
    /// It has told everything.
    Ended {
        /// The number of its findings, so that a lost line is noticed.
        findings: usize,
    },
}

/// A finding as a host of another version may tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    severity: Severity,
    name: String,
    subject: String,
    sentence: String,
    remedy: String,
}

impl Line {
    /// The line of a finding.
    pub fn finding(finding: Finding) -> Self {
        let Finding { severity, name, subject, sentence, remedy, can_be_forced: _ } = finding;
        Self::Finding(Said { severity, name: name.name().to_owned(), subject, sentence, remedy })
    }

    /// The line as it is written, with its end. It begins at the start of a line, whatever the kernel has written.
    pub fn text(&self) -> String {
        // A value of these types can always be written.
        let json = serde_json::to_string(self).unwrap_or_default();
        format!("\n{MARK}{json}\n")
    }
}

impl Said {
    fn finding(self) -> Finding {
        let Self { severity, name, subject, sentence, remedy } = self;
        // The name says what an operator can override: it must be one of a rehearsal, and a refusal one that can be.
        let is_meant = |check: &&Check| {
            check.name() == name
                && name.starts_with(PREFIX)
                && (severity != Severity::Refusal || check.can_be_forced())
        };
        let known = Check::ALL.iter().find(is_meant).copied();
        let check = known.unwrap_or(Check::RehearsalOther);
        let sentence = match known {
            Some(_) => sentence,
            None => format!("`{name}`: {sentence}"),
        };
        let [subject, sentence, remedy] =
            [subject, sentence, remedy].map(|text| plain(&text, MOST_TEXT));
        Finding { severity, ..Finding::new(check, subject, sentence, remedy) }
    }
}

/// Returns the first `most` characters of a text, without characters that control a terminal.
fn plain(text: &str, most: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect()
}

/// What came over the serial port until now.
#[derive(Debug, Default)]
pub struct Transcript {
    line: Vec<u8>,
    last: VecDeque<String>,
    /// The line that says why the kernel panicked.
    panic: Option<String>,
    begun: Option<(String, String)>,
    findings: Vec<Finding>,
    /// Bytes of their texts.
    bytes: usize,
    /// Whether the report is whole. `None`: it has not ended.
    whole: Option<bool>,
}

impl Transcript {
    /// Adds bytes that came.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = std::mem::take(&mut self.line);
                    self.add_line(String::from_utf8_lossy(&line).trim_end());
                }
                // The rest of a line that is too long is dropped.
                byte if self.line.len() < LONGEST => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn add_line(&mut self, line: &str) {
        let said = line.strip_prefix(MARK).and_then(|json| serde_json::from_str(json).ok());
        match said {
            // What comes after the end is not part of the report.
            Some(_) if self.whole.is_some() => {}
            Some(Line::Begun { version, kernel }) => {
                self.begun = Some((plain(&version, MOST_OF_LINE), plain(&kernel, MOST_OF_LINE)));
            }
            Some(Line::Finding(said)) => self.add_finding(said.finding()),
            Some(Line::Ended { findings }) => self.whole = Some(findings == self.findings.len()),
            None => self.add_other(line),
        }
    }

    /// One beyond the bounds is dropped. The number at the end then shows that it is missing.
    fn add_finding(&mut self, finding: Finding) {
        let Finding { subject, sentence, remedy, .. } = &finding;
        let bytes = self.bytes + subject.len() + sentence.len() + remedy.len();
        if self.findings.len() < MOST_FINDINGS && bytes <= MOST_BYTES {
            self.bytes = bytes;
            self.findings.push(finding);
        }
    }

    fn add_other(&mut self, line: &str) {
        let line = plain(line, MOST_OF_LINE);
        if line.contains(PANIC) {
            self.panic.get_or_insert(line.clone());
        }
        if !line.trim().is_empty() {
            self.last.push_back(line);
        }
        if self.last.len() > LAST_LINES {
            self.last.pop_front();
        }
    }

    /// Whether the next host has told everything.
    pub fn has_ended(&self) -> bool {
        self.whole.is_some()
    }

    /// Returns the findings about the candidate `subject`. `how` says how its VM has ended if it did so before the report
    /// did: a clause without a subject.
    pub fn findings(mut self, subject: &str, how: Option<&str>) -> Vec<Finding> {
        // What the kernel wrote last may have no end.
        let rest = std::mem::take(&mut self.line);
        self.add_line(String::from_utf8_lossy(&rest).trim_end());
        let mut findings = std::mem::take(&mut self.findings);
        let remedy = "boot the kernel and the initramfs on another machine to see more";
        match (&self.begun, self.whole, how) {
            (Some((version, kernel)), Some(true), _) => {
                let sentence = format!(
                    "{subject} was booted in a VM: Linux {kernel} with perennial {version} told what it found"
                );
                findings.push(Finding::new(Check::Rehearsed, subject, sentence, ""));
            }
            (_, Some(_), _) => {
                let sentence = format!(
                    "{subject} was booted in a VM, but lines of the next host's report are missing"
                );
                findings.push(Finding::new(Check::RehearsalBoot, subject, sentence, remedy));
            }
            (begun, None, how) => {
                let who = match begun {
                    Some((version, _)) => {
                        format!("with perennial {version} in it began, but then it")
                    }
                    None => "was booted in a VM, but it".to_owned(),
                };
                let how = how.unwrap_or("did not end");
                let panic = self.panic.as_ref().map(|line| format!(" ({line})"));
                let panic = panic.unwrap_or_default();
                let last = self.last();
                let sentence = format!("{subject} {who} {how}{panic}; its last lines: {last}");
                findings.push(Finding::new(Check::RehearsalBoot, subject, sentence, remedy));
            }
        }
        findings
    }

    fn last(&self) -> String {
        match self.last.is_empty() {
            true => "none (does it have a driver for a 8250 serial port built in?)".to_owned(),
            false => self.last.iter().map(String::as_str).collect::<Vec<_>>().join(" | "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun() -> String {
        Line::Begun { version: "0.2.0".into(), kernel: "7.4".into() }.text()
    }

    fn finding() -> String {
        let finding = Finding::new(Check::RehearsalLuo, "s", "no LUO\x1b[2J", "build it in");
        Line::finding(finding).text()
    }

    fn ended(findings: usize) -> String {
        Line::Ended { findings }.text()
    }

    fn read(text: &str, how: Option<&str>) -> Vec<Finding> {
        let mut transcript = Transcript::default();
        // In pieces, as a pipe gives it.
        text.as_bytes().chunks(7).for_each(|piece| transcript.add(piece));
        assert_eq!(transcript.has_ended(), text.contains("ended"));
        transcript.findings("/b/bzImage", how)
    }

    fn names(findings: &[Finding]) -> Vec<Check> {
        findings.iter().map(|finding| finding.name).collect()
    }

    #[test]
    fn a_report_is_found_between_the_lines_of_the_kernel() {
        let text = format!("[0.1] Linux{}[0.2] x\n{}{}tail", begun(), finding(), ended(1));
        let findings = read(&text, None);
        assert_eq!(names(&findings), [Check::RehearsalLuo, Check::Rehearsed]);
        assert_eq!(findings[0].sentence, "no LUO [2J", "no terminal is controlled");
        assert!(findings[0].can_be_forced && findings[1].sentence.contains("Linux 7.4"));
        assert_eq!(names(&read(&format!("{}{}", begun(), ended(0)), None)), [Check::Rehearsed]);
    }

    #[test]
    fn a_kernel_that_says_nothing_of_a_rehearsal_is_refused_with_its_last_lines() {
        let text: String = (0..20).map(|n| format!("line {n}\n")).collect();
        let findings = read(&(text + "Kernel panic - not syncing"), Some("reset"));
        assert_eq!(names(&findings), [Check::RehearsalBoot]);
        let sentence = &findings[0].sentence;
        assert!(sentence.contains("not syncing); its last lines: line 13"), "{sentence}");
        assert!(sentence.ends_with("not syncing"), "{sentence}");
        let calls: String = (0..20).map(|n| format!(" call {n}\n")).collect();
        let findings = read(&format!("[1] Kernel panic: no init\n{calls}"), Some("reset"));
        let sentence = &findings[0].sentence;
        assert!(sentence.contains("it reset ([1] Kernel panic: no init); its"), "{sentence}");
        let findings = read("", Some("did not report within 9 s"));
        assert!(
            findings[0].sentence.contains("within 9 s") && findings[0].sentence.contains("8250")
        );
    }

    #[test]
    fn a_report_that_is_not_whole_refuses_and_keeps_what_was_found() {
        for (text, how) in [
            (format!("{}{}{}", begun(), finding(), ended(2)), None),
            (format!("{}{}", begun(), finding()), Some("powered off")),
            (format!("{}{}", finding(), ended(1)), None),
        ] {
            let findings = read(&text, how);
            assert_eq!(names(&findings), [Check::RehearsalLuo, Check::RehearsalBoot], "{text}");
        }
        let cut = &begun()[..30];
        assert_eq!(names(&read(cut, Some("reset"))), [Check::RehearsalBoot]);
    }

    #[test]
    fn what_another_version_finds_refuses_under_a_name_that_this_one_knows() {
        // A new one, one that only this host may have, one that is no refusal here and so cannot be overridden.
        for name in ["rehearsal-from-the-future", "rehearsed", "disk-missing", "rehearsal-config"] {
            let newer = finding().replace("rehearsal-luo", name);
            let findings = read(&(begun() + &newer + &ended(1)), None);
            assert_eq!(names(&findings), [Check::RehearsalOther, Check::Rehearsed], "{name}");
            assert!(findings[0].sentence.contains(&format!("`{name}`: no LUO")), "{findings:?}");
            assert!(findings[0].can_be_forced);
        }
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut transcript = Transcript::default();
        transcript.add(&vec![b'x'; 1 << 20]);
        assert_eq!(transcript.line.len(), LONGEST);
        transcript.add(b"\n");
        (0..3 * MOST_FINDINGS).for_each(|_| transcript.add(finding().as_bytes()));
        assert_eq!(transcript.findings.len(), MOST_FINDINGS);
        transcript.add(begun().as_bytes());
        transcript.add(ended(3 * MOST_FINDINGS).as_bytes());
        let findings = transcript.findings("b", None);
        assert_eq!(findings.last().unwrap().name, Check::RehearsalBoot, "lines are missing");
        // Texts of four bytes a character.
        let long = Finding::new(Check::RehearsalLuo, "", "\u{1f600}".repeat(3000), "");
        let mut transcript = Transcript::default();
        (0..MOST_FINDINGS)
            .for_each(|_| transcript.add(Line::finding(long.clone()).text().as_bytes()));
        assert_eq!(transcript.findings[0].sentence.chars().count(), MOST_TEXT);
        let bytes: usize = transcript.findings.iter().map(|finding| finding.sentence.len()).sum();
        assert_eq!((bytes, bytes <= MOST_BYTES), (transcript.bytes, true));
    }
}
