//! The host's main loop: the API's clients, the VMs' processes, and the signals.

mod callers;
mod calls;
mod processes;
mod signals;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::defects::{self, guard};
use super::service_stop::{AGAIN_AFTER, Attempts};
use super::stop::after;
use super::{Host, HostError, service};
use crate::api::{Line, Status, Transaction};
use crate::config::HostSection;
use crate::guests::Life;
use crate::live_update::rehearsal::Rehearsal;
use crate::live_update::{Observer, breakpoint, next_host};
use callers::Caller;
use calls::Calls;
use signals::{Meaning, Signals};

/// Time until the host waits again after poll(2) has failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Signals, callers, and what they wait for.
pub(super) struct Server {
    signals: Signals,
    /// The user at the terminal, who has left when the other end of this is closed.
    left: Option<UnixStream>,
    calls: Calls,
    /// When the host tries again to leave to systemd, after it could not. Until then its VMs run.
    leaves_again: Option<Instant>,
    /// The attempts so far.
    attempts: Attempts,
    /// Whether the last wait failed.
    cannot_wait: bool,
}

/// What the loop waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Left,
    Listener,
    Caller(Caller),
    Vm(usize),
    /// A VM that boots again.
    Booting,
    /// A VM of the last host that is late.
    Late,
    /// A command for a VM whose last part is done elsewhere.
    Errand,
    /// A process of a VM's past has ended.
    Ended,
    /// The VM of a rehearsal.
    Rehearsal,
    /// Whether systemd answers, before the host leaves to it.
    Probe,
}

impl Server {
    /// Installs the signal handlers, and takes the signals that have come before. To be called before the first child and
    /// the first thread are started. `end` are the signals that end the host. No other signal does, except those that
    /// nobody can catch.
    pub(super) fn new(end: &[i32]) -> Result<Self, HostError> {
        let signals = Signals::catch(end).map_err(HostError::Loop)?;
        // One that comes during a handover is not read from its pipe before the exec.
        next_host::heed(end).map_err(HostError::Loop)?;
        // Those that came while the last program handed over to this one.
        crate::signals::take().map_err(HostError::Loop)?;
        let calls = Calls::default();
        let attempts = Attempts::default();
        Ok(Self { signals, left: None, calls, leaves_again: None, attempts, cannot_wait: false })
    }

    /// Ends the host when the other end of `left` is closed: the user at the terminal has left.
    pub(super) fn end_with(&mut self, left: UnixStream) {
        self.left = Some(left);
    }

    /// Opens the socket and the control port of the configuration.
    pub(super) fn listen(&mut self, section: &HostSection) -> Result<(), HostError> {
        self.calls.callers.listen(section)
    }

    /// Serves until `power-off`, SIGTERM or SIGINT, and then until all VMs have ended.
    pub(super) fn run(&mut self, host: &mut Host) -> Result<(), HostError> {
        let status = host.status();
        let summary = summary(&status);
        tracing::info!("ready: {summary}");
        service::ready(&summary);
        self.calls.callers.tell(Caller::Port, &Line::ready(&status));
        defects::say_each_place_once();
        while !self.round(host) {}
        Ok(())
    }

    /// Waits once, and serves what is ready. Returns whether the host has ended.
    fn round(&mut self, host: &mut Host) -> bool {
        guard(|| host.keep_disks());
        guard(|| self.calls.callers.listen_again());
        let ready = guard(|| self.ready(host)).unwrap_or_else(|| self.all(host));
        for source in ready {
            guard(|| self.handle(source, host));
        }
        for vm in &mut host.vms {
            guard(|| vm.note_ends());
        }
        if !self.calls.host_ends() {
            guard(|| host.go_on_with_late());
            host.boot_due();
        }
        guard(|| go_on_with_restores(host));
        self.leaves_again.take_if(|at| *at <= Instant::now());
        guard(|| self.calls.leaves.into_iter().for_each(|latest| host.hasten_stops(latest)));
        self.calls.go_on(host);
        guard(|| self.leave_if_due(host));
        if guard(|| self.calls.host_has_ended(host) || host.has_nothing_left()) == Some(true) {
            return true;
        }
        guard(|| self.calls.sweep());
        if defects::happened() {
            guard(|| host.feed_watchdog());
            thread::sleep(RETRY_PAUSE);
        }
        false
    }

