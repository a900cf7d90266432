//! The ways in which a guest turns itself off or resets itself: the keyboard controller's reset
//! line, the ACPI sleep registers of a hardware-reduced platform, and the reset control register.
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

/// First port of the keyboard controller, which [`KeyboardReset`] answers.
pub const KEYBOARD_BASE: u16 = 0x60;
/// Number of ports from there to the command port, 0x64.
pub const KEYBOARD_LEN: u16 = 5;
/// Offset of the command port (write) and status port (read).
const KEYBOARD_COMMAND: u64 = 4;
/// Command: pulse the reset line of the CPU.
const KEYBOARD_RESET_CPU: u8 = 0xfe;

/// First port of the ACPI sleep registers, which [`SleepRegisters`] answers.
pub const SLEEP_BASE: u16 = 0x600;
/// The sleep control register and the sleep status register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_LEN: u16 = 2;
/// The sleep type in this machine's ACPI object `\_S5` (power off).
pub const SLEEP_TYPE_S5: u8 = 5;
/// Sleep control: enter the sleep type in bits 4..2.
const SLEEP_ENABLE: u8 = 1 << 5;

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
        if (offset, data) == (KEYBOARD_COMMAND, &[KEYBOARD_RESET_CPU]) {
            (self.0)(PowerEvent::Reset);
        }
    }
}

/// The ACPI sleep control and status registers.
pub struct SleepRegisters(OnPower);

impl SleepRegisters {
    /// Reports to `on_power`.
    pub fn new(on_power: OnPower) -> Self {
        Self(on_power)
    }
}

impl BusDevice for SleepRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, [value]) = (offset, data)
            && value & SLEEP_ENABLE != 0
            && value >> 2 & 0b111 == SLEEP_TYPE_S5
        {
            (self.0)(PowerEvent::Shutdown);
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
        keyboard.write(4, &[0xfe, 0xfe]);
        let mut status = [0xff];
        keyboard.read(4, &mut status);
        assert_eq!(status, [0]);
        assert!(events.lock().unwrap().is_empty());
        keyboard.write(4, &[0xfe]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset]);
    }

    #[test]
    fn only_sleep_type_5_with_enable_shuts_down() {
        let (on_power, events) = recorder();
        let mut sleep = SleepRegisters::new(on_power);
        for value in (0..=255).filter(|v| v & 0x3c != 0x34) {
            sleep.write(0, &[value]);
        }
        sleep.write(1, &[0x34]);
        assert!(events.lock().unwrap().is_empty());
        sleep.write(0, &[SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Shutdown]);
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
    fn reads_and_writes_of_other_widths_ask_for_nothing() {
        let (on_power, events) = recorder();
        let mut keyboard = KeyboardReset::new(on_power.clone());
        let mut sleep = SleepRegisters::new(on_power);
        for len in [2, 4, 8] {
            for offset in 0..8 {
                keyboard.write(offset, &[KEYBOARD_RESET_CPU; 8][..len]);
                sleep.write(offset, &[0x34; 8][..len]);
            }
            let mut data = [0xff; 8];
            keyboard.read(0, &mut data[..len]);
            assert_eq!(data[..len], [0; 8][..len]);
            data.fill(0xff);
            sleep.read(0, &mut data[..len]);
            assert_eq!(data[..len], [0; 8][..len]);
        }
        assert!(events.lock().unwrap().is_empty());
    }

    #[test]
    fn repeated_requests_are_all_reported() {
        let (on_power, events) = recorder();
        let mut sleep = SleepRegisters::new(on_power);
        // The second value also sets the wake bits, which ACPI has in the same byte.
        for value in [0x34, 0xb7, 0x34] {
            sleep.write(0, &[value]);
        }
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Shutdown; 3]);
    }
}
