//! Recognizes a guest that resets again and again without getting anywhere, such as one whose kernel cannot find
//! its root file system: it would otherwise boot for ever, and nobody would hear why.

use std::time::{Duration, Instant};

/// A reset so soon after the boot counts as quick.
const QUICK: Duration = Duration::from_secs(10);
/// As many quick resets in a row end the VM.
const MOST: u32 = 10;

/// The resets of one VM.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// When the guest booted, if it did so under this host.
    booted: Option<Instant>,
    /// Quick resets since the last one that was not quick.
    quick: u32,
}

impl Resets {
    /// Notes that the guest boots. `by_command` says that a person asked for it.
    pub(super) fn boots(&mut self, now: Instant, by_command: bool) {
        self.booted = Some(now);
        if by_command {
            self.quick = 0;
        }
    }

    /// Counts a reset. Returns why the guest should not boot again, if it should not.
    pub(super) fn resets(&mut self, now: Instant) -> Option<String> {
        let lasted = self.booted.map(|booted| now.duration_since(booted));
        self.quick = match lasted {
            Some(lasted) if lasted < QUICK => self.quick + 1,
            _ => 0,
        };
        (self.quick >= MOST).then(|| {
            format!(
                "it reset {MOST} times in a row within {} s of its boot, the last time after {} ms: its \
                 console says why; `boot` starts it again",
                QUICK.as_secs(),
                lasted.unwrap_or_default().as_millis()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Boots and resets after each of these times. Returns after how many resets the guest was given up.
    fn given_up_after(resets: &mut Resets, times: &[u64]) -> Option<usize> {
        let mut now = Instant::now();
        times.iter().position(|seconds| {
            resets.boots(now, false);
            now += Duration::from_secs(*seconds);
            resets.resets(now).is_some()
        })
    }

    #[test]
    fn a_guest_that_resets_at_once_each_time_is_given_up() {
        assert_eq!(given_up_after(&mut Resets::default(), &[1; 20]), Some(9));
        let why = Resets { quick: 9, booted: Some(Instant::now()) }.resets(Instant::now()).unwrap();
        assert!(why.contains("10 times in a row within 10 s"), "{why}");
    }

    #[test]
    fn a_guest_that_runs_for_a_while_may_reset_as_often_as_it_likes() {
        assert_eq!(given_up_after(&mut Resets::default(), &[60; 50]), None);
        let mut sometimes = [1; 50];
        sometimes.iter_mut().step_by(9).for_each(|seconds| *seconds = 60);
        assert_eq!(given_up_after(&mut Resets::default(), &sometimes), None);
        // It came over a live update, so nobody knows when it booted.
        assert_eq!(Resets::default().resets(Instant::now()), None);
    }

    #[test]
    fn a_person_who_boots_it_gives_it_another_chance() {
        let mut resets = Resets::default();
        assert_eq!(given_up_after(&mut resets, &[1; 9]), None);
        resets.boots(Instant::now(), true);
        assert_eq!(given_up_after(&mut resets, &[1; 9]), None);
    }
}
