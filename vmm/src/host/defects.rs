//! Defects of the host itself. A panic in one part of the main loop must not end the host, and with it all VMs, nor keep the
//! host from the other parts: they are served in the same round, also if the panic comes again in each round.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::causes::panic_message;
use crate::mutex::lock;

/// Most messages of panics that are said. A defect that comes again in each round must not fill the log.
const MOST: usize = 100;

/// The messages that were said.
static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// Whether there was a panic since the last call of [`happened`].
static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Carries out one part of the main loop. `None`, and an error in the log, if it panics.
pub(super) fn guard<T>(part: impl FnOnce() -> T) -> Option<T> {
    let done = catch_unwind(AssertUnwindSafe(part));
    let note = |panic: Box<dyn std::any::Any + Send>| {
        HAPPENED.store(true, Ordering::Relaxed);
        let what = panic_message(&*panic);
        if is_new(&what) {
            tracing::error!("this host has a defect, please report it: {what}");
        }
    };
    done.map_err(note).ok()
}

/// Whether a part has panicked since the last call.
pub(super) fn happened() -> bool {
    HAPPENED.swap(false, Ordering::Relaxed)
}

/// Lets Rust say where a panic was only once for each place and message.
pub(super) fn say_each_place_once() {
    let usual = take_hook();
    set_hook(Box::new(move |panic| {
        if is_new(&panic.to_string()) {
            usual(panic);
        }
    }));
}

fn is_new(what: &str) -> bool {
    let mut said = lock(&SAID);
    said.len() < MOST && said.insert(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_costs_its_own_part_and_is_said_once() {
        assert_eq!(guard(|| 1), Some(1));
        for _ in 0..2 {
            assert_eq!(guard(|| panic!("a part of the loop")), None::<()>);
            assert!(happened());
        }
        assert!(!happened());
        assert!(!is_new("a part of the loop"));
    }
}