    /// Waits until at least one source is ready. Returns the sources that are ready.
    fn ready(&mut self, host: &Host) -> Vec<Source> {
        breakpoint::reach("wait", None);
        match self.wait(host) {
            Ok(ready) => {
                self.cannot_wait = false;
                ready
            }
            // What poll(2) failed for, such as memory, may come back. The host must not end for it, because
            // its VMs would end too.
            Err(errno) => {
                if !std::mem::replace(&mut self.cannot_wait, true) {
                    tracing::error!("the host cannot wait for its clients and VMs: {errno}");
                }
                thread::sleep(RETRY_PAUSE);
                Vec::new()
            }
        }
    }

    /// Returns the sources that can be looked at without waiting, if a defect keeps the host from finding out which are
    /// ready.
    fn all(&self, host: &Host) -> Vec<Source> {
        let callers = || self.calls.callers.fds().map(|(caller, _)| caller).collect();
        let callers: Vec<Caller> = guard(callers).unwrap_or_default();
        let vms = (0..host.vms.len()).map(Source::Vm);
        let callers = callers.into_iter().map(Source::Caller);
        [Source::Signals, Source::Listener].into_iter().chain(vms).chain(callers).collect()
    }

    fn wait(&self, host: &Host) -> rustix::io::Result<Vec<Source>> {
        let (sources, mut fds): (Vec<_>, Vec<_>) = self.fds(host).into_iter().unzip();
        let timeout = self.timeout(host).and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let polled = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        let mut ready: Vec<Source> = polled.map(|(source, _)| source).collect();
        let vms = (0..host.vms.len()).filter(|index| has_events(&host.vms[*index].life));
        let unpolled = vms.map(Source::Vm).chain(self.calls.callers.unpolled().map(Source::Caller));
        for source in unpolled {
            if !ready.contains(&source) {
                ready.push(source);
            }
        }
        Ok(ready)
    }

