//! Powers the guest off when its power button is pressed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use rustix::system::{RebootCommand, reboot};

use crate::console::Console;

/// Size of a `struct input_event` on x86_64.
const EVENT: usize = 24;
/// `EV_KEY`, and `KEY_POWER` (Linux include/uapi/linux/input-event-codes.h).
const KEY: u16 = 1;
const POWER: u16 = 116;

/// Starts the thread that waits for the button. It says `button` when it listens, and once more when the
/// button is pressed.
pub(crate) fn start(console: &Arc<Console>) {
    let console = Arc::clone(console);
    thread::spawn(move || {
        if let Err(error) = obey(&console) {
            console.note("problem", &format!("power button: {error}"));
        }
    });
}

fn obey(console: &Console) -> io::Result<()> {
    // The button is the only input device.
    let devices = fs::read_dir("/dev/input")?.flatten().map(|entry| entry.path());
    let event = |path: &std::path::PathBuf| path.to_string_lossy().contains("/event");
    let path = devices.into_iter().find(event).ok_or(io::ErrorKind::NotFound)?;
    let mut device = File::open(path)?;
    console.note("button", "it is waited for");
    loop {
        let mut bytes = [0; EVENT];
        device.read_exact(&mut bytes)?;
        let [.., kind_low, kind_high, code_low, code_high, value, _, _, _] = bytes;
        let kind = u16::from_le_bytes([kind_low, kind_high]);
        let code = u16::from_le_bytes([code_low, code_high]);
        if (kind, code, value) == (KEY, POWER, 1) {
            console.note("button", "it was pressed");
            reboot(RebootCommand::PowerOff)?;
        }
    }
}
