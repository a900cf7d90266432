//! The console: writes whole lines, from one thread at a time.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::Mutex;

use perennial_tests::mutex::lock;
use perennial_tests::workload::heartbeat::{NOTE_MARKER, sealed};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, tcdrain, tcgetattr, tcsetattr};

/// `/dev/console`.
pub(crate) struct Console(Mutex<Option<File>>);

impl Console {
    /// Opens the console. If that fails, the guest works without output.
    pub(crate) fn open() -> Self {
        let file = OpenOptions::new().write(true).open("/dev/console").ok();
        if let Some(file) = &file
            && let Ok(mut modes) = tcgetattr(file)
        {
            // Disables the echo of orders, which would mix with heartbeats, and carriage returns,
            // because each byte causes a VM exit.
            modes.local_modes.remove(LocalModes::ECHO);
            modes.output_modes.remove(OutputModes::OPOST);
            let _ = tcsetattr(file, OptionalActions::Now, &modes);
        }
        Self(Mutex::new(file))
    }

    /// Writes one line, which ends in a newline, and waits until it is sent. Otherwise lines could
    /// queue up, and their times would be old when they arrive. On a slow host, the vCPU that handles
    /// the serial port's interrupts would do nothing else while lines are queued.
    pub(crate) fn write(&self, line: &str) {
        let mut file = lock(&self.0);
        if let Some(file) = file.as_mut() {
            // A failure could be reported only on the console itself.
            let _ = file.write_all(line.as_bytes());
            let _ = tcdrain(file);
        }
    }

    /// Writes a note of a kind, with a text.
    pub(crate) fn note(&self, kind: &str, text: &str) {
        self.note_json(&serde_json::json!({ "note": kind, "text": text }));
    }

    /// Writes a note: an object whose member `note` is its kind.
    pub(crate) fn note_json(&self, note: &serde_json::Value) {
        self.write(&sealed(NOTE_MARKER, &note.to_string()));
    }
}

/// Lines that arrive on the console.
pub(crate) fn lines() -> Option<impl Iterator<Item = String>> {
    let file = File::open("/dev/console").ok()?;
    Some(BufReader::new(file).lines().map_while(Result::ok))
}
