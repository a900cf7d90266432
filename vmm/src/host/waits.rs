//! Requests whose answers the processes of VMs have to give: the state of their disks for `status`, and resizes of
//! disks. A process or the storage of a disk may hang, so the main loop does not wait for them: it serves all else,
//! and looks after each round at what was answered and what is late.

use std::time::{Duration, Instant};

use super::{Host, HostError, find};
use crate::api::{Answer, Line};
use crate::guests::conversation::ProcessError;
use crate::guests::{GuestError, Life};
use crate::machine::VmName;

/// Most requests of one client that wait.
const MOST_WAITING: usize = 64;
/// How long a client waits for a resize.
const RESIZE_WITHIN: Duration = Duration::from_secs(10);

/// The requests that wait. `C` tells which client a reply is for.
pub(super) struct Waits<C> {
    statuses: Vec<(C, u64)>,
    resizes: Vec<Resize<C>>,
}

/// A resize that was asked of a VM's process.
struct Resize<C> {
    request: (C, u64),
    vm: VmName,
    /// The node of the disk.
    device: String,
    deadline: Instant,
}

impl<C> Default for Waits<C> {
    fn default() -> Self {
        Self { statuses: Vec::new(), resizes: Vec::new() }
    }
}

impl<C: Copy + PartialEq> Waits<C> {
    /// Whether `client` waits for a reply.
    pub(super) fn is_waiting(&self, client: C) -> bool {
        let waits = |(whom, _): &(C, u64)| *whom == client;
        self.statuses.iter().any(waits) || self.resizes.iter().any(|resize| waits(&resize.request))
    }

    /// Errors if too many requests of `client` wait.
    fn check_room(&self, client: C) -> Result<(), HostError> {
        let requests =
            self.statuses.iter().chain(self.resizes.iter().map(|resize| &resize.request));
        match requests.filter(|(whom, _)| *whom == client).count() >= MOST_WAITING {
            true => Err(HostError::TooManyWait(MOST_WAITING)),
            false => Ok(()),
        }
    }

    /// Asks the VMs' processes for what a status needs. The reply comes from [`round`](Self::round), at the latest
    /// when the processes are late.
    pub(super) fn status(&mut self, host: &Host, request: (C, u64)) -> Result<(), HostError> {
        self.check_room(request.0)?;
        host.vms.iter().for_each(|vm| vm.ask_for_reports());
        self.statuses.push(request);
        Ok(())
    }

    /// Begins to resize a disk. The reply comes from [`round`](Self::round).
    pub(super) fn resize(
        &mut self,
        host: &mut Host,
        request: (C, u64),
        (vm, disk): (VmName, String),
        bytes: Option<u64>,
    ) -> Result<(), HostError> {
        self.check_room(request.0)?;
        let device = find(&mut host.vms, &vm)?.resize_disk(&disk, bytes)?;
        let deadline = Instant::now() + RESIZE_WITHIN;
        self.resizes.push(Resize { request, vm, device, deadline });
        Ok(())
    }

    /// Returns when the next reply is due, whether or not its processes have answered.
    pub(super) fn deadline(&self, host: &Host) -> Option<Instant> {
        let now = Instant::now();
        // A report that is overdue is not waited for.
        let due = host.vms.iter().filter_map(|vm| vm.reports_due()).filter(|due| *due > now);
        let statuses = if self.statuses.is_empty() { None } else { due.min().or(Some(now)) };
        let resizes = self.resizes.iter().map(|resize| resize.deadline);
        resizes.chain(statuses).min()
    }

    /// Returns the replies to the requests that are answered or late.
    pub(super) fn round(&mut self, host: &Host) -> Vec<(C, Line)> {
        let now = Instant::now();
        let mut replies = Vec::new();
        for vm in &host.vms {
            for (device, resized) in vm.resized() {
                let wanted = |r: &Resize<C>| r.vm == vm.machine.name && r.device == device;
                // The end of a resize that was late.
                let Some(index) = self.resizes.iter().position(wanted) else { continue };
                let Resize { request, vm, .. } = self.resizes.remove(index);
                replies.push(reply(request, vm, resized));
            }
        }
        self.resizes.retain(|resize| match resize.problem(host, now) {
            None => true,
            Some(error) => {
                let (client, id) = resize.request;
                replies.push((client, error.reply(id)));
                false
            }
        });
        if host.vms.iter().all(|vm| vm.reports_due().is_none_or(|due| due <= now))
            && !self.statuses.is_empty()
        {
            replies.extend(self.tell_statuses(host));
        }
        replies
    }

    /// Returns replies to all requests that are left, because the host leaves its VMs to another one.
    pub(super) fn end(&mut self, host: &Host) -> Vec<(C, Line)> {
        let resizes =
            self.resizes.drain(..).map(|Resize { request: (client, id), vm, device, .. }| {
                (client, HostError::ResizeLeft { vm, device }.reply(id))
            });
        let mut replies: Vec<_> = resizes.collect();
        replies.extend(self.tell_statuses(host));
        replies
    }

    /// Returns the replies to all who have asked for a status, of what is known now.
    fn tell_statuses(&mut self, host: &Host) -> impl Iterator<Item = (C, Line)> {
        let status = Box::new(host.status());
        let answer = move |(client, id)| (client, Line::ok(id, &Answer::Status(status.clone())));
        self.statuses.drain(..).map(answer)
    }
}

impl<C> Resize<C> {
    /// Returns why no answer is waited for any more, if so.
    fn problem(&self, host: &Host, now: Instant) -> Option<HostError> {
        let Self { vm, device, deadline, .. } = self;
        let guest = host.vms.iter().find(|guest| guest.machine.name == *vm);
        match guest.map(|guest| &guest.life) {
            Some(Life::Live(_)) if now < *deadline => None,
            Some(Life::Live(_)) => Some(HostError::ResizeLate {
                vm: vm.clone(),
                device: device.clone(),
                seconds: RESIZE_WITHIN.as_secs(),
            }),
            _ => Some(HostError::ResizeEnded { vm: vm.clone(), device: device.clone() }),
        }
    }
}

fn reply<C>((client, id): (C, u64), name: VmName, resized: Result<u64, Vec<String>>) -> (C, Line) {
    match resized {
        Ok(bytes) => (client, Line::ok(id, &Answer::Resized { bytes })),
        Err(why) => {
            let source = ProcessError::refused("resize a device", why);
            (client, HostError::from(GuestError::Process { name, source }).reply(id))
        }
    }
}
