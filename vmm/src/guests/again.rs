//! A VM that has ended by itself boots again, if its policy says so.

use std::time::Instant;

use super::guest::{Guest, Life};
use super::ram::RamSource;
use super::restarts::{End, Next};
use crate::causes::chain;
use crate::config::{Config, Restart};
use crate::link::Event;

/// A VM that is going to boot again.
#[derive(Debug)]
pub(super) struct Waiting {
    until: Instant,
    /// The network devices whose link the operator took down before the VM ended.
    links_down: Vec<String>,
}

impl Guest {
    /// Takes over what the configuration says of the VM beside its machine: when it boots again after it has ended, and
    /// how urgent it is.
    pub fn follow(&mut self, config: &Config) {
        self.restarts.policy = config.restart(&self.machine.name);
        self.priority = config.priority(&self.machine.name);
    }

    /// Returns when the VM boots again after it has ended.
    pub fn restart(&self) -> Restart {
        self.restarts.policy
    }

    /// Returns how often the VM has booted again under this host.
    pub fn restart_count(&self) -> u64 {
        self.restarts.count
    }

    /// Returns when the VM boots again. `None` if it does not wait for that.
    pub fn next_boot(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|waiting| waiting.until)
    }

    /// Whether the VM's process has reported an end that nobody has handled yet.
    pub fn is_ending(&self) -> bool {
        matches!(&self.life, Life::Live(live) if live.process.has_events())
    }

    /// Whether the next host has to boot the VM, which does not go along: it waits for its next boot, or ends
    /// in a way after which its policy boots it.
    pub fn boots_next(&self) -> bool {
        let Life::Live(live) = &self.life else { return self.waiting.is_some() };
        let end = live.process.last_event().map(|event| match event {
            Event::Reset => Some(End::Reset),
            Event::Shutdown => Some(End::PowerOff),
            Event::Crashed(_) => Some(End::Failure),
            Event::Link { .. } | Event::Resized { .. } => None,
        });
        end.flatten().is_some_and(|end| self.restarts.wants(end))
    }

    /// Lets the VM, which did not go along with a live update because it was about to boot again, do so.
    pub fn boot_soon(&mut self) {
        self.waiting = Some(Waiting { until: Instant::now(), links_down: Vec::new() });
    }

    /// Does not boot the VM again after its last end.
    pub fn stay_ended(&mut self) {
        self.waiting = None;
    }

    /// Notes that the VM did not boot when the host started.
    pub fn did_not_boot(&mut self, why: Vec<String>) {
        self.ends(End::Failure, Life::Failed(why), Vec::new());
    }

    /// Notes that the VM was to come from the last host, if it has failed: nothing of it is left that could still come.
    pub fn did_not_arrive(&mut self) {
        if let Life::Failed(why) = &self.life {
            self.did_not_boot(why.clone());
        }
    }

    /// Boots the VM again if its time has come.
    pub fn boot_if_due(&mut self, ram: RamSource<'_>) {
        if self.next_boot().is_none_or(|until| until > Instant::now()) {
            return;
        }
        let Some(Waiting { links_down, .. }) = self.waiting.take() else { return };
        self.restarts.boots(Instant::now(), false);
        match self.boot_again(ram) {
            Ok(()) => self.take_down(&links_down),
            Err(error) => {
                let why = chain(&error);
                tracing::error!("VM `{}`: {}", self.machine.name, why.join(": "));
                self.ends(End::Failure, Life::Failed(why), links_down);
            }
        }
    }

    /// Handles the end of the VM, whose life is `life` from now on unless it boots again at once.
    pub(super) fn ends(&mut self, end: End, life: Life, links_down: Vec<String>) {
        self.life = life;
        match self.restarts.ends(end, Instant::now()) {
            Next::Stay => {}
            Next::GiveUp(why) => self.fail(vec![why]),
            Next::Boot(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    tracing::info!("VM `{}` boots again in {left:?}", self.machine.name);
                }
                self.waiting = Some(Waiting { until, links_down });
            }
        }
    }
}
