//! Judges, from a guest's heartbeats alone, whether the guest ran on undisturbed.
//!
//! Every heartbeat is compared with the one before it. An event that must never happen is recorded as a
//! [`Fault`]. Progress that must happen (counters, memory passes, disk records, entropy) is counted from
//! a mark, which the harness sets when it starts an update. Each [`Check`] combines the faults and the
//! progress of one kind, with evidence for success or failure.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::workload::Heartbeat;
use crate::workload::heartbeat::LineError;

/// How far a guest's wall clock may move against its monotonic clock. Nothing in the guest sets the wall
/// clock, so only rounding or an error of the hypervisor can move it.
const CLOCK_OFFSET: Duration = Duration::from_millis(100);

/// How far a guest's monotonic clock may move against the harness's clock over a live update. Compared
/// are the lines with the least delay before the update and after it.
const CLOCK_STEP: Duration = Duration::from_millis(500);

/// Number of last lines from which the current offset of a guest's clock is computed.
const RECENT: usize = 8;

/// Lines that must have arrived since the guest was resumed: [`RECENT`], and before these some that may
/// have been sent before the resume.
const SETTLED_LINES: u64 = 12;

/// An event that must never happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A line arrived damaged.
    Damaged(LineError),
    /// The boot id changed: the guest was started again instead of resumed.
    Rebooted {
        /// The boot id before and after.
        boots: [String; 2],
    },
    /// The heartbeats between these two are missing.
    Gap {
        /// Numbers of the lines on both sides.
        seqs: [u64; 2],
    },
    /// The same heartbeat or an older one arrived again: the guest was set back.
    Repeat {
        /// Numbers of the two lines.
        seqs: [u64; 2],
    },
    /// A number that must never decrease went down.
    WentBack {
        /// Its name.
        what: &'static str,
        /// Before and after.
        values: [u64; 2],
    },
    /// The number of vCPUs changed.
    Vcpus {
        /// Numbers of vCPUs before and after.
        counts: [usize; 2],
    },
    /// A count of errors grew.
    Counted {
        /// Its name.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The wall clock moved against the monotonic clock.
    Offset {
        /// The movement since the first heartbeat, in microseconds.
        drift_us: i64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(error) => error.fmt(f),
            Self::Rebooted { boots: [a, b] } => write!(f, "boot {a} became boot {b}"),
            Self::Gap { seqs: [a, b] } => write!(f, "line {a} was followed by line {b}"),
            Self::Repeat { seqs: [a, b] } => write!(f, "line {a} was followed by line {b} again"),
            Self::WentBack { what, values: [a, b] } => write!(f, "{what} went from {a} to {b}"),
            Self::Vcpus { counts: [a, b] } => write!(f, "{a} vCPUs became {b}"),
            Self::Counted { what, value } => write!(f, "{value} {what}"),
            Self::Offset { drift_us } => {
                write!(f, "the wall clock moved {drift_us} us against the monotonic clock")
            }
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name, in kebab-case.
    pub name: &'static str,
    /// Whether it passed.
    pub ok: bool,
    /// The reason for the result.
    pub evidence: String,
}

/// The record of one guest's heartbeats.
#[derive(Debug, Default)]
pub struct Continuity {
    first: Option<Heartbeat>,
    last: Option<(Heartbeat, Duration)>,
    mark: Option<Heartbeat>,
    /// Number of the last heartbeat before the resume, or before the mark.
    resumed: u64,
    lines: u64,
    longest_silence: Duration,
    /// For each of the last heartbeats: the arrival time minus the guest's monotonic time in it, in
    /// microseconds. The clocks have different origins, so only differences have a meaning.
    recent_lags: VecDeque<i64>,
    /// The least lag of any heartbeat so far.
    least_lag: Option<i64>,
    lag_before_mark: Option<i64>,
    faults: Vec<Fault>,
}

impl Continuity {
    /// Takes a line that arrived `at` this time, by any monotonic clock. Ignores lines that are not
    /// heartbeats.
    pub fn observe(&mut self, line: &str, at: Duration) {
        match Heartbeat::parse(line) {
            None => {}
            Some(Err(error)) => self.faults.push(Fault::Damaged(error)),
            Some(Ok(beat)) => self.heartbeat(beat, at),
        }
    }

    fn heartbeat(&mut self, beat: Heartbeat, at: Duration) {
        self.lines += 1;
        if let Some((last, then)) = self.last.take() {
            let silence = at.saturating_sub(then);
            self.longest_silence = self.longest_silence.max(silence);
            self.compare(&last, &beat);
        } else if beat.seq != 1 {
            self.faults.push(Fault::Gap { seqs: [0, beat.seq] });
        }
        let first = self.first.get_or_insert_with(|| beat.clone());
        let drift_us = offset_us(&beat).saturating_sub(offset_us(first));
        let known = self.faults.iter().any(|fault| matches!(fault, Fault::Offset { .. }));
        if drift_us.unsigned_abs() > CLOCK_OFFSET.as_micros() as u64 && !known {
            self.faults.push(Fault::Offset { drift_us });
        }
        let lag = at.as_micros() as i64 - beat.monotonic_us as i64;
        if self.recent_lags.len() == RECENT {
            self.recent_lags.pop_front();
        }
        self.recent_lags.push_back(lag);
        self.least_lag = Some(self.least_lag.map_or(lag, |least| least.min(lag)));
        self.last = Some((beat, at));
    }

    /// How much the guest's monotonic clock fell behind the harness's clock since the mark, in
    /// microseconds; negative if it ran ahead. `None` until enough heartbeats have arrived.
    pub fn clock_step(&self) -> Option<i64> {
        let enough = self.recent_lags.len() == RECENT;
        let now = self.recent_lags.iter().min().filter(|_| enough)?;
        Some(now - self.lag_before_mark?)
    }

    fn compare(&mut self, last: &Heartbeat, beat: &Heartbeat) {
        let mut faults = Vec::new();
        if last.boot != beat.boot {
            faults.push(Fault::Rebooted { boots: [last.boot.clone(), beat.boot.clone()] });
        }
        let seqs = [last.seq, beat.seq];
        if beat.seq <= last.seq {
            faults.push(Fault::Repeat { seqs });
        } else if beat.seq != last.seq + 1 {
            faults.push(Fault::Gap { seqs });
        }
        if last.counters.len() != beat.counters.len() {
            faults.push(Fault::Vcpus { counts: [last.counters.len(), beat.counters.len()] });
        }
        let counters = last.counters.iter().zip(&beat.counters).map(|(a, b)| ("counter", *a, *b));
        let growing = counters.chain([
            ("memory passes", last.memory_passes, beat.memory_passes),
            ("disk record", last.disk_seq, beat.disk_seq),
            ("entropy draws", last.entropy_draws, beat.entropy_draws),
            ("monotonic clock", last.monotonic_us, beat.monotonic_us),
            ("wall clock", last.realtime_us, beat.realtime_us),
        ]);
        faults.extend(
            growing
                .filter(|(_, before, after)| after < before)
                .map(|(what, a, b)| Fault::WentBack { what, values: [a, b] }),
        );
        let zero = [
            ("register errors", last.cpu_errors, beat.cpu_errors),
            ("memory errors", last.memory_errors, beat.memory_errors),
            ("disk errors", last.disk_errors, beat.disk_errors),
            ("clocks seen going back inside", last.clock_backward, beat.clock_backward),
            ("kernel warnings", last.kernel_warnings, beat.kernel_warnings),
        ];
        faults.extend(
            zero.into_iter()
                .filter(|(_, before, after)| after > before)
                .map(|(what, _, value)| Fault::Counted { what, value }),
        );
        self.faults.append(&mut faults);
    }

    /// Sets the mark: progress is counted from here on. Called before a request to the host.
    pub fn mark(&mut self) {
        self.mark = self.last.as_ref().map(|(beat, _)| beat.clone());
        self.lag_before_mark = self.least_lag;
        self.resumed();
    }

    /// Notes that the guest was resumed: only later lines show its state after the resume.
    pub fn resumed(&mut self) {
        self.resumed = self.last.as_ref().map_or(0, |(beat, _)| beat.seq);
    }

    /// Whether, since the mark, every vCPU counted, all memory was verified, at least 10 records were
    /// written and entropy was drawn at least 10 times; and enough lines arrived since the resume.
    pub fn has_settled(&self) -> bool {
        let Some((mark, last)) = self.since_mark() else { return false };
        let heard = last.seq >= self.resumed.saturating_add(SETTLED_LINES);
        heard
            && counted(mark, last)
            && verified(mark, last)
            && wrote(mark, last)
            && drew(mark, last)
    }

    fn since_mark(&self) -> Option<(&Heartbeat, &Heartbeat)> {
        let last = &self.last.as_ref()?.0;
        Some((self.mark.as_ref().or(self.first.as_ref())?, last))
    }

    /// The last heartbeat.
    pub fn last(&self) -> Option<&Heartbeat> {
        self.last.as_ref().map(|(beat, _)| beat)
    }

    /// Heartbeats that arrived.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// All faults so far.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// The results of all checks, in a fixed order.
    pub fn checks(&self) -> Vec<Check> {
        let (Some(first), Some((mark, last))) = (&self.first, self.since_mark()) else {
            let evidence = "no heartbeat arrived".to_owned();
            return vec![Check { name: "alive", ok: false, evidence }];
        };
        let seqs = format!("lines {}..{}, each once", first.seq, last.seq);
        let silence = self.longest_silence;
        let counts = format!("{:?} thousand, then {:?}", mark.counters, last.counters);
        let passes = last.memory_passes - mark.memory_passes.min(last.memory_passes);
        let records = last.disk_seq - mark.disk_seq.min(last.disk_seq);
        let draws = last.entropy_draws - mark.entropy_draws.min(last.entropy_draws);
        let drift = offset_us(last) - offset_us(first);
        vec![
            self.check("boot-id", true, format!("{} throughout", first.boot), |f| {
                matches!(f, Fault::Rebooted { .. })
            }),
            self.check("heartbeat", true, seqs, |f| {
                matches!(f, Fault::Damaged(_) | Fault::Gap { .. } | Fault::Repeat { .. })
            }),
            self.check("counter", counted(mark, last), counts, |f| {
                matches!(f, Fault::WentBack { what: "counter", .. } | Fault::Vcpus { .. })
            }),
            self.check("registers", true, "integer and vector as left".into(), |f| {
                matches!(f, Fault::Counted { what: "register errors", .. })
            }),
            self.check("memory", verified(mark, last), format!("{passes} passes verified"), |f| {
                matches!(
                    f,
                    Fault::Counted { what: "memory errors", .. }
                        | Fault::WentBack { what: "memory passes", .. }
                )
            }),
            self.check("disk", wrote(mark, last), format!("{records} records written"), |f| {
                matches!(
                    f,
                    Fault::Counted { what: "disk errors", .. }
                        | Fault::WentBack { what: "disk record", .. }
                )
            }),
            self.check("entropy", drew(mark, last), format!("{draws} times entropy"), |f| {
                matches!(f, Fault::WentBack { what: "entropy draws", .. })
            }),
            self.check(
                "monotonic-clock",
                true,
                format!("never back; longest silence {silence:.1?}"),
                |f| {
                    matches!(
                        f,
                        Fault::WentBack { what: "monotonic clock", .. }
                            | Fault::Counted { what: "clocks seen going back inside", .. }
                    )
                },
            ),
            self.clock_step_check(),
            self.check(
                "wall-clock",
                true,
                format!("moved {drift} us against the monotonic clock"),
                |f| matches!(f, Fault::WentBack { what: "wall clock", .. } | Fault::Offset { .. }),
            ),
            self.check("kernel-log", true, "no complaint".into(), |f| {
                matches!(f, Fault::Counted { what: "kernel warnings", .. })
            }),
        ]
    }

    /// Checks that the guest's clock advanced as the harness's clock did: that it neither lost the
    /// blackout nor counted it twice.
    fn clock_step_check(&self) -> Check {
        let name = "clock-step";
        match self.clock_step() {
            None => Check { name, ok: true, evidence: "no update yet, or too few lines".into() },
            Some(behind_us) => {
                let (how, step) = match behind_us < 0 {
                    true => ("ahead of", Duration::from_micros(behind_us.unsigned_abs())),
                    false => ("behind", Duration::from_micros(behind_us.unsigned_abs())),
                };
                let evidence = format!("{step:.1?} {how} the time that passed outside");
                Check { name, ok: step <= CLOCK_STEP, evidence }
            }
        }
    }

    fn check(
        &self,
        name: &'static str,
        progressed: bool,
        evidence: String,
        concerns: impl Fn(&Fault) -> bool,
    ) -> Check {
        let faults: Vec<String> =
            self.faults.iter().filter(|f| concerns(f)).map(Fault::to_string).collect();
        match faults.split_first() {
            None if progressed => Check { name, ok: true, evidence },
            None => Check { name, ok: false, evidence: format!("no progress: {evidence}") },
            Some((first, [])) => Check { name, ok: false, evidence: first.clone() },
            Some((first, more)) => {
                let evidence = format!("{first}, and {} more", more.len());
                Check { name, ok: false, evidence }
            }
        }
    }
}

fn counted(mark: &Heartbeat, last: &Heartbeat) -> bool {
    mark.counters.iter().zip(&last.counters).all(|(before, after)| after > before)
}

/// Two more passes: at least one of them began after the mark.
fn verified(mark: &Heartbeat, last: &Heartbeat) -> bool {
    last.memory_passes >= mark.memory_passes + 2
}

fn wrote(mark: &Heartbeat, last: &Heartbeat) -> bool {
    last.disk_seq >= mark.disk_seq + 10
}

fn drew(mark: &Heartbeat, last: &Heartbeat) -> bool {
    last.entropy_draws >= mark.entropy_draws + 10
}

fn offset_us(beat: &Heartbeat) -> i64 {
    beat.realtime_us as i64 - beat.monotonic_us as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(seq: u64) -> Heartbeat {
        Heartbeat {
            boot: "aaaa".into(),
            seq,
            counters: vec![seq * 10, seq * 11],
            cpu_errors: 0,
            memory_passes: seq,
            memory_errors: 0,
            disk_seq: seq * 4,
            disk_errors: 0,
            entropy_draws: seq * 5,
            monotonic_us: 1_000_000 + seq * 100_000,
            realtime_us: 1_795_000_000_000_000 + seq * 100_000,
            clock_backward: 0,
            kernel_warnings: 0,
        }
    }

    fn run(beats: &[Heartbeat]) -> Continuity {
        let mut continuity = Continuity::default();
        for (index, beat) in beats.iter().enumerate() {
            continuity.observe(&beat.to_line(), Duration::from_millis(100 * index as u64));
        }
        continuity
    }

    /// Ten good heartbeats of which the fifth and all later ones are changed.
    fn changed(change: impl Fn(&mut Heartbeat)) -> Continuity {
        let mut beats: Vec<_> = (1..=10).map(beat).collect();
        beats[4..].iter_mut().for_each(change);
        run(&beats)
    }

    fn failed(continuity: &Continuity) -> Vec<&'static str> {
        continuity.checks().iter().filter(|c| !c.ok).map(|c| c.name).collect()
    }

    #[test]
    fn a_guest_that_went_on_passes_every_check() {
        let mut continuity = run(&(1..=10).map(beat).collect::<Vec<_>>());
        assert_eq!(failed(&continuity), [] as [&str; 0], "{:?}", continuity.checks());
        continuity.mark();
        assert!(!continuity.has_settled());
        assert_eq!(
            failed(&continuity),
            ["counter", "memory", "disk", "entropy"],
            "no progress since the mark"
        );
        for seq in 11..=10 + SETTLED_LINES {
            continuity.observe(&beat(seq).to_line(), Duration::from_millis(100 * (seq - 1)));
        }
        assert!(continuity.has_settled());
        assert_eq!(failed(&continuity), [] as [&str; 0]);
    }

    #[test]
    fn lines_from_before_the_resume_settle_nothing() {
        let lines = 10 + 2 * SETTLED_LINES;
        let mut continuity = run(&(1..=10).map(beat).collect::<Vec<_>>());
        continuity.mark();
        for seq in 11..lines {
            continuity.observe(&beat(seq).to_line(), Duration::from_millis(100 * seq));
        }
        assert!(continuity.has_settled());
        continuity.resumed();
        for seq in lines..lines + SETTLED_LINES {
            assert!(!continuity.has_settled(), "line {seq}");
            continuity.observe(&beat(seq).to_line(), Duration::from_millis(100 * seq));
        }
        assert!(continuity.has_settled());
    }

    #[test]
    fn a_guest_that_never_spoke_is_not_alive() {
        let mut continuity = Continuity::default();
        continuity.observe("[    0.0] Linux version", Duration::ZERO);
        assert_eq!(failed(&continuity), ["alive"]);
        assert!(!continuity.has_settled());
    }

    #[test]
    fn a_gap_and_a_repeat_are_found_with_their_lines() {
        let gap = run(&[beat(1), beat(2), beat(4)]);
        assert_eq!(gap.faults(), [Fault::Gap { seqs: [2, 4] }]);
        let repeat = run(&[beat(1), beat(2), beat(2), beat(3)]);
        assert_eq!(repeat.faults()[0], Fault::Repeat { seqs: [2, 2] });
        let set_back = run(&[beat(1), beat(2), beat(3), beat(1)]);
        assert!(set_back.faults().contains(&Fault::Repeat { seqs: [3, 1] }));
        let late = run(&[beat(3), beat(4)]);
        assert_eq!(late.faults(), [Fault::Gap { seqs: [0, 3] }], "the first lines were lost");
        for continuity in [gap, repeat, set_back, late] {
            assert!(failed(&continuity).contains(&"heartbeat"));
        }
    }

    #[test]
    fn a_damaged_line_is_a_fault_and_not_only_a_gap() {
        let mut continuity = run(&[beat(1)]);
        continuity.observe(&beat(2).to_line().replace("seq", "sq"), Duration::from_millis(100));
        assert!(matches!(continuity.faults(), [Fault::Damaged(_)]));
        assert!(failed(&continuity).contains(&"heartbeat"));
    }

    #[test]
    fn another_boot_is_found() {
        assert_eq!(failed(&changed(|b| b.boot = "bbbb".into())), ["boot-id"]);
    }

    #[test]
    fn each_number_that_goes_wrong_fails_its_own_check_only() {
        type Change = fn(&mut Heartbeat);
        let cases: [(Change, &str); 12] = [
            (|b| b.counters[1] = 1, "counter"),
            (|b| b.counters.truncate(1), "counter"),
            (|b| b.counters.push(5), "counter"),
            (|b| b.cpu_errors = 1, "registers"),
            (|b| b.memory_errors = 1, "memory"),
            (|b| b.memory_passes -= 3, "memory"),
            (|b| b.disk_errors = 2, "disk"),
            (|b| b.disk_seq -= 12, "disk"),
            (|b| b.clock_backward = 1, "monotonic-clock"),
            (|b| b.realtime_us += 200_000, "wall-clock"),
            (|b| b.realtime_us -= 200_000, "wall-clock"),
            (|b| b.kernel_warnings = 1, "kernel-log"),
        ];
        for (change, check) in cases {
            let continuity = changed(change);
            assert_eq!(failed(&continuity), [check], "{:?}", continuity.faults());
        }
    }

    #[test]
    fn a_monotonic_clock_that_goes_back_is_found() {
        let back = changed(|b| {
            b.monotonic_us -= 300_000;
            b.realtime_us -= 300_000;
        });
        assert_eq!(failed(&back), ["monotonic-clock", "wall-clock"]);
    }

    #[test]
    fn a_blackout_that_the_clock_lost_or_counted_twice_is_found() {
        for (outside_ms, inside_ms, ok) in
            [(3000, 3000, true), (3000, 0, false), (3000, 6000, false), (3000, 2700, true)]
        {
            let mut continuity = run(&(1..=10).map(beat).collect::<Vec<_>>());
            continuity.mark();
            for seq in 11..=30 {
                let mut late = beat(seq);
                late.monotonic_us += inside_ms * 1000;
                late.realtime_us += inside_ms * 1000;
                // Every other line comes late, as on a busy machine.
                let delay = if seq % 2 == 0 { 900 } else { 0 };
                let at = Duration::from_millis(100 * (seq - 1) + outside_ms + delay);
                continuity.observe(&late.to_line(), at);
            }
            let check = continuity.clock_step_check();
            assert_eq!(check.ok, ok, "{outside_ms} ms outside, {inside_ms} inside: {check:?}");
        }
    }

    #[test]
    fn a_vcpu_that_stands_still_while_the_other_counts_is_no_progress() {
        let mut continuity = run(&[beat(1), beat(2)]);
        continuity.mark();
        let mut stuck = beat(3);
        stuck.counters[1] = beat(2).counters[1];
        continuity.observe(&stuck.to_line(), Duration::from_secs(1));
        assert!(failed(&continuity).contains(&"counter"));
    }
}
