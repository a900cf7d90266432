//! What a guest asks of its machine's power, and two ways in which it resets itself: the keyboard
//! controller's reset line and the reset control register. It powers itself off through
//! [`acpi`](super::acpi).
//!
//! None of these devices has state to save: each reports the guest's request to the machine at once.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::devices::pci::bus::OnReset;

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off.
    Shutdown,
    /// Reset the machine.
    Reset,
}

/// The machine's handler for a [`PowerEvent`]. Called on a vCPU's thread, possibly several times.
pub type OnPower = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// Presses a machine's power button, which asks its guest to shut down.
pub type PowerButton = Box<dyn Fn() + Send + Sync>;

/// First port of the keyboard controller, which [`KeyboardReset`] answers.
pub const KEYBOARD_BASE: u16 = 0x60;
/// Number of ports from there to the command port, 0x64.
pub const KEYBOARD_LEN: u16 = 5;
/// Offset of the command port (write) and status port (read).
const KEYBOARD_COMMAND: u64 = 4;
/// Command: pulse the reset line of the CPU.
const KEYBOARD_RESET_CPU: u8 = 0xfe;

/// Value for the ACPI reset register, port 0xcf9: reset, hard.
pub const RESET_VALUE: u8 = 0x06;
/// Reset control: the processor is reset when this bit is set.
const RESET_CPU: u8 = 1 << 2;

/// A keyboard controller without a keyboard: only the CPU reset command has an effect.
pub struct KeyboardReset(OnPower);

impl KeyboardReset {
    /// Reports to `on_power`.
    pub fn new(on_power: OnPower) -> Self {
        Self(on_power)
    }
}

impl BusDevice for KeyboardReset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // No key pressed, both buffers empty. Linux waits for this status before it sends the
        // command (`kb_wait` in arch/x86/kernel/reboot.c).
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = (offset..).zip(data);
        if bytes.any(|byte| byte == (KEYBOARD_COMMAND, &KEYBOARD_RESET_CPU)) {
            (self.0)(PowerEvent::Reset);
        }
    }
}

/// Returns the handler that the PCI bus calls for writes to the reset control register, port 0xcf9.
pub fn reset_control(on_power: OnPower) -> OnReset {
    Box::new(move |value| {
        if value & RESET_CPU != 0 {
            on_power(PowerEvent::Reset);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn recorder() -> (OnPower, Arc<Mutex<Vec<PowerEvent>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = events.clone();
        (Arc::new(move |event| sink.lock().unwrap().push(event)), events)
    }

    #[test]
    fn only_the_cpu_reset_command_resets() {
        let (on_power, events) = recorder();
        let mut keyboard = KeyboardReset::new(on_power);
        keyboard.write(0, &[0xfe]);
        keyboard.write(4, &[0xd1]);
        keyboard.write(2, &[0xfe, 0xfe]);
        let mut status = [0xff];
        keyboard.read(4, &mut status);
        assert_eq!(status, [0]);
        assert!(events.lock().unwrap().is_empty());
        keyboard.write(4, &[0xfe]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset]);
    }

    #[test]
    fn the_reset_control_register_resets_on_its_cpu_bit() {
        let (on_power, events) = recorder();
        let on_reset = reset_control(on_power);
        for value in [0x00, 0x02, 0x0a] {
            on_reset(value);
        }
        assert!(events.lock().unwrap().is_empty());
        for value in [RESET_VALUE, 0x0e] {
            on_reset(value);
        }
        assert_eq!(events.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_wide_access_is_one_to_each_of_its_ports() {
        for (len, resets) in [(1, vec![4]), (2, vec![3, 4]), (4, vec![1, 2, 3, 4])] {
            let (on_power, events) = recorder();
            let mut keyboard = KeyboardReset::new(on_power);
            let mut data = vec![0xff; len];
            keyboard.read(0, &mut data);
            assert_eq!(data, vec![0; len]);
            for offset in 0..5 {
                let before = events.lock().unwrap().len();
                keyboard.write(offset, &vec![KEYBOARD_RESET_CPU; len]);
                let reset = events.lock().unwrap().len() > before;
                assert_eq!(reset, resets.contains(&offset), "{len} bytes at {offset}");
            }
        }
    }
}