    /// Returns what the loop waits for.
    fn fds<'a>(&'a self, host: &'a Host) -> Vec<(Source, PollFd<'a>)> {
        let readable = |fd: BorrowedFd<'a>| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let Self { signals, left, calls, .. } = self;
        let mut fds = vec![(Source::Signals, readable(signals.as_fd()))];
        fds.extend(left.iter().map(|left| (Source::Left, readable(left.as_fd()))));
        fds.extend(calls.listener().map(|listener| (Source::Listener, readable(listener))));
        fds.extend(calls.callers.fds().map(|(caller, fd)| (Source::Caller(caller), fd)));
        fds.extend(host.vms.iter().enumerate().filter_map(|(index, vm)| match &vm.life {
            Life::Live(live) => Some((Source::Vm(index), readable(live.process.as_fd()))),
            _ => None,
        }));
        let booting = host.vms.iter().filter_map(|vm| vm.booting());
        fds.extend(booting.map(|fd| (Source::Booting, readable(fd))));
        let rehearsal = host.rehearsal.iter().flat_map(Rehearsal::fds);
        fds.extend(rehearsal.map(|fd| (Source::Rehearsal, readable(fd))));
        let ends = host.vms.iter().flat_map(|vm| vm.ending_fds());
        fds.extend(ends.map(|fd| (Source::Ended, readable(fd))));
        let errands = host.vms.iter().filter_map(|vm| vm.errand_fd());
        fds.extend(errands.chain(host.restores.fds()).map(|fd| (Source::Errand, readable(fd))));
        fds.extend(host.late.iter().map(|late| (Source::Late, readable(late.as_fd()))));
        // Only while it is waited for: it stays readable until the host leaves.
        let probe = self.leaves_again.and_then(|_| self.attempts.probe());
        fds.extend(probe.map(|fd| (Source::Probe, readable(fd))));
        fds
    }

    /// Returns how long to wait at most. `None`: until a source is ready.
    fn timeout(&self, host: &Host) -> Option<Duration> {
        let heard = host.vms.iter().any(|vm| has_events(&vm.life)).then_some(Duration::ZERO);
        let boot = host.next_boot().filter(|_| !self.calls.host_ends());
        let rehearsal = host.rehearsal.as_ref().map(Rehearsal::deadline);
        let replies = self.calls.deadline(host);
        let errands = host.errands_due();
        let due = [
            host.stop_deadline(),
            replies,
            boot,
            host.late_until(),
            rehearsal,
            errands,
            self.leaves_again,
            host.kept_disks.due(),
        ];
        let due = due.into_iter().flatten().min();
        let due = due.map(|at| at.saturating_duration_since(Instant::now()));
        [heard, due, self.calls.callers.timeout()].into_iter().flatten().min()
    }

    fn handle(&mut self, source: Source, host: &mut Host) {
        match source {
            Source::Signals => {
                let meanings = self.signals.take();
                meanings.into_iter().for_each(|meaning| self.obey(meaning, host));
            }
            Source::Left => {
                tracing::info!("stopping: the user has left");
                self.calls.end_host(host, 0);
            }
            Source::Listener => self.calls.accept(),
            Source::Caller(caller) => self.calls.serve(caller, host),
            Source::Vm(index) => processes::handle_events(host, index),
            Source::Probe => self.leaves_again = None,
            // After all others, in each round.
            Source::Booting | Source::Late | Source::Errand | Source::Ended | Source::Rehearsal => {
            }
        }
    }

    fn obey(&mut self, signal: Meaning, host: &mut Host) {
        match signal {
            Meaning::Child => processes::reap(host),
            Meaning::End => self.end(host),
            Meaning::Ignored => {
                tracing::warn!(
                    "got a signal that does nothing here: SIGTERM ends the host and its VMs"
                );
            }
        }
    }

    /// Handles SIGTERM or SIGINT: leaves the VMs to systemd, or asks all guests to shut down. A second signal
    /// pulls the plug at once.
    fn end(&mut self, host: &mut Host) {
        let (is_first, is_in_store) = (self.calls.leaves.is_none(), host.is_in_fd_store());
        let within_s = match is_first && (is_in_store || !self.calls.host_ends()) {
            true => host.config.host.stop_within_s(),
            false => 0,
        };
        if is_in_store {
            if !is_first {
                self.attempts.hurry();
                self.leaves_again = None;
            }
            tracing::info!("got SIGTERM or SIGINT: the VMs are left to systemd");
            // The next host would not know that an operator has asked the guests of some to shut down, by `stop` or
            // `power-off`. So these VMs end before.
            self.calls.leaves = Some(after(within_s));
        } else {
            tracing::info!("got SIGTERM or SIGINT: all VMs are stopped within {within_s} s");
            self.calls.end_host(host, within_s);
        }
    }

    /// Leaves the VMs to systemd, if the host is to, and no VM keeps it from that.
    fn leave_if_due(&mut self, host: &mut Host) {
        let is_to_leave = self.calls.leaves.is_some() && self.leaves_again.is_none();
        if is_to_leave && !self.calls.host_ends() && host.none_is_ending() {
            self.leave(host);
        }
    }

    /// Leaves the VMs to systemd, now or later. Those that cannot be left there are asked to shut down.
    fn leave(&mut self, host: &mut Host) {
        // Also after an attempt that a defect has ended.
        self.leaves_again = Some(Instant::now() + AGAIN_AFTER);
        let Self { calls, attempts, .. } = self;
        let pause = host.waits_to_leave(attempts).or_else(|| {
            // Before the attempt: this process ends with it.
            calls.give_up(host);
            let leave = |observer: Observer<'_>| host.leave_to_service(attempts, observer);
            calls.observed(Caller::Port, Transaction::ServiceStop, leave)
        });
        let within_s = host.config.host.stop_within_s();
        self.calls.leaves = Some(after(within_s) + pause.unwrap_or_default());
        self.leaves_again = pause.map(|pause| Instant::now() + pause);
        if pause.is_none() {
            self.calls.end_host(host, within_s);
        }
    }
}

fn go_on_with_restores(host: &mut Host) {
    let asks_programs = host.restores.asks_programs();
    host.go_on_with_restores();
    if asks_programs && !host.restores.asks_programs() {
        // Orphans wait since then.
        processes::reap(host);
    }
}

/// Whether the process of a VM has events that are to be handled without waiting.
fn has_events(life: &Life) -> bool {
    matches!(life, Life::Live(live) if live.process.has_events())
}

fn summary(status: &Status) -> String {
    let vms: Vec<String> =
        status.vms.iter().map(|vm| format!("{} {}", vm.name, vm.state)).collect();
    let vms = if vms.is_empty() { "no VMs".to_owned() } else { vms.join(", ") };
    format!("kernel {}, LUO {}, boot {}, {vms}", status.kernel, status.luo, status.boot)
}
