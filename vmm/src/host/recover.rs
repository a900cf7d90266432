//! The ways back of a VM that this program cannot restore: another attempt, a process of the program that an earlier
//! host ran, and a handover of the whole host to that program.
//!
//! Everything that can be known is found out before a VM is touched: the program is whole, it starts, and it decodes
//! what it is needed for. If it then fails, the VM is preserved as before.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use super::arrival::Destiny;
use super::restores::Begun;
use super::{Host, HostError, index_of};
use crate::api::{Answer, HandoverCall, Line};
use crate::causes::chain;
use crate::guests::elsewhere::Elsewhere;
use crate::guests::held::Held;
use crate::guests::{Guest, GuestError, Life};
use crate::link::PROTOCOL;
use crate::live_update::manifest::STATE_TOKEN;
use crate::live_update::next_host::{ANSWER_WITHIN, NextHost};
use crate::live_update::programs::ProgramError;
use crate::live_update::{Observer, Outcome};
use crate::machine::VmName;

/// What has begun for a VM that was to be restored, or why nothing has.
pub(super) type BegunOrNot = Result<Begun, HostError>;
/// Documents that a program is to decode, each with its name for an error text.
type Documents = Vec<(String, OwnedFd)>;

/// The restores that clients wait for. `C` tells which client a reply is for.
pub(super) struct Recoveries<C> {
    waiting: Vec<Recovery<C>>,
}

struct Recovery<C> {
    request: (C, u64),
    wanted: Wanted,
    /// The VMs whose restore goes on.
    names: Vec<VmName>,
    recovered: Vec<VmName>,
    /// VMs of which nothing was left, so that they boot.
    boots: Vec<VmName>,
    failed: Vec<HostError>,
}

/// What a client has asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// `restore`: one VM, and whether it may go on without the hints that it knows.
    Restore(VmName, bool),
    /// `recover`: another attempt for one VM, or for all.
    Recover(Option<VmName>),
    /// `recover --with previous`: one VM.
    WithPrevious(VmName),
}

impl<C> Default for Recoveries<C> {
    fn default() -> Self {
        Self { waiting: Vec::new() }
    }
}

impl<C: Copy + PartialEq> Recoveries<C> {
    /// Whether `client` waits for a reply.
    pub(super) fn is_waiting(&self, client: C) -> bool {
        self.waiting.iter().any(|recovery| recovery.request.0 == client)
    }

    /// Begins to restore VMs. The reply comes from [`round`](Self::round).
    pub(super) fn begin(
        &mut self,
        host: &mut Host,
        request: (C, u64),
        wanted: Wanted,
    ) -> Result<(), HostError> {
        let (names, recovered, boots, failed) = Default::default();
        let mut recovery = Recovery { request, wanted, names, recovered, boots, failed };
        match recovery.wanted.clone() {
            Wanted::Restore(vm, force) => {
                let begun = host.begin_restore(&vm, force)?;
                recovery.begins(vm, begun);
            }
            Wanted::Recover(Some(vm)) => {
                let begun = host.begin_restore(&vm, false)?;
                recovery.begins(vm, begun);
            }
            Wanted::Recover(None) => {
                for (vm, begun) in host.begin_to_recover_all()? {
                    match begun {
                        Ok(begun) => recovery.begins(vm, begun),
                        Err(error) => recovery.failed.push(error),
                    }
                }
            }
            Wanted::WithPrevious(vm) => {
                host.begin_with_previous(&vm)?;
                recovery.begins(vm, Begun::Restore);
            }
        }
        self.waiting.push(recovery);
        Ok(())
    }

    /// Returns the replies to the requests whose VMs are restored or are not.
    pub(super) fn round(&mut self, host: &mut Host) -> Vec<(C, Line)> {
        let mut replies = Vec::new();
        for mut recovery in std::mem::take(&mut self.waiting) {
            recovery.go_on(host);
            match recovery.names.is_empty() {
                true => replies.push(recovery.reply()),
                false => self.waiting.push(recovery),
            }
        }
        replies
    }
}

impl<C> Recovery<C> {
    fn begins(&mut self, vm: VmName, begun: Begun) {
        match begun {
            Begun::Restore => self.names.push(vm),
            Begun::Boot => self.boots.push(vm),
        }
    }

    /// Notes the restores that have ended.
    fn go_on(&mut self, host: &mut Host) {
        self.names.retain(|name| match host.end_of_restore(name) {
            None => true,
            Some(Ok(())) => {
                self.recovered.push(name.clone());
                false
            }
            Some(Err(error)) => {
                self.failed.push(error);
                false
            }
        });
    }

