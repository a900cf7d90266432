//! When a VM boots again that has ended by itself.
//!
//! ```text
//!   boots --ends--> wanted by the policy? --no--> stopped or failed
//!     ^                 \--yes--> waits: 0, then 0.1 s, 0.2 s, 0.4 s ... 60 s while it ends soon after its boot
//!     |____________________________|
//! ```
//!
//! Without the wait, a guest that cannot find its root file system would keep a CPU busy with booting it, and
//! an update would always meet it in the midst of a reset.

use std::time::{Duration, Instant};

use crate::config::Restart;

/// A VM that ends so soon after its boot has not got anywhere.
const QUICK: Duration = Duration::from_secs(10);
/// Under [`Restart::Never`], as many quick resets in a row end the VM.
const MOST: u32 = 10;
/// The shortest wait.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Its guest asked for a reset.
    Reset,
    /// Its guest powered it off.
    PowerOff,
    /// It failed, or could not be started.
    Failure,
}

/// What comes after the end of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// It boots at this moment.
    Boot(Instant),
    /// It stays as it is.
    Stay,
    /// It would boot, but does so for nothing. The value says why.
    GiveUp(String),
}

/// The boots of one VM.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    pub(super) policy: Restart,
    /// Since when the guest runs, if it booted under this host.
    booted: Option<Instant>,
    /// Quick ends since the last one that was not quick.
    quick: u32,
    /// Boots by the policy.
    pub(super) count: u64,
}

impl Restarts {
    /// Notes that the guest is to boot. `by_command` says that a person asked for it.
    pub(super) fn boots(&mut self, by_command: bool) {
        self.booted = None;
        match by_command {
            true => self.quick = 0,
            false => self.count += 1,
        }
    }

    /// Notes that the guest runs. The time before that is not its own: a guest could make it long by what is on its disk.
    pub(super) fn runs(&mut self, now: Instant) {
        self.booted = Some(now);
    }

    /// Whether the policy boots a VM that ended in this way.
    pub(super) fn wants(&self, end: End) -> bool {
        match end {
            End::Reset => true,
            End::Failure => self.policy != Restart::Never,
            End::PowerOff => self.policy == Restart::Always,
        }
    }

    /// Decides what comes after an end at `now`.
    pub(super) fn ends(&mut self, end: End, now: Instant) -> Next {
        let lasted = self.booted.take().map(|booted| now.duration_since(booted));
        self.quick = match lasted {
            Some(lasted) if lasted < QUICK => self.quick.saturating_add(1),
            // It could not be started.
            None if end == End::Failure && self.quick > 0 => self.quick.saturating_add(1),
            _ => 0,
        };
        if !self.wants(end) {
            return Next::Stay;
        }
        if end == End::Reset && self.policy == Restart::Never && self.quick >= MOST {
            return Next::GiveUp(format!(
                "it reset {MOST} times in a row within {} s of its boot, the last time after {} ms: its \
                 console says why; `boot` starts it again",
                QUICK.as_secs(),
                lasted.unwrap_or_default().as_millis()
            ));
        }
        // A failure may be one of the host, which takes longer than no time to pass.
        if end == End::Failure {
            self.quick = self.quick.max(1);
        }
        Next::Boot(now + wait(self.quick))
    }
}

/// Returns how long a VM waits that has ended so many times in a row.
fn wait(quick: u32) -> Duration {
    let doublings = quick.saturating_sub(1).min(16);
    match quick {
        0 => Duration::ZERO,
        _ => (FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(policy: Restart) -> Restarts {
        Restarts { policy, ..Restarts::default() }
    }

    /// Boots, and ends after each of these times. Returns the waits in milliseconds, up to where it is given up.
    fn waits(restarts: &mut Restarts, end: End, seconds: &[u64]) -> Vec<u128> {
        let mut now = Instant::now();
        let mut found = Vec::new();
        for lasted in seconds {
            restarts.boots(false);
            // However long the boot takes.
            now += Duration::from_secs(30);
            restarts.runs(now);
            now += Duration::from_secs(*lasted);
            match restarts.ends(end, now) {
                Next::Boot(at) => found.push((at - now).as_millis()),
                Next::Stay | Next::GiveUp(_) => break,
            }
        }
        found
    }

    #[test]
    fn a_guest_that_resets_at_once_each_time_waits_longer_each_time_and_is_given_up() {
        let found = waits(&mut with(Restart::Never), End::Reset, &[1; 20]);
        assert_eq!(found, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600]);
        let mut restarts = with(Restart::Never);
        (restarts.quick, restarts.booted) = (9, Some(Instant::now()));
        let Next::GiveUp(why) = restarts.ends(End::Reset, Instant::now()) else { panic!() };
        assert!(why.contains("10 times in a row within 10 s"), "{why}");
    }

    #[test]
    fn a_policy_never_gives_up_and_waits_at_most_a_minute() {
        for (policy, end) in [(Restart::OnFailure, End::Reset), (Restart::Always, End::PowerOff)] {
            let found = waits(&mut with(policy), end, &[1; 60]);
            assert_eq!(found.len(), 60);
            assert_eq!((found[9], found[59]), (51_200, 60_000));
        }
    }

    #[test]
    fn a_guest_that_runs_for_a_while_boots_at_once() {
        assert_eq!(waits(&mut with(Restart::Never), End::Reset, &[60; 50]), [0; 50]);
        let found = waits(&mut with(Restart::Never), End::Reset, &[1, 1, 60, 1]);
        assert_eq!(found, [100, 200, 0, 100]);
        // It came over a live update, so nobody knows when it booted.
        let now = Instant::now();
        assert_eq!(with(Restart::Never).ends(End::Reset, now), Next::Boot(now));
    }

    #[test]
    fn a_person_who_boots_it_gives_it_another_chance() {
        let mut restarts = with(Restart::Never);
        assert_eq!(waits(&mut restarts, End::Reset, &[1; 9]).len(), 9);
        restarts.boots(true);
        assert_eq!(waits(&mut restarts, End::Reset, &[1; 9]).len(), 9);
    }

    #[test]
    fn a_vm_boots_again_only_after_ends_that_its_policy_names() {
        let ends = [End::Reset, End::Failure, End::PowerOff];
        let wants = |policy| ends.map(|end| with(policy).wants(end));
        assert_eq!(wants(Restart::Never), [true, false, false]);
        assert_eq!(wants(Restart::OnFailure), [true, true, false]);
        assert_eq!(wants(Restart::Always), [true, true, true]);
        let now = Instant::now();
        assert_eq!(with(Restart::OnFailure).ends(End::PowerOff, now), Next::Stay);
        assert_eq!(with(Restart::OnFailure).ends(End::Failure, now), Next::Boot(now + FIRST_WAIT));
    }

    #[test]
    fn a_vm_that_cannot_be_started_waits_longer_each_time() {
        let mut restarts = with(Restart::OnFailure);
        let now = Instant::now();
        let waits: Vec<_> = (0..4).map(|_| restarts.ends(End::Failure, now)).collect();
        let after = |ms| Next::Boot(now + Duration::from_millis(ms));
        assert_eq!(waits, [after(100), after(200), after(400), after(800)]);
    }
}
