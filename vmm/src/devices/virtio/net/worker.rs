//! The part of the device that moves frames: one worker, hence one thread, for each pair of queues.
//!
//! ```text
//!   worker of pair n   queues 2n and 2n + 1, queue n of the tap
//!   worker of pair 0   also the last queue (control with MQ), and the announcements
//! ```
//!
//! Without MQ the control queue is queue 2, which the worker of pair 1 serves if there is one.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::receive::Receiver;
use super::{F_MQ, Shared, announce, control};
use crate::devices::alarm::Alarm;
use crate::devices::virtio::{Rings, VirtioWorker};

/// How often the device looks whether a tap is still there whose end the kernel does not report.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Moves the frames of one pair of queues.
#[derive(Debug)]
pub struct NetWorker {
    pub(super) shared: Arc<Shared>,
    /// The number of the pair.
    pub(super) pair: usize,
    pub(super) receiver: Receiver,
    /// Whether an invalid frame of the guest was already reported.
    pub(super) reported: bool,
    /// Goes off when the guest is to be announced again, or the tap to be looked at. Only pair 0 has one.
    alarm: Option<Alarm>,
}

impl NetWorker {
    pub(super) fn new(shared: Arc<Shared>, pair: usize) -> Self {
        let alarm = (pair == 0).then(Alarm::new).and_then(|alarm| {
            let failed = |error: &std::io::Error| {
                tracing::error!("tap {}: it announces its guest only once: {error}", shared.name);
            };
            alarm.inspect_err(failed).ok()
        });
        if let Some(alarm) = alarm.as_ref().filter(|_| shared.taps[pair].ends_silently()) {
            alarm.set(Some(LOOK_EVERY));
        }
        Self { shared, pair, receiver: Receiver::default(), reported: false, alarm }
    }

    fn announce(&self, rings: &Rings) {
        let next = announce::send_next(&self.shared, rings);
        let look = self.shared.taps[self.pair].ends_silently().then_some(LOOK_EVERY);
        if let Some(alarm) = &self.alarm {
            alarm.set(next.into_iter().chain(look).min());
        }
    }

    /// Looks whether the tap is still there, if the kernel does not report its end.
    fn look_at_tap(&self, rings: &Rings) {
        let tap = &self.shared.taps[self.pair];
        if tap.ends_silently()
            && let Err(error) = tap.check()
        {
            self.shared.tap_failed(self.pair, "look for", &error, rings);
        }
    }
}

impl VirtioWorker for NetWorker {
    fn serves(&self, queue: usize) -> bool {
        let is_last = queue == 2 * self.shared.taps.len();
        queue / 2 == self.pair || (is_last && self.pair == 0)
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let tap = self.shared.taps[self.pair].as_fd();
        std::iter::once(tap).chain(self.alarm.as_ref().map(AsFd::as_fd)).collect()
    }

    fn on_doorbell(&mut self, queue: usize, rings: &Rings) {
        if self.pair == 0 && self.shared.driver().announcements == announce::ROUNDS {
            self.announce(rings);
        }
        // Without MQ the control queue follows the first pair (5.1.2).
        let control = match self.shared.features() & F_MQ {
            0 => 2,
            _ => 2 * self.shared.taps.len(),
        };
        if queue == control {
            rings.serve(queue, |chain| control::execute(&self.shared, rings.memory(), chain));
        } else if queue / 2 != self.pair {
            // The last queue of a device whose driver has no MQ: no such driver uses it.
        } else if queue.is_multiple_of(2) {
            self.receive(rings);
        } else {
            self.transmit(rings);
        }
    }

    fn on_source(&mut self, source: usize, rings: &Rings) {
        match source {
            0 => self.receive(rings),
            // Also while the device is paused: the announcement takes nothing of the guest.
            _ if self.alarm.as_ref().is_some_and(Alarm::has_gone_off) => {
                self.look_at_tap(rings);
                self.announce(rings);
            }
            _ => {}
        }
    }

    /// Linux wakes the readers of a tap that is deleted while they can still read nothing from it without an error,
    /// and only once (`tun_detach_all` in drivers/net/tun.c). What epoll reports is an error already then.
    fn on_source_error(&mut self, source: usize, rings: &Rings) {
        if source == 0
            && let Some(error) = self.shared.taps[self.pair].reported_error()
        {
            self.shared.tap_failed(self.pair, "wait for", &error, rings);
        }
    }
}
