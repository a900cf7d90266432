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
use super::{Host, HostError, index_of};
use crate::api::HandoverCall;
use crate::causes::chain;
use crate::guests::held::Held;
use crate::guests::{Guest, GuestError, Life};
use crate::link::PROTOCOL;
use crate::live_update::Observer;
use crate::live_update::manifest::STATE_TOKEN;
use crate::live_update::next_host::{ANSWER_WITHIN, NextHost, NextProgram};
use crate::live_update::programs::ProgramError;
use crate::machine::VmName;

/// Documents that a program is to decode, each with its name for an error text.
type Documents = Vec<(String, OwnedFd)>;

impl Host {
    /// Tries again to restore one preserved VM, or all. Returns those that were restored.
    pub(super) fn recover(&mut self, vm: Option<VmName>) -> Result<Vec<VmName>, HostError> {
        if let Some(vm) = vm {
            self.restore(&vm, false)?;
            return Ok(vec![vm]);
        }
        self.reach_again()?;
        self.look_again()?;
        let (mut recovered, mut failed) = (Vec::new(), Vec::new());
        for name in self.preserved().map(|(vm, _)| vm.machine.name.clone()).collect::<Vec<_>>() {
            match self.restore(&name, false) {
                Ok(()) => recovered.push(name),
                Err(error) => failed.push(chain(&error).join(": ")),
            }
        }
        match failed.is_empty() {
            true => Ok(recovered),
            false => Err(HostError::NotRecovered { recovered, why: failed.join("; ") }),
        }
    }

    /// Restores a preserved VM by a process of an earlier host's program, which this host serves.
    pub(super) fn recover_with_previous(&mut self, name: &VmName) -> Result<(), HostError> {
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
        let program = self.previous(&state_of(name, held)?, |next| match next.link_protocol() {
            Ok(Some(PROTOCOL)) => Ok(()),
            Ok(other) => {
                let other = other.map_or("none that it can name".to_owned(), |n| n.to_string());
                Err(format!(
                    "its VM processes speak another protocol with their host ({other}) than this host ({PROTOCOL}): \
                     `recover --with previous` without a VM hands over the whole host to it"
                ))
            }
            Err(error) => Err(chain(&error).join(": ")),
        })?;
        self.restore_with(name, false, Some(&program))
    }

    /// Hands over the whole host to an earlier host's program. Returns only if that did not take place.
    pub(super) fn hand_back(&mut self, observer: Observer<'_>) -> Result<Infallible, HostError> {
        let previous = |host: &Self| {
            let mut documents = host.unread_manifests()?;
            for (vm, held) in host.preserved() {
                documents.extend(state_of(&vm.machine.name, held)?);
            }
            host.previous(&documents, |_| Ok(())).map(NextProgram::Opened)
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

    /// Returns the newest program of an earlier host that is whole, starts, decodes `documents` and passes `check`.
    ///
    /// All programs are examined at the same time and have one deadline, because the host serves nobody meanwhile.
    fn previous(
        &self,
        documents: &Documents,
        check: impl Fn(&NextHost) -> Result<(), String> + Sync,
    ) -> Result<NextHost, HostError> {
        if self.carried.programs.is_empty() {
            return Err(HostError::NoProgram);
        }
        let documents: Vec<_> = documents.iter().map(|(n, fd)| (n.clone(), fd.as_fd())).collect();
        let programs = self.carried.programs.iter().rev();
        let copies: Vec<_> = programs.map(|p| (p.describe(), p.executable())).collect();
        let deadline = Some(Instant::now() + ANSWER_WITHIN);
        let examine = |what: &str, copy: Result<File, ProgramError>| {
            let copy = copy.map_err(|error| chain(&error).join(": "))?;
            let next = NextHost::of(copy, what.into(), deadline).and_then(|next| {
                if !documents.is_empty() {
                    next.rehearse(&documents)?;
                }
                Ok(next)
            });
            let next = next.map_err(|error| chain(&error).join(": "))?;
            check(&next).map(|()| next.chosen())
        };
        let examined = at_the_same_time(copies, examine);
        let mut unfit = Vec::new();
        for (what, next) in examined {
            match next {
                Ok(next) => return Ok(next),
                Err(why) => unfit.push(format!("{what}: {why}")),
            }
        }
        Err(HostError::NoFitProgram { why: unfit.join("; ") })
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
