//! Waits for the processes of several VMs at the same time, so that one that hangs delays no other.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use super::conversation::{Conversation, ProcessError};
use crate::link::Reply;

/// Time until the next attempt after poll(2) has failed, for example for lack of memory.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Waits until `deadline` for something to read from one of `fds`, or for its end. Returns the indices of those
/// that are readable then.
pub fn readable(fds: &[BorrowedFd<'_>], deadline: Instant) -> Vec<usize> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut polled: Vec<_> =
            fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) => {
                let polled = polled.iter().enumerate();
                let ready = polled.filter(|(_, fd)| !fd.revents().is_empty());
                return ready.map(|(index, _)| index).collect();
            }
            Err(Errno::INTR) => {}
            Err(_) if left.is_zero() => return Vec::new(),
            Err(_) => thread::sleep(RETRY_PAUSE.min(left)),
        }
    }
}

/// Waits until `deadline` for the answers of all of `conversations` at the same time, each of which awaits one.
/// Calls `answered` with the index and the answer of each when it comes, and stops waiting at the first error
/// that this returns. Returns the indices of those that have not answered by then.
pub fn collect<E>(
    conversations: &[&Conversation],
    deadline: Instant,
    mut answered: impl FnMut(usize, Result<Reply, ProcessError>) -> Result<(), E>,
) -> Result<Vec<usize>, E> {
    let mut waiting: Vec<usize> = (0..conversations.len()).collect();
    let mut failed = None;
    while failed.is_none() && !waiting.is_empty() {
        // A process that only sends events does not keep the host waiting.
        let is_last = Instant::now() >= deadline;
        let fds: Vec<_> = waiting.iter().map(|index| conversations[*index].as_fd()).collect();
        let ready: Vec<usize> =
            readable(&fds, deadline).into_iter().map(|ready| waiting[ready]).collect();
        for index in ready {
            let Some(answer) = conversations[index].take_answer() else { continue };
            waiting.retain(|waits| *waits != index);
            if let Err(error) = answered(index, answer) {
                failed = Some(error);
                break;
            }
        }
        if is_last {
            break;
        }
    }
    waiting.iter().for_each(|index| conversations[*index].stop_waiting());
    failed.map_or(Ok(waiting), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Channel, FromVm, Request};

    const LONG: Duration = Duration::from_secs(600);

    /// Three processes that were asked to sync, and the other ends of their links.
    fn asked() -> (Vec<Conversation>, Vec<Channel>) {
        let pairs = (0..3).map(|_| Channel::pair().unwrap());
        let (hosts, vms): (Vec<_>, Vec<_>) = pairs.unzip();
        let hosts: Vec<_> = hosts.into_iter().map(Conversation::new).collect();
        hosts.iter().for_each(|host| host.send(Request::Sync, &[]).unwrap());
        (hosts, vms)
    }

    fn answers(vm: &Channel) {
        vm.send(&FromVm::Reply(Reply::Synced), &[]).unwrap();
    }

    #[test]
    fn one_that_is_silent_keeps_no_other_answer_back_and_costs_the_deadline_once() {
        let (hosts, vms) = asked();
        let hosts: Vec<_> = hosts.iter().collect();
        answers(&vms[2]);
        answers(&vms[1]);
        let mut heard = Vec::new();
        let late = collect(&hosts, Instant::now(), |index, reply| {
            heard.push((index, reply.unwrap()));
            Ok::<_, ()>(())
        });
        assert_eq!(late, Ok(vec![0]));
        assert_eq!(heard, [(1, Reply::Synced), (2, Reply::Synced)]);
        // It owes the answer, and is no offender when that comes at last.
        answers(&vms[0]);
        assert_eq!(hosts[0].events().unwrap(), []);
    }

    #[test]
    fn after_an_error_nobody_is_waited_for() {
        let (hosts, vms) = asked();
        let hosts: Vec<_> = hosts.iter().collect();
        drop(vms);
        let result = collect(&hosts, Instant::now() + LONG, |index, reply| {
            reply.unwrap_err();
            Err(index)
        });
        assert_eq!(result, Err(0));
        assert!(hosts[1..].iter().all(|host| !host.awaits()));
    }
}
