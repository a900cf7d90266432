//! The clients of `events`, and what they are told: each change of a VM's state, and the progress of a live update
//! or a handover.
//!
//! Changes are found by comparison after each round of the main loop, so that no code that changes a VM has to tell
//! anybody. A client that does not read is dropped like every other one ([`Lines`](crate::api::Lines)).

use rustix::process::Pid;

use super::{Host, HostError};
use crate::api::{Event, now_ms};
use crate::guests::{Guest, Life};
use crate::machine::VmName;

/// Most clients that watch. There are more places for clients than this, so that those who watch cannot keep
/// others out.
const MOST_WATCHERS: usize = 16;

/// The clients that watch, and what they know. `C` tells which client it is.
pub(super) struct Watchers<C> {
    all: Vec<C>,
    known: Vec<Known>,
}

/// What the clients that watch know of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    vm: VmName,
    state: &'static str,
    pid: Option<Pid>,
    error: Option<Vec<String>>,
}

impl<C> Default for Watchers<C> {
    fn default() -> Self {
        Self { all: Vec::new(), known: Vec::new() }
    }
}

impl<C: Copy + PartialEq> Watchers<C> {
    /// Whether `client` watches.
    pub(super) fn has(&self, client: C) -> bool {
        self.all.contains(&client)
    }

    /// Adds a client. Returns what it is told at once: the state of each VM.
    pub(super) fn add(&mut self, client: C, host: &Host) -> Result<Vec<Event>, HostError> {
        if !self.has(client) {
            if self.all.len() >= MOST_WATCHERS {
                return Err(HostError::TooManyWatch(MOST_WATCHERS));
            }
            self.all.push(client);
        }
        if self.all.len() == 1 {
            self.known = host.vms.iter().map(Known::of).collect();
        }
        Ok(self.known.iter().map(Known::event).collect())
    }

    /// Returns all clients that watch.
    pub(super) fn all(&self) -> Vec<C> {
        self.all.clone()
    }

    /// Forgets the clients that are not there any more.
    pub(super) fn retain(&mut self, is_there: impl Fn(C) -> bool) {
        self.all.retain(|client| is_there(*client));
    }

    /// Returns the changes since the last call. Does nothing as long as nobody watches.
    pub(super) fn changes(&mut self, host: &Host) -> Vec<Event> {
        match self.all.is_empty() {
            true => Vec::new(),
            false => self.compare(host.vms.iter().map(Known::of).collect()),
        }
    }

    fn compare(&mut self, now: Vec<Known>) -> Vec<Event> {
        let changed = now.iter().filter(|vm| !self.known.contains(vm)).map(Known::event).collect();
        self.known = now;
        changed
    }
}

impl Known {
    fn of(vm: &Guest) -> Self {
        let (pid, error) = match &vm.life {
            Life::Live(live) => (Some(live.process.pid()), None),
            other => (None, other.why().map(<[_]>::to_vec)),
        };
        Self { vm: vm.machine.name.clone(), state: vm.state(), pid, error }
    }

    fn event(&self) -> Event {
        let Self { vm, state, pid, error } = self;
        Event::Vm {
            time_ms: now_ms(),
            vm: vm.clone(),
            state: (*state).to_owned(),
            pid: pid.map(|pid| pid.as_raw_nonzero().get()),
            error: error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str, state: &'static str, pid: i32) -> Known {
        Known { vm: VmName::new(name).unwrap(), state, pid: Pid::from_raw(pid), error: None }
    }

    #[test]
    fn a_change_of_state_and_a_new_process_are_told_once() {
        let mut watchers = Watchers { all: vec![1], known: Vec::new() };
        let told = |watchers: &mut Watchers<u8>, now: &[Known]| -> Vec<(String, String)> {
            let events = watchers.compare(now.to_vec());
            let told = events.into_iter().map(|event| match event {
                Event::Vm { vm, state, .. } => (vm.to_string(), state),
                other => panic!("{other:?}"),
            });
            told.collect()
        };
        let pair = |vm: &str, state: &str| (vm.to_owned(), state.to_owned());
        let (a, b) = (known("a", "running", 7), known("b", "stopped", 0));
        let all = [pair("a", "running"), pair("b", "stopped")];
        assert_eq!(told(&mut watchers, &[a.clone(), b.clone()]), all);
        assert_eq!(told(&mut watchers, &[a.clone(), b.clone()]), []);
        // A guest that resets gets another process.
        let reset = known("a", "running", 8);
        assert_eq!(told(&mut watchers, &[reset.clone(), b.clone()]), [pair("a", "running")]);
        let failed = Known { error: Some(vec!["why".to_owned()]), ..known("b", "failed", 0) };
        assert_eq!(told(&mut watchers, &[reset.clone(), failed.clone()]), [pair("b", "failed")]);
        let other = Known { error: Some(vec!["another".to_owned()]), ..failed };
        assert_eq!(told(&mut watchers, &[reset, other]), [pair("b", "failed")]);
    }
}
