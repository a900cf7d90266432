//! The console: whole lines out, one writer at a time.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Mutex, PoisonError};

use perennial_tests::workload::heartbeat::{NOTE_MARKER, sealed};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, tcdrain, tcgetattr, tcsetattr};

/// `/dev/console`.
pub(crate) struct Console(Mutex<Option<File>>);

impl Console {
    /// Opens the console. Without one the guest works on, unheard.
    pub(crate) fn open() -> Self {
        let file = OpenOptions::new().write(true).open("/dev/console").ok();
        if let Some(file) = &file
            && let Ok(mut modes) = tcgetattr(file)
        {
            // No echo of orders into the heartbeats, no carriage returns: each byte costs an exit.
            modes.local_modes.remove(LocalModes::ECHO);
            modes.output_modes.remove(OutputModes::OPOST);
            let _ = tcsetattr(file, OptionalActions::Now, &modes);
        }
        Self(Mutex::new(file))
    }

    /// Writes one line, which ends in a newline, and waits until it is out. Lines that queue up would say
    /// late what time it was; and while there is a queue, the vCPU that the serial port interrupts does
    /// nothing else on a host that is slow.
    pub(crate) fn write(&self, line: &str) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_mut() {
            // Nobody could be told of a failure but the console itself.
            let _ = file.write_all(line.as_bytes());
            let _ = tcdrain(file);
        }
    }

    /// Says something of a kind once.
    pub(crate) fn note(&self, kind: &str, text: &str) {
        self.note_json(&serde_json::json!({ "note": kind, "text": text }));
    }

    /// Says something once, as an object whose `note` is its kind.
    pub(crate) fn note_json(&self, note: &serde_json::Value) {
        self.write(&sealed(NOTE_MARKER, &note.to_string()));
    }
}

/// Lines that arrive on the console.
pub(crate) fn lines() -> Option<impl Iterator<Item = String>> {
    let file = File::open("/dev/console").ok()?;
    Some(BufReader::new(file).lines().map_while(Result::ok))
}
