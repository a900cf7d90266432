//! A VM of an update that was undone, whose process was asked to resume the guest and has not answered.
//!
//! If the process ends before it has read the request, the guest has not run since its state was saved, so it can be
//! restored. The link proves that only for the last request, so nothing is proved once the host asks for anything else.

use super::conversation::Conversation;
use super::entry::VmEntry;
use super::guest::Live;
use super::held::Held;

/// What the VM can be restored from.
#[derive(Debug)]
pub struct Resuming {
    held: Held,
    entry: VmEntry,
    /// The number of requests to the process, the last of which is to resume the guest.
    requests: u64,
}

impl Resuming {
    /// The process was asked to resume the guest just now.
    pub fn of(process: &Conversation, held: Held, entry: VmEntry) -> Self {
        Self { held, entry, requests: process.requests() }
    }

    /// Whether the process may still end without having read the request.
    fn goes_on(&self, process: &Conversation) -> bool {
        process.owes() && process.requests() == self.requests
    }
}

impl Live {
    /// Forgets what the VM could be restored from, when its process has answered.
    pub(super) fn note_resumed(&mut self) {
        let process = &self.process;
        self.resuming.take_if(|resuming| !resuming.goes_on(process));
    }

    /// Returns what the VM is to be restored from, if its process has ended and the guest has not run since its state was
    /// saved.
    pub fn take_unresumed(&mut self) -> Option<(Held, VmEntry)> {
        let process = &self.process;
        let unread = |resuming: &mut Box<Resuming>| {
            resuming.goes_on(process) && process.has_left_last_unread()
        };
        self.resuming.take_if(unread).map(|resuming| (resuming.held, resuming.entry))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::HostSection;
    use crate::guests::answers::readable;
    use crate::guests::confinement::Confinement;
    use crate::guests::entry::tests::sample;
    use crate::guests::process::VmProcess;
    use crate::link::{Channel, Envelope, FromVm, Reply, Request};

    /// A VM whose process was asked to resume its guest, and the process's end of the link.
    fn resuming() -> (Live, Channel) {
        let (process, link) = VmProcess::idle(&Confinement::new(&HostSection::default()));
        link.receive::<Envelope>().unwrap();
        link.send(&FromVm::Reply(Reply::Confined { missing: Vec::new() }), &[]).unwrap();
        process.confined(process.reply().unwrap()).unwrap();
        let mut live = Live::without_ram(process);
        live.process.notify(Request::Resume).unwrap();
        let name = luo::SessionName::new("perennial-vm-one").unwrap();
        let held = Held::copies(name, Vec::new(), std::iter::empty()).unwrap();
        live.resuming = Some(Box::new(Resuming::of(&live.process, held, sample())));
        (live, link)
    }

    /// Ends the process. Returns when the link has been closed: a process that another test starts just now may have a copy
    /// for a moment.
    fn ends(live: &Live, link: Channel) {
        drop(link);
        readable(&[live.process.as_fd()], Instant::now() + Duration::from_secs(600));
    }

    #[test]
    fn a_process_that_ends_before_it_has_read_anything_leaves_a_vm_that_can_be_restored() {
        let (mut live, _link) = resuming();
        live.note_resumed();
        assert!(live.take_unresumed().is_none(), "it may still resume the guest");
        // Whatever notices the end first.
        let notice: [fn(&Live); 3] = [
            |live| drop(live.process.events().unwrap_err()),
            |live| assert_eq!(live.process.last_words(), None),
            |live| drop(live.process.notify(Request::Sync).unwrap_err()),
        ];
        for notice in notice {
            let (mut live, link) = resuming();
            ends(&live, link);
            notice(&live);
            live.note_resumed();
            let (_, entry) = live.take_unresumed().unwrap();
            assert_eq!(entry.machine.name, sample().machine.name);
            assert!(live.take_unresumed().is_none());
        }
    }

    #[test]
    fn a_guest_that_may_have_run_is_not_restored() {
        // It has read the request.
        let (mut live, link) = resuming();
        link.receive::<Envelope>().unwrap();
        ends(&live, link);
        assert!(live.process.events().is_err());
        assert!(live.take_unresumed().is_none());
        // It has read the request perhaps, and not the next one.
        let (mut live, link) = resuming();
        live.process.notify(Request::Sync).unwrap();
        ends(&live, link);
        assert!(live.process.events().is_err() && live.process.has_left_last_unread());
        assert!(live.take_unresumed().is_none());
        // It has resumed the guest.
        let (mut live, link) = resuming();
        link.receive::<Envelope>().unwrap();
        link.send(&FromVm::Reply(Reply::Resumed { first_entry_ticks: 1 }), &[]).unwrap();
        live.process.events().unwrap();
        live.note_resumed();
        assert!(live.resuming.is_none());
    }
}
