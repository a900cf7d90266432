//! The root bus and configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2): the
//! guest names a register in the 32-bit port 0xcf8 and accesses it through 0xcfc..0xcff.
//!
//! Byte accesses to 0xcf9 lie in the same range but belong to the reset control register; the bus
//! passes these writes to the handler it was built with. The address register is saved, because a
//! guest may be paused between writing the address and accessing the data.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use super::{PciFunction, SLOTS};
use crate::bus::BusDevice;
use crate::mutex::lock;
use crate::state::{Node, Persist, Reader, Schema, StateError};

/// First port of the range that [`PciBus`] handles.
pub const PORTS_BASE: u16 = 0xcf8;
/// Number of ports in that range.
pub const PORTS_LEN: u16 = 8;

/// Address register: accesses to the data register go to the configuration space.
const ENABLE: u32 = 1 << 31;
/// The writable bits of the address register: bits 30..24 and 1..0 are reserved.
const ADDRESS_WRITABLE: u32 = ENABLE | 0x00ff_fffc;
/// Offset of the reset control register in the range.
const RESET_CONTROL: u64 = 1;
/// Offset of the data register in the range.
const DATA: u64 = 4;

/// Called with each byte that the guest writes to port 0xcf9.
pub type OnReset = Box<dyn Fn(u8) + Send>;

/// A function that the bus shares with the range of its BAR and with the machine.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// The root bus.
pub struct PciBus {
    address: u32,
    functions: [Option<SharedFunction>; SLOTS as usize],
    on_reset: OnReset,
}

/// A slot that is taken or does not exist.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("PCI slot {0} is {1}")]
pub struct SlotError(u8, &'static str);

impl PciBus {
    /// Creates a bus without functions.
    pub fn new(on_reset: OnReset) -> Self {
        Self { address: 0, functions: [const { None }; SLOTS as usize], on_reset }
    }

    /// Puts `function` into `slot`, 0..32. Errors if the slot is taken or out of range.
    pub fn insert(&mut self, slot: u8, function: SharedFunction) -> Result<(), SlotError> {
        match self.functions.get_mut(usize::from(slot)) {
            Some(empty @ None) => {
                *empty = Some(function);
                Ok(())
            }
            Some(_) => Err(SlotError(slot, "taken")),
            None => Err(SlotError(slot, "not on the bus, which has 32")),
        }
    }

    /// Returns the function that the address register names, and the offset of the register in it.
    fn target(&self) -> Option<(&SharedFunction, u8)> {
        let [register, device_function, bus, _] = self.address.to_le_bytes();
        if self.address & ENABLE == 0 || bus != 0 || device_function & 0b111 != 0 {
            return None;
        }
        let function = self.functions.get(usize::from(device_function >> 3))?.as_ref()?;
        Some((function, register))
    }
}

impl BusDevice for PciBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET_CONTROL, 1) => data.fill(0),
            (DATA..8, len @ (1 | 2 | 4)) if offset + len as u64 <= DATA + 4 => {
                if let Some((function, register)) = self.target() {
                    let mut function = lock(function);
                    function.read_config(register + (offset - DATA) as u8, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Only a 32-bit write sets the address register. Linux writes a byte to 0xcfb while it
            // probes (`pci_check_type1`), and that write must not set it.
            (0, [a, b, c, d]) => {
                self.address = u32::from_le_bytes([*a, *b, *c, *d]) & ADDRESS_WRITABLE;
            }
            (RESET_CONTROL, [value]) => (self.on_reset)(*value),
            (DATA..8, [_] | [_, _] | [_, _, _, _]) if offset + data.len() as u64 <= DATA + 4 => {
                if let Some((function, register)) = self.target() {
                    let mut function = lock(function);
                    function.write_config(register + (offset - DATA) as u8, data);
                }
            }
            _ => {}
        }
    }
}

/// The state of the bus itself. Each function has a state of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciBusStateV1 {
    /// The address register, port 0xcf8.
    pub address: u32,
}

impl Schema for PciBusStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,pci-bus-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { address } = *self;
        node.put_u32("config-address", address);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let address = reader.u32("config-address")?;
        if address & !ADDRESS_WRITABLE != 0 {
            return Err(reader.invalid("config-address", format!("{address:#x} has reserved bits")));
        }
        Ok(Self { address })
    }
}

impl Persist for PciBus {
    type State = PciBusStateV1;
    type Resources = OnReset;
    type Error = Infallible;

    fn save(&self) -> Result<PciBusStateV1, Infallible> {
        let Self { address, functions: _, on_reset: _ } = self;
        Ok(PciBusStateV1 { address: *address })
    }