    fn reply(self) -> (C, Line) {
        let Self { request: (client, id), wanted, recovered, boots, mut failed, .. } = self;
        let error = match &wanted {
            Wanted::Recover(None) if !failed.is_empty() => {
                Some(not_recovered(recovered.clone(), &failed))
            }
            _ => failed.pop(),
        };
        let line = match (error, wanted) {
            (Some(error), _) => error.reply(id),
            (None, Wanted::Restore(..)) if boots.is_empty() => Line::ok(id, &Answer::Done {}),
            (None, _) => Line::ok(id, &Answer::Recovered { recovered, boots }),
        };
        (client, line)
    }
}

impl Host {
    /// Begins to restore all preserved VMs, after another look if VMs are withheld. Returns what has begun for each, or why
    /// nothing has.
    pub(super) fn begin_to_recover_all(&mut self) -> Result<Vec<(VmName, BegunOrNot)>, HostError> {
        let withheld = self.vms.iter().filter(|vm| vm.is_withheld());
        let withheld: Vec<_> = withheld.map(|vm| vm.machine.name.clone()).collect();
        self.reach_again()?;
        self.look_again()?;
        if let Err(error) = self.find_orphans() {
            // Perhaps about some VMs only: each one that is still withheld says so below.
            tracing::error!("{}", chain(&error).join(": "));
        }
        let mut found = withheld;
        let awaited = self.restores.awaited.iter().filter(|name| !found.contains(name));
        let awaited: Vec<_> = awaited.cloned().collect();
        found.extend(awaited);
        self.begin_awaited();
        let preserved = self.preserved().map(|(vm, _)| vm.machine.name.clone());
        let preserved: Vec<_> = preserved.collect();
        let mut all = Vec::new();
        for name in found {
            if !preserved.contains(&name) {
                let begun = self.found_late(&name);
                all.push((name, begun));
            }
        }
        for name in preserved {
            let begun = self.begin_restore(&name, false);
            all.push((name, begun));
        }
        Ok(all)
    }

    /// Begins to restore a preserved VM by a process of an earlier host's program, which this host serves.
    fn begin_with_previous(&mut self, name: &VmName) -> Result<(), HostError> {
        self.check_free(name)?;
        if let Err(error) = self.settle(Destiny::Stay) {
            tracing::warn!("{}", chain(&error).join(": "));
        }
        self.read_manifests();
        let vm = &self.vms[index_of(&self.vms, name)?];
        let state = vm.state();
        let Life::Preserved { held, entry, why } = &vm.life else {
            let remedy = "only a preserved VM can be recovered";
            return Err(GuestError::WrongState { name: name.clone(), state, remedy }.into());
        };
        if entry.is_none() {
            return Err(HostError::NoEntry { vm: name.clone(), why: why.join(": ") });
        }
        let look = self.previous(state_of(name, held)?, speaks_this_protocol)?;
        let what = format!("looking for a program of an earlier host for VM `{name}`");
        let look = Elsewhere::begin("programs", what, look).map_err(HostError::NoCopy)?;
        self.begin_look(name, look);
        Ok(())
    }

    /// Hands over the whole host to an earlier host's program. Returns only if that did not take place.
    pub(super) fn hand_back(&mut self, observer: Observer<'_>) -> Result<Infallible, HostError> {
        let previous = |host: &Self| {
            let mut documents = host.unread_manifests()?;
            for (vm, held) in host.preserved() {
                documents.extend(state_of(&vm.machine.name, held)?);
            }
            let next = host.previous(documents, |_| Ok(()))?()?;
            // The way back is for VMs, whatever else it costs.
            Ok((next, Vec::new()))
        };
        self.hand_over_to(previous, HandoverCall::default(), observer)
    }

    fn preserved(&self) -> impl Iterator<Item = (&Guest, &Held)> {
        self.vms.iter().filter_map(|vm| match &vm.life {
            Life::Preserved { held, .. } => Some((vm, held)),
            _ => None,
        })
    }

    /// Returns the manifests of preserved VMs that this program cannot read.
    fn unread_manifests(&self) -> Result<Documents, HostError> {
        let fds = self.carried.manifests.iter().filter_map(|unread| unread.fd.as_ref());
        let copies =
            fds.map(|fd| Ok(("a manifest of an earlier host".to_owned(), fd.try_clone()?)));
        copies.collect::<Result<_, _>>().map_err(HostError::NoCopy)
    }

