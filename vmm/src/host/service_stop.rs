//! The stop of the host by systemd: the VMs go into the fd store.
//!
//! systemd stops the host in any case, so this keeps what can be kept:
//!
//! ```text
//!   a thread is stuck -----------> the VMs run on, and the host tries again, until a second SIGTERM comes, or, when the
//!                                  machine's run ends, for some time
//!   systemd does not answer -----> the VMs run on, and the host tries again, until `power-off` or systemd ends it
//!   no room in the store --------> the programs of earlier hosts go, then the VM that found no room
//!   a VM cannot be saved --------> that VM ends, the others are tried again without it
//!   anything else ---------------> the VMs run on, and the host tries again, a few times
//! ```

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::arrival::Destiny;
use super::instance::Instance;
use super::{Host, service};
use crate::causes::chain;
use crate::guests::elsewhere::Elsewhere;
use crate::guests::{Guest, Life};
use crate::live_update::leaving::Kept;
use crate::live_update::outgoing::{self, Destination, Plan, Undone};
use crate::live_update::programs::Program;
use crate::live_update::{Observer, Progress, Step, UpdateError, process_end};
use crate::machine::VmName;

/// How long the host waits, the first time, for the work of its threads.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// Time until the host tries again.
pub(super) const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How often it tries, unless it is systemd that does not answer.
const MOST_ATTEMPTS: u32 = 5;
/// How long the host waits for a thread that is stuck, if systemd ends the machine's run. If only this service is to stop,
/// it waits until the thread ends, because the guests run meanwhile.
const LAST_WAIT: Duration = Duration::from_secs(600);

/// The attempts to leave to systemd so far.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    /// How many failed by no fault of systemd.
    failed: u32,
    /// What keeps this process from ending, and since when. `None` if nothing does.
    unended: Option<(Instant, Vec<String>)>,
    /// Whether somebody wants the host to leave although something does.
    is_hurried: bool,
    /// Whether the host leaves although something does.
    leaves_anyway: bool,
    /// Finds out whether systemd answers, before the next attempt.
    probe: Option<Elsewhere<Result<(), luo::Error>>>,
}

impl Attempts {
    /// Waits no more for what keeps this process from ending.
    pub(super) fn hurry(&mut self) {
        self.is_hurried = true;
    }

    /// What becomes readable when it is known whether systemd answers, if that is being found out.
    pub(super) fn probe(&self) -> Option<BorrowedFd<'_>> {
        self.probe.as_ref().map(Elsewhere::as_fd)
    }

    /// Whether no attempt is made now, because this process would not end. Says so in the log, and as the status of the
    /// service.
    fn wait(&mut self) -> bool {
        let within = match self.unended {
            None => FIRST_WAIT,
            Some(_) => Duration::ZERO,
        };
        let work = process_end::unended(within);
        if work.is_empty() {
            self.unended = None;
            return false;
        }
        let (since, told) = self.unended.get_or_insert_with(|| (Instant::now(), Vec::new()));
        if *told != work {
            let error = UpdateError::Unended { work: work.clone() };
            tracing::error!("{error}. The VMs run on until then");
            service::stopping(&format!("the VMs run: this host is still {}", work.join(" and ")));
            *told = work;
        }
        self.leaves_anyway = self.is_hurried || is_over(since.elapsed(), service::is_ending);
        if self.leaves_anyway {
            tracing::error!(
                "the VMs go into the fd store all the same: they stand still until that has ended, or systemd does not wait \
                 for the end of this process any longer"
            );
        }
        !self.leaves_anyway
    }
}

/// Whether the host has `waited` long enough for what keeps it from ending. `is_ending`: whether systemd ends the machine's
/// run, if it tells.
fn is_over(waited: Duration, is_ending: impl FnOnce() -> Option<bool>) -> bool {
    waited >= LAST_WAIT && is_ending() == Some(true)
}

fn say_unanswered(error: &dyn Error) {
    tracing::error!(
        "{}. systemd does not answer: the VMs run on, and the host tries again after {} s. `perennial ctl power-off` shuts \
         them down instead",
        chain(error).join(": "),
        AGAIN_AFTER.as_secs()
    );
}

impl Host {
    /// Returns the time until the next attempt to leave to systemd, if this process would not end now, or systemd does not
    /// answer, or has not answered yet ([`Attempts::probe`]). The VMs run on until then, and nothing is tried with them.
    pub(super) fn waits_to_leave(&self, attempts: &mut Attempts) -> Option<Duration> {
        let luo = self.luo.as_ref().ok().filter(|_| self.is_in_fd_store())?;
        service::extend_timeout();
        let probe = match attempts.probe.take() {
            None if attempts.wait() => return Some(AGAIN_AFTER),
            // Without a thread, the attempt finds out by itself.
            None => {
                let ask = luo.probe()?;
                Elsewhere::begin("probe", "waiting for systemd".to_owned(), ask).ok()?
            }
            Some(probe) => probe,
        };
        match probe.take() {
            None => {
                attempts.probe = Some(probe);
                Some(AGAIN_AFTER)
            }
            Some(Ok(Err(error))) if error.is_unanswered() => {
                say_unanswered(&error);
                Some(AGAIN_AFTER)
            }
            // The attempt has the same error, if it is one.
            Some(_) => None,
        }
    }