    fn restore(state: PciBusStateV1, on_reset: OnReset) -> Result<Self, Infallible> {
        let PciBusStateV1 { address } = state;
        Ok(Self { address, ..Self::new(on_reset) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::pci::HostBridge;
    use crate::state::contract::contract_tests;
    use crate::state::node::read_node;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU8, Ordering};

    impl PciBusStateV1 {
        pub(crate) fn sample() -> Self {
            Self { address: 0x8000_0808 }
        }
    }

    contract_tests! {
        PciBusStateV1,
        sample: PciBusStateV1::sample,
        changes: [|s| s.address += 4],
        golden: "pci-bus-v1",
    }

    #[test]
    fn an_address_register_with_reserved_bits_is_refused() {
        for address in [1u32, 1 << 30, 1 << 24] {
            let node = PciBusStateV1 { address }.to_node("pci@cf8");
            let error = read_node::<PciBusStateV1>(&node, "/").unwrap_err().to_string();
            assert!(error.starts_with("/pci@cf8: property `config-address`"), "{error}");
        }
    }

    fn bus() -> (PciBus, Arc<AtomicU8>) {
        let reset = Arc::new(AtomicU8::new(0));
        let seen = reset.clone();
        let mut bus = PciBus::new(Box::new(move |value| seen.store(value, Ordering::Relaxed)));
        bus.insert(0, Arc::new(Mutex::new(HostBridge::new()))).unwrap();
        (bus, reset)
    }

    fn read<const N: usize>(bus: &mut PciBus, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        bus.read(offset, &mut data);
        data
    }

    #[test]
    fn linux_finds_configuration_mechanism_1_and_a_host_bridge() {
        let (mut bus, _) = bus();
        bus.write(3, &[1]);
        bus.write(0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&mut bus, 0), 0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&mut bus, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&mut bus, 6), [0x08, 0x00]);
        bus.write(0, &0x8000_0008u32.to_le_bytes());
        assert_eq!(read(&mut bus, 6), [0x00, 0x06]);
        assert_eq!(read(&mut bus, 7), [0x06]);
    }

    #[test]
    fn missing_functions_read_as_ones() {
        let (mut bus, _) = bus();
        // Disabled; another bus; another function; an empty slot.
        for address in [0x0000_0000u32, 0x8001_0000, 0x8000_0100, 0x8000_0800] {
            bus.write(0, &address.to_le_bytes());
            assert_eq!(read(&mut bus, 4), [0xff; 4], "{address:#x}");
            bus.write(4, &[0; 4]);
        }
    }

    #[test]
    fn a_byte_to_0xcf9_is_the_reset_register_and_not_a_register_name() {
        let (mut bus, reset) = bus();
        bus.write(0, &0x8000_0008u32.to_le_bytes());
        bus.write(1, &[6]);
        assert_eq!(reset.load(Ordering::Relaxed), 6);
        assert_eq!(read(&mut bus, 0), 0x8000_0008u32.to_le_bytes());
        assert_eq!(read(&mut bus, 1), [0]);
    }

    #[test]
    fn a_slot_is_given_once() {
        let (mut bus, _) = bus();
        let bridge = Arc::new(Mutex::new(HostBridge::new()));
        assert!(bus.insert(0, bridge.clone()).is_err());
        assert!(bus.insert(32, bridge.clone()).is_err());
        bus.insert(31, bridge).unwrap();
    }

    #[test]
    fn a_guest_paused_between_naming_and_reading_a_register_reads_it_after_the_restore() {
        let (mut before, _) = bus();
        before.write(0, &0x8000_0008u32.to_le_bytes());
        let Ok(state) = before.save();
        let node = state.to_node("pci");
        let Ok(again) = before.save();
        assert_eq!(state, again);
        let state = read_node::<PciBusStateV1>(&node, "").unwrap();
        let Ok(mut after) = PciBus::restore(state, Box::new(|_| {}));
        after.insert(0, Arc::new(Mutex::new(HostBridge::new()))).unwrap();
        assert_eq!(read(&mut after, 6), [0x00, 0x06]);
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in prop::collection::vec((0u64..8, 1usize..9, any::<u64>(), any::<bool>()), 0..64)) {
            let (mut bus, _) = bus();
            for (offset, len, value, write) in accesses {
                let mut data = value.to_le_bytes()[..len].to_vec();
                match write {
                    true => bus.write(offset, &data),
                    false => bus.read(offset, &mut data),
                }
            }
        }
    }
}
