//! A VM that has ended by itself boots again, if its policy says so; and what boots beside the host's loop.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use guest_mem::Segment;
use rustix::process::Pid;

use super::booting::Booting;
use super::errand::Done;
use super::guest::{Guest, GuestError, Life};
use super::ram::RamSource;
use super::restarts::{End, Next};
use crate::causes::chain;
use crate::config::{Config, Restart};
use crate::link::Event;

/// A VM that boots, or is going to.
#[derive(Debug)]
pub(super) struct Waiting {
    why: Why,
    until: Instant,
    /// The boot, when it has begun.
    booting: Option<Box<Booting>>,
    /// The network devices whose link the operator took down before the VM ended.
    links_down: Vec<String>,
    /// What the VM waited for before a command booted it, and does again if that boot fails.
    before: Option<Box<Waiting>>,
}

/// Why a VM boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// It has ended by itself.
    Again,
    /// The host has started.
    Start,
    /// A client has asked for it.
    Command,
}

impl Waiting {
    /// A VM that boots `until` then at the latest, and whose boot has not begun.
    fn new(why: Why, until: Instant, links_down: Vec<String>) -> Self {
        Self { why, until, booting: None, links_down, before: None }
    }

    /// The name of the VM's state in the API.
    pub(super) fn state(&self) -> &'static str {
        match self.why {
            Why::Again => "restarting",
            Why::Start | Why::Command => "booting",
        }
    }
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

    /// Returns when the VM boots again; that is past if it does so now. `None` if it does not boot again.
    pub fn next_boot(&self) -> Option<Instant> {
        let again = self.waiting.as_ref().filter(|waiting| waiting.why == Why::Again);
        again.map(|waiting| waiting.until)
    }

    /// Whether a command boots the VM.
    pub fn boots_by_command(&self) -> bool {
        self.waiting.as_ref().is_some_and(|waiting| waiting.why == Why::Command)
    }

    /// Returns the end of the boot that a command asked for, if it has ended. `None` as well if the VM was ended
    /// meanwhile.
    pub fn end_of_boot(&mut self) -> Option<Result<Done, GuestError>> {
        match (self.failed_boot.take(), self.is_live()) {
            (Some(error), _) => Some(Err(error)),
            (None, true) => Some(Ok(Done::AsAsked)),
            (None, false) => None,
        }
    }

    /// Whether the VM has no process that the host waits for, and boots neither now nor later.
    pub fn is_at_rest(&self) -> bool {
        !self.is_live() && self.waiting.is_none() && self.is_let_go()
    }

    /// Returns when to call [`boot_if_due`](Self::boot_if_due), unless [`booting`](Self::booting) is readable before.
    pub fn boot_due(&self) -> Option<Instant> {
        let waiting = self.waiting.as_ref()?;
        match &waiting.booting {
            Some(booting) => Some(booting.deadline()),
            // The end of its last process wakes the host.
            None => (self.is_gone() || self.boots_in_vain()).then_some(waiting.until),
        }
    }

    /// Whether a command boots the VM, and a process of its past does not end.
    fn boots_in_vain(&self) -> bool {
        self.boots_by_command() && self.check_none_lingers().is_err()
    }

    /// What becomes readable when the boot that has begun can go on.
    pub fn booting(&self) -> Option<BorrowedFd<'_>> {
        Some(self.waiting.as_ref()?.booting.as_ref()?.as_fd())
    }

    /// The ID of the VM's process, also of one in which the VM boots.
    pub fn pid(&self) -> Option<Pid> {
        match (&self.life, &self.waiting) {
            (Life::Live(live), _) => Some(live.process.pid()),
            (_, Some(Waiting { booting: Some(booting), .. })) => Some(booting.process().pid()),
            _ => None,
        }
    }

    /// The segments of RAM of a VM that has a process.
    pub(super) fn segments(&self) -> &[Segment] {
        match (&self.life, &self.waiting) {
            (Life::Live(live), _) => &live.segments,
            (_, Some(Waiting { booting: Some(booting), .. })) => booting.segments(),
            _ => &[],
        }
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
            Event::Link { .. } | Event::Resized { .. } | Event::Booted { .. } => None,
        });
        // After an end that an operator asked for, no policy boots it.
        live.stopping.is_none() && end.flatten().is_some_and(|end| self.restarts.wants(end))
    }

    /// Lets the VM, which did not go along with a live update because it was about to boot again, do so.
    pub fn boot_soon(&mut self) {
        self.waiting = Some(Waiting::new(Why::Again, Instant::now(), Vec::new()));
    }

    /// Lets the VM boot that this host has withheld since its start.
    pub fn boot_at_start(&mut self) {
        self.waiting = Some(Waiting::new(Why::Start, Instant::now(), Vec::new()));
    }

    /// Whether the VM boots because the host has started.
    pub fn boots_at_start(&self) -> bool {
        self.waiting.as_ref().is_some_and(|waiting| waiting.why == Why::Start)
    }

    /// Begins to boot the VM, because the host has started. [`boot_if_due`](Self::boot_if_due) goes on with that.
    pub fn begin_to_boot(&mut self, ram: RamSource<'_>) -> Result<(), GuestError> {
        self.waiting = Some(self.begun(Why::Start, ram)?);
        Ok(())
    }

    /// Begins to boot the VM, because a client has asked for it. Errors unless the VM is stopped or failed. If the boot
    /// fails now or later, the VM is as before, so it boots again if it was to; [`end_of_boot`](Self::end_of_boot) says why.
    pub fn boot_by_command(&mut self, ram: RamSource<'_>) -> Result<(), GuestError> {
        self.check_free()?;
        self.check_can_boot()?;
        self.check_none_lingers()?;
        self.failed_boot = None;
        // One that boots again does so now.
        let mut before = self.waiting.take().map(Box::new);
        if let Some(booting) = before.as_mut().and_then(|before| before.booting.take()) {
            self.end_booting(booting);
        }
        match self.begun(Why::Command, ram) {
            Ok(begun) => {
                let links_down = before.as_ref().map(|before| before.links_down.clone());
                let links_down = links_down.unwrap_or_default();
                self.waiting = Some(Waiting { links_down, before, ..begun });
                Ok(())
            }
            Err(error) => {
                self.waiting = before.map(|before| *before);
                Err(error)
            }
        }
    }

    /// Begins to boot the VM, if no process of its past is left.
    fn begun(&mut self, why: Why, ram: RamSource<'_>) -> Result<Waiting, GuestError> {
        self.check_can_boot()?;
        let booting = match self.is_gone() {
            true => Some(Box::new(self.begin_boot(ram)?)),
            false => None,
        };
        self.restarts.boots(true);
        Ok(Waiting { booting, ..Waiting::new(why, Instant::now(), Vec::new()) })
    }

    /// Does not boot the VM, now or later. Ends the process in which it boots, if there is one.
    pub fn end_boot(&mut self) {
        if let Some(Waiting { booting: Some(booting), .. }) = self.waiting.take() {
            self.end_booting(booting);
        }
    }

    fn end_booting(&mut self, booting: Box<Booting>) {
        self.let_end(booting, |booting| booting.process());
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

    /// Begins to boot the VM again if its time has come, or goes on with that. Waits for nothing.
    pub fn boot_if_due(&mut self, ram: RamSource<'_>) {
        let Some(mut waiting) = self.waiting.take() else { return };
        let gone_live = match &mut waiting.booting {
            Some(booting) => booting.go_on(&self.machine),
            None if waiting.why == Why::Command && !self.is_gone() => {
                self.check_none_lingers().map(|()| false)
            }
            None if waiting.until > Instant::now() || !self.is_gone() => Ok(false),
            None => {
                if waiting.why == Why::Again {
                    self.restarts.boots(false);
                }
                self.begin_boot(ram).map(|booting| {
                    waiting.booting = Some(Box::new(booting));
                    false
                })
            }
        };
        match (gone_live, waiting) {
            (Ok(true), Waiting { booting: Some(booting), links_down, .. }) => {
                self.goes_live(booting.into_live());
                self.take_down(&links_down);
            }
            (Ok(_), waiting) => self.waiting = Some(waiting),
            (Err(error), Waiting { why, booting, links_down, before, .. }) => {
                // Its process keeps files that the next attempt needs.
                booting.into_iter().for_each(|booting| self.end_booting(booting));
                if why == Why::Command {
                    self.failed_boot = Some(error);
                    self.waiting = before.map(|before| *before);
                    return;
                }
                let why = chain(&error);
                tracing::error!("VM `{}`: {}", self.machine.name, why.join(": "));
                self.ends(End::Failure, Life::Failed(why), links_down);
            }
        }
    }

    /// Handles the end of the VM, whose life is `life` from now on unless it boots again at once.
    pub(super) fn ends(&mut self, end: End, life: Life, links_down: Vec<String>) {
        self.end_with(life);
        match self.restarts.ends(end, Instant::now()) {
            Next::Stay => {}
            Next::GiveUp(why) => self.fail(vec![why]),
            Next::Boot(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    tracing::info!("VM `{}` boots again in {left:?}", self.machine.name);
                }
                self.waiting = Some(Waiting::new(Why::Again, until, links_down));
            }
        }
    }
}
