//! The settings of the terminal: raw while a guest has it, restored afterwards.
//!
//! Whoever made the [`Settings`] drops them at the end, also when it unwinds. From then on the terminal
//! cannot be made raw again, so that a thread which still runs does no harm.

use std::sync::{Arc, Mutex};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::mutex::lock;

/// The settings of standard input, if it is a terminal. Dropped: the terminal is as it was before.
#[derive(Debug)]
pub(super) struct Settings(Arc<Mutex<Option<Termios>>>);

/// Makes the terminal raw and cooked again, until the [`Settings`] are dropped.
#[derive(Debug, Clone)]
pub(super) struct Switch(Arc<Mutex<Option<Termios>>>);

impl Settings {
    /// Remembers the present settings.
    pub(super) fn remember() -> Self {
        let found = isatty(stdin()).then(|| tcgetattr(stdin()).ok()).flatten();
        Self(Arc::new(Mutex::new(found)))
    }

    pub(super) fn switch(&self) -> Switch {
        Switch(self.0.clone())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        restore(lock(&self.0).take().as_ref());
    }
}

impl Switch {
    /// Whether standard input is a terminal.
    pub(super) fn is_terminal(&self) -> bool {
        lock(&self.0).is_some()
    }

    /// Every key goes to the reader at once and unchanged. Output is still processed, so that messages of
    /// this program begin at the left; a guest's own carriage returns do no harm.
    pub(super) fn make_raw(&self) {
        if let Some(before) = &*lock(&self.0) {
            let mut raw = before.clone();
            raw.make_raw();
            raw.output_modes = before.output_modes;
            let _ = tcsetattr(stdin(), OptionalActions::Now, &raw);
        }
    }

    /// Restores the remembered settings for a while.
    pub(super) fn make_cooked(&self) {
        restore(lock(&self.0).as_ref());
    }
}

fn restore(before: Option<&Termios>) {
    if let Some(before) = before {
        // Not after the output has drained: a terminal that is stopped never drains.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}
