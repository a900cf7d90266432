//! The work of threads that may hang in the kernel: on a server that is gone, on a disk that does not answer, or for
//! seconds on the RAM that they free. No signal ends such a thread, and exec(2) waits for every other thread of the
//! process, so a handover looks here before it pauses a guest, and again before its exec.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use crate::mutex::lock;

/// What is being done, each with a number of its own, in the order in which it was begun.
static GOES_ON: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());
/// Some work has ended.
static ENDED: Condvar = Condvar::new();

/// Work that goes on until this is dropped. To be created before the thread is, and dropped last in it.
#[derive(Debug)]
pub(crate) struct Work(u64);

impl Work {
    /// `what` continues the words "this host is still", for example "opening /srv/web.img".
    pub(crate) fn begins(what: String) -> Self {
        let mut goes_on = lock(&GOES_ON);
        let number = goes_on.last_key_value().map_or(0, |(last, _)| last + 1);
        goes_on.insert(number, what);
        Self(number)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        lock(&GOES_ON).remove(&self.0);
        ENDED.notify_all();
    }
}

/// Waits until no work goes on, for `within` at most. Returns what goes on then.
pub(crate) fn unended(within: Duration) -> Vec<String> {
    let goes_on = lock(&GOES_ON);
    let waited = ENDED.wait_timeout_while(goes_on, within, |goes_on| !goes_on.is_empty());
    let (goes_on, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
    goes_on.values().cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    // Other tests have work as well.
    fn goes_on(what: &str) -> bool {
        unended(Duration::ZERO).iter().any(|other| other == what)
    }

    #[test]
    fn work_goes_on_until_its_thread_has_done_it_and_whoever_waits_is_woken() {
        let (first, second) = (Work::begins("one".to_owned()), Work::begins("two".to_owned()));
        let (go, wait) = channel::<()>();
        let thread = thread::spawn(move || {
            let _second = second;
            let _ = wait.recv();
        });
        assert!(goes_on("one") && goes_on("two"));
        drop(first);
        assert!(!goes_on("one") && goes_on("two"));
        go.send(()).unwrap();
        thread.join().unwrap();
        assert!(!goes_on("two"));
        // Returns at all: nobody else's work is in the way for so long.
        assert!(!unended(Duration::from_secs(600)).contains(&"two".to_owned()));
    }
}