    /// Returns how to find the newest program of an earlier host that is whole, starts, decodes `documents` and passes
    /// `check`. That takes up to [`ANSWER_WITHIN`].
    ///
    /// All programs are examined at the same time and have one deadline.
    fn previous(
        &self,
        documents: Documents,
        check: fn(&NextHost) -> Result<(), String>,
    ) -> Result<impl FnOnce() -> Result<NextHost, HostError> + Send + use<>, HostError> {
        if self.carried.programs.is_empty() {
            return Err(HostError::NoProgram);
        }
        let programs = self.carried.programs.iter().rev();
        let copies: Vec<_> = programs.map(|p| (p.describe(), p.executable())).collect();
        Ok(move || {
            let documents: Vec<_> =
                documents.iter().map(|(n, fd)| (n.clone(), fd.as_fd())).collect();
            let deadline = Some(Instant::now() + ANSWER_WITHIN);
            let examine = |what: &str, copy: Result<File, ProgramError>| {
                let copy = copy.map_err(|error| chain(&error).join(": "))?;
                let next = NextHost::of(copy, what.into(), deadline).and_then(|mut next| {
                    if !documents.is_empty() {
                        next.rehearse(&documents)?;
                    }
                    Ok(next)
                });
                let next = next.map_err(|error| chain(&error).join(": "))?;
                check(&next).map(|()| next.chosen())
            };
            let mut unfit = Vec::new();
            for (what, next) in at_the_same_time(copies, examine) {
                match next {
                    Ok(next) => return Ok(next),
                    Err(why) => unfit.push(format!("{what}: {why}")),
                }
            }
            Err(HostError::NoFitProgram { why: unfit.join("; ") })
        })
    }
}

/// The error of a recovery of all VMs that `failed` for some of them.
fn not_recovered(recovered: Vec<VmName>, failed: &[HostError]) -> HostError {
    let why: Vec<_> = failed.iter().map(|error| chain(error).join(": ")).collect();
    let outcomes = failed.iter().filter_map(HostError::outcome);
    let outcome = outcomes.fold(Outcome::Preserved, Ord::max);
    HostError::NotRecovered { recovered, why: why.join("; "), outcome }
}

/// Errors if the processes of the program's VMs cannot be served by this host.
fn speaks_this_protocol(next: &NextHost) -> Result<(), String> {
    match next.link_protocol() {
        Ok(Some(PROTOCOL)) => Ok(()),
        Ok(other) => {
            let other = other.map_or("none that it can name".to_owned(), |n| n.to_string());
            Err(format!(
                "its VM processes speak another protocol with their host ({other}) than this host ({PROTOCOL}): \
                 `recover --with previous` without a VM hands over the whole host to it"
            ))
        }
        Err(error) => Err(chain(&error).join(": ")),
    }
}

/// Examines each copy of a program on a thread of its own. Returns what came of each, in their order.
fn at_the_same_time<C: Send, N: Send>(
    copies: Vec<(String, C)>,
    examine: impl Fn(&str, C) -> Result<N, String> + Sync,
) -> Vec<(String, Result<N, String>)> {
    let examine = &examine;
    thread::scope(|scope| {
        let begin = |(what, copy): (String, C)| {
            let name = what.clone();
            let thread = thread::Builder::new().name("program".to_owned());
            (what, thread.spawn_scoped(scope, move || examine(&name, copy)))
        };
        let threads: Vec<_> = copies.into_iter().map(begin).collect();
        let examined = threads.into_iter().map(|(what, thread)| {
            let examined = thread.map_err(|error| format!("cannot start a thread: {error}"));
            let ended = |thread: ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err("its thread panicked".to_owned()))
            };
            (what, examined.and_then(ended))
        });
        examined.collect()
    })
}

/// Returns the state document of a preserved VM.
fn state_of(name: &VmName, held: &Held) -> Result<Documents, HostError> {
    let not_held = |source| HostError::NotHeld { what: held.name().to_string(), source };
    let state = held.file(STATE_TOKEN).map_err(not_held)?;
    Ok(vec![(format!("the state document of VM `{name}`"), state)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_that_loses_a_vm_says_so_and_what_to_do() {
        let name = |name| VmName::new(name).unwrap();
        let why = || "why".to_owned();
        let preserved = || GuestError::StillPreserved { name: name("kept"), why: why() }.into();
        let lost = GuestError::Lost { name: name("gone"), why: why() }.into();
        let error = not_recovered(Vec::new(), &[preserved()]);
        assert_eq!(error.outcome(), Some(Outcome::Preserved));
        let error = not_recovered(vec![name("runs")], &[lost, preserved()]);
        assert_eq!(error.outcome(), Some(Outcome::Lost));
        let said = error.to_string();
        assert!(said.contains("VM `gone` was not restored, and is lost: why. `boot` "), "{said}");
    }
}