    /// Puts the VMs into the fd store and ends the process. Returns only without an fd store, or if no VM can be put
    /// there now. `None`: the VMs end with this host. A time: they run on until the next attempt, after that time.
    pub(super) fn leave_to_service(
        &mut self,
        attempts: &mut Attempts,
        observer: Observer<'_>,
    ) -> Option<Duration> {
        if !self.is_in_fd_store() {
            return None;
        }
        // A service that an operator stops may stay so, and then nobody feeds the watchdog. Before a kexec it runs on.
        self.kept_disks.release_all();
        let watchdog = self.watchdog.take_if(|_| service::is_ending() == Some(false));
        let had_one = watchdog.is_some();
        drop(watchdog);
        let left = self.try_to_leave(attempts, observer);
        if had_one {
            self.feed_watchdog();
        }
        left
    }

    fn try_to_leave(
        &mut self,
        attempts: &mut Attempts,
        observer: Observer<'_>,
    ) -> Option<Duration> {
        service::stopping("putting the VMs into the fd store");
        service::look_again(self.next.as_mut());
        self.finish_the_rest();
        if let Err(error) = self.settle(Destiny::NextKernel) {
            tracing::error!("{}", chain(&error).join(": "));
        }
        if self.leave_unseen() {
            return None;
        }
        self.forget_left_out();
        let told = |progress: Progress<'_>| {
            // Not in the blackout, because systemd may not read the message.
            if progress.vm.is_none() && progress.step <= Step::Pause {
                service::extend_timeout();
            }
            observer(progress);
        };
        let mut keeps_programs = true;
        loop {
            let Ok(luo) = &self.luo else { return None };
            let lock = self.instance.as_ref().map(Instance::lock);
            let destination = Destination::Service { lock, waits: !attempts.leaves_anyway };
            let plan = Plan { keeps_programs, ..self.plan(destination, &told) };
            let left = outgoing::run(luo.as_ref(), &self.vms, &self.unfinished, &plan);
            let Undone { error, kept: Kept { saved, resuming } } = match left {
                Ok(never) => match never {},
                Err(undone) => *undone,
            };
            let why = chain(&error);
            tracing::error!("{}", why.join(": "));
            self.put_back();
            // They go along as they are.
            let kept: Vec<VmName> = saved.iter().map(|vm| vm.entry.machine.name.clone()).collect();
            saved.into_iter().for_each(|vm| self.keep(vm));
            self.note_resuming(resuming);
            if error.is_unanswered() || error.is_unended() {
                if error.is_unanswered() {
                    say_unanswered(&error);
                }
                self.run_again(&kept);
                return Some(AGAIN_AFTER);
            }
            if error.is_full() && self.give_up_programs(keeps_programs) {
                keeps_programs = false;
                continue;
            }
            // A shortage is not the VM's fault, and may pass.
            let is_last = attempts.failed + 1 >= MOST_ATTEMPTS;
            let named = match error.is_shortage() && !is_last {
                true => Vec::new(),
                false => error.vms().into_iter().cloned().collect::<Vec<VmName>>(),
            };
            if self.fail(&named, &why)
                || error.is_full() && self.give_up_held(&named, &why)
                || !kept.is_empty()
            {
                continue;
            }
            attempts.failed += 1;
            if attempts.failed < MOST_ATTEMPTS {
                let seconds = AGAIN_AFTER.as_secs();
                tracing::error!("the VMs run on, and the host tries again after {seconds} s");
                return Some(AGAIN_AFTER);
            }
            self.say_that_all_end();
            self.leave_in_store();
            return None;
        }
    }

    /// Restores VMs whose process ended in an attempt that was undone, so that they run until the next one.
    fn run_again(&mut self, kept: &[VmName]) {
        kept.iter().for_each(|name| self.restore_when_gone(name));
    }

    /// Gives up the programs of hosts, so that there is room for VMs. Returns whether there was any, or `has_own`: this
    /// host's would have gone along.
    fn give_up_programs(&mut self, has_own: bool) -> bool {
        let programs = std::mem::take(&mut self.carried.programs);
        let any = has_own || !programs.is_empty();
        if any {
            tracing::warn!(
                "the fd store is full: no program of a host goes along, so that VMs can"
            );
        }
        programs.into_iter().for_each(Program::give_up);
        any
    }

    /// Gives up a preserved VM for which there is no room, or sessions of which nobody knows what they are, so that VMs
    /// can be kept. Returns whether there is one.
    fn give_up_held(&mut self, named: &[VmName], why: &[String]) -> bool {
        let is_lost = |vm: &&mut Guest| {
            named.contains(&vm.machine.name) && matches!(vm.life, Life::Preserved { .. })
        };
        if let Some(vm) = self.vms.iter_mut().find(is_lost) {
            let name = &vm.machine.name;
            tracing::error!(
                "VM `{name}`, which is preserved, is lost, so that the others can be kept"
            );
            vm.life = Life::Failed(why.to_vec());
            return true;
        }
        let unknown = match named.is_empty() {
            true => std::mem::take(&mut self.carried.sessions),
            false => Vec::new(),
        };
        for session in &unknown {
            tracing::error!("session `{}` is lost, so that VMs can be kept", session.name());
        }
        !unknown.is_empty()
    }

    fn say_that_all_end(&self) {
        let running = self.vms.iter().filter(|vm| vm.is_live());
        let names: Vec<_> = running.map(|vm| vm.machine.name.as_str()).collect();
        tracing::error!(
            "no VM can be kept: `{}` end, and only what is in the fd store already stays",
            names.join("`, `")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_stuck_is_waited_for_without_a_limit_unless_the_machines_run_ends() {
        let (long, short) = (LAST_WAIT, LAST_WAIT - Duration::from_secs(1));
        assert!(is_over(long, || Some(true)));
        assert!(!is_over(long * 100, || Some(false)), "the guests run meanwhile");
        assert!(!is_over(long * 100, || None), "what is not known is no reason to pause them");
        assert!(!is_over(short, || panic!("systemd is not asked yet")));
    }
}
