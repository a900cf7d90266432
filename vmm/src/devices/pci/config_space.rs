//! A type-0 configuration space (PCI Local Bus Specification 3.0, chapter 6): bytes, a mask of
//! the bits that the guest may change, one memory BAR and a list of capabilities.
//!
//! Offsets come from the guest. The bus bounds them, but an out-of-range offset would make the
//! slices below panic, so every guest access is also checked by `ConfigSpace::overlap`.

use crate::state::{Node, Reader, Schema, StateError};

/// Size of a configuration space in bytes.
pub const SIZE: usize = 256;

/// Offset of the command register.
const COMMAND: usize = 0x04;
/// Offset of the status register, whose bit 4 says that there are capabilities.
const STATUS: usize = 0x06;
/// Offset of the cache line size register: writable by the guest, without effect.
const CACHE_LINE_SIZE: usize = 0x0c;
/// Offset of the first BAR.
const BAR: usize = 0x10;
/// Offset of the pointer to the first capability.
const CAPABILITIES: usize = 0x34;
/// Offset of the interrupt line register: a scratch byte for the guest's firmware.
const INTERRUPT_LINE: usize = 0x3c;
/// First offset of capabilities: directly behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: memory space, the function handles accesses to its BAR.
const COMMAND_MEMORY: u16 = 1 << 1;
/// The bits of the command register that can be set: memory space, bus master, parity error
/// response, SERR#, INTx disable. The last four have no effect here: MSI-X and requests work
/// without bus mastering, as with other VMMs.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;

/// The IDs and the class that a function reports in its header.
#[derive(Debug, Clone, Copy)]
pub struct PciIds {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
}

/// The configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that a guest's write changes.
    writable: [u8; SIZE],
    bar: Option<Bar>,
    /// Offset of the next capability, and of the byte that will point to it.
    next_capability: (usize, usize),
}

/// BAR 0, a 32-bit memory BAR that never moves.
#[derive(Debug, Clone, Copy)]
struct Bar {
    base: u32,
    size: u32,
    /// The value that the guest wrote last. All ones asks for the size.
    written: u32,
}

impl ConfigSpace {
    /// Creates a configuration space without BAR and capabilities.
    pub fn new(identity: PciIds) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar: None,
            next_capability: (FIRST_CAPABILITY, CAPABILITIES),
        };
        let [base_class, subclass, interface] = identity.class;
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, interface, subclass, base_class]);
        space.set(0x2c, &identity.subsystem.0.to_le_bytes());
        space.set(0x2e, &identity.subsystem.1.to_le_bytes());
        space
    }

    /// Gives the function BAR 0: `size` bytes (a power of two, at least 16) of memory at `base`
    /// (a multiple of `size`), with memory space on, as firmware would leave it.
    pub fn with_memory_bar(mut self, base: u32, size: u32) -> Self {
        debug_assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
        self.bar = Some(Bar { base, size, written: base });
        self.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        self.allow(CACHE_LINE_SIZE, &[0xff]);
        self.allow(INTERRUPT_LINE, &[0xff]);
        self.set(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        self
    }

    /// Appends a capability: its ID, and `body`, which follows the ID and the next pointer.
    /// `writable` marks the bits of `body` that the guest can change. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let (offset, pointer) = self.next_capability;
        let end = (offset + 2 + body.len()).next_multiple_of(4);
        assert!(end <= SIZE, "the machine's own capabilities fit the space");
        self.bytes[pointer] = offset as u8;
        self.bytes[STATUS] |= 1 << 4;
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.next_capability = (end, offset + 1);
        offset as u8
    }

    /// Returns whether the guest has turned on memory space, so that the function handles accesses to
    /// its BAR.
    pub fn memory_enabled(&self) -> bool {
        self.u16(COMMAND) & COMMAND_MEMORY != 0
    }

    /// Handles a guest's read.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let mut bytes = self.bytes;
        bytes[BAR..BAR + 4].copy_from_slice(&self.bar_register().to_le_bytes());
        if let Some(source) = Self::overlap(offset, data.len()).and_then(|r| bytes.get(r)) {
            data.copy_from_slice(source);
        }
    }

    /// Handles a guest's write. Read-only bits keep their values.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let Some(range) = Self::overlap(offset, data.len()) else { return };
        for (at, value) in range.zip(data) {
            if let (Some(bar), BAR..0x14) = (&mut self.bar, at) {
                let mut written = bar.written.to_le_bytes();
                written[at - BAR] = *value;
                bar.written = u32::from_le_bytes(written);
            }
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
    }

    /// Sets bytes, read-only ones included. For the function, not for the guest.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Returns the bytes at `offset`, as the function set them or the guest wrote them.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|i| self.bytes[offset + i])
    }

    /// Returns the registers of the header that the guest can change. The code that added a
    /// capability saves it.
    pub fn save(&self) -> PciConfigStateV1 {
        PciConfigStateV1 {
            command: self.u16(COMMAND),
            cache_line_size: self.bytes[CACHE_LINE_SIZE],
            interrupt_line: self.bytes[INTERRUPT_LINE],
            bar_base: self.bar.map_or(0, |bar| bar.base),
            bar_written: self.bar.map_or(0, |bar| bar.written),
        }
    }

    /// Restores the header of a space that was built like the saved one.
    pub fn restore(&mut self, state: PciConfigStateV1) -> Result<(), ConfigError> {
        let PciConfigStateV1 { command, cache_line_size, interrupt_line, bar_base, bar_written } =
            state;
        let unknown = command & !COMMAND_WRITABLE;
        if unknown != 0 {
            return Err(ConfigError::Command { unknown });
        }
        let Some(bar) = &mut self.bar else { return Err(ConfigError::NoBar) };
        if bar.base != bar_base {
            return Err(ConfigError::Moved { saved: bar_base, here: bar.base });
        }
        bar.written = bar_written;
        self.set(COMMAND, &command.to_le_bytes());
        self.set(CACHE_LINE_SIZE, &[cache_line_size]);
        self.set(INTERRUPT_LINE, &[interrupt_line]);
        Ok(())
    }

    fn bar_register(&self) -> u32 {
        match self.bar {
            Some(Bar { written: u32::MAX, size, .. }) => !(size - 1),
            Some(Bar { base, .. }) => base,
            None => 0,
        }
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    fn overlap(offset: u8, len: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::from(offset);
        let end = start.checked_add(len)?;
        (end <= SIZE).then_some(start..end)
    }
}

/// A saved header that does not fit this function.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The saved command register has bits that this build does not let a guest set.
    #[error("the saved PCI command register has bits {unknown:#x}, which this build does not know")]
    Command {
        /// The bits.
        unknown: u16,
    },
    /// The saved function had a BAR, this one has none.
    #[error("the saved function has a BAR, this one has none")]
    NoBar,
    /// The guest knows the BAR at another address.
    #[error("the guest knows BAR 0 at {saved:#x}, this machine has placed it at {here:#x}")]
    Moved {
        /// The address that the guest knows.
        saved: u32,
        /// The address in this machine.
        here: u32,
    },
}

/// The header registers of a PCI function that its guest can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciConfigStateV1 {
    /// Command register.
    pub command: u16,
    /// Cache line size register, in 32-bit words.
    pub cache_line_size: u8,
    /// Interrupt line register.
    pub interrupt_line: u8,
    /// Guest physical address of BAR 0.
    pub bar_base: u32,
    /// What the guest wrote into BAR 0 last; all ones while it asks for the size.
    pub bar_written: u32,
}

impl Schema for PciConfigStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,pci-config-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { command, cache_line_size, interrupt_line, bar_base, bar_written } = *self;
        node.put_u32("command", command.into());
        node.put_u32("cache-line-size", cache_line_size.into());
        node.put_u32("interrupt-line", interrupt_line.into());
        node.put_u32("bar-base", bar_base);
        node.put_u32("bar-written", bar_written);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            command: reader.narrow("command")?,
            cache_line_size: reader.narrow("cache-line-size")?,
            interrupt_line: reader.narrow("interrupt-line")?,
            bar_base: reader.u32("bar-base")?,
            bar_written: reader.u32("bar-written")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;
    use proptest::prelude::*;

    impl PciConfigStateV1 {
        pub(crate) fn sample() -> Self {
            Self {
                command: COMMAND_WRITABLE,
                cache_line_size: 16,
                interrupt_line: 11,
                bar_base: 0xc000_8000,
                bar_written: u32::MAX,
            }
        }
    }

    contract_tests! {
        PciConfigStateV1,
        sample: PciConfigStateV1::sample,
        changes: [
            |s| s.command = COMMAND_MEMORY,
            |s| s.cache_line_size += 1,
            |s| s.interrupt_line += 1,
            |s| s.bar_base += 0x8000,
            |s| s.bar_written = 0xc000_8000,
        ],
        golden: "pci-config-v1",
    }

    const IDENTITY: PciIds = PciIds {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: [0x01, 0x80, 0x00],
        subsystem: (0x1af4, 0x1042),
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(IDENTITY).with_memory_bar(0xc000_8000, 0x8000)
    }

    fn read_u32(space: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_holds_the_ids_of_the_function() {
        let space = space();
        assert_eq!(read_u32(&space, 0x00), 0x1042_1af4);
        assert_eq!(read_u32(&space, 0x08), 0x0180_0001);
        assert_eq!(read_u32(&space, 0x2c), 0x1042_1af4);
    }

    #[test]
    fn a_bar_can_be_sized_and_does_not_move() {
        let mut space = space();
        assert_eq!(read_u32(&space, 0x10), 0xc000_8000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(read_u32(&space, 0x10), 0xc000_8000);
        for at in 0x10..0x14 {
            space.write(at, &[0xff]);
        }
        assert_eq!(read_u32(&space, 0x10), 0xffff_8000);
        // The other BARs do not exist: their size reads as zero.
        space.write(0x14, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0x14), 0);
    }

    #[test]
    fn a_guest_changes_only_writable_bits() {
        let mut space = space();
        for offset in (0..=252).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(read_u32(&space, 0x00), 0x1042_1af4);
        assert_eq!(read_u32(&space, 0x04), 0x0000_0546);
        assert_eq!(read_u32(&space, 0x0c), 0x0000_00ff);
        assert_eq!(read_u32(&space, 0x3c), 0x0000_00ff);
        assert_eq!(read_u32(&space, 0x40), 0);
    }

    #[test]
    fn an_access_across_the_end_does_nothing() {
        let mut space = space();
        space.write(0xfe, &[1; 4]);
        let mut data = [0xee; 4];
        space.read(0xfe, &mut data);
        assert_eq!(data, [0xee; 4]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        assert_eq!(read_u32(&space, 0x04) >> 16 & 0x10, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[0, 0xf0]);
        let second = space.add_capability(0x11, &[4; 10], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read_u32(&space, 0x04) >> 16 & 0x10, 0x10);
        assert_eq!(read_u32(&space, 0x34), 0x40);
        space.write(0x40, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0x40), 0xf201_4809);
        assert_eq!(read_u32(&space, 0x48), 0x0404_0011);
    }

    #[test]
    fn a_guest_that_is_sizing_a_bar_goes_on_after_a_restore() {
        let mut before = space();
        before.write(0x10, &[0xff; 4]);
        before.write(0x04, &[0x04, 0x00]);
        before.write(0x3c, &[11]);
        let mut after = space();
        after.restore(before.save()).unwrap();
        assert_eq!(after.save(), before.save());
        assert_eq!(read_u32(&after, 0x10), 0xffff_8000);
        assert!(!after.memory_enabled());
        assert_eq!(read_u32(&after, 0x3c), 11);
    }

    #[test]
    fn restoring_a_bar_at_another_address_is_an_error() {
        let state = space().save();
        let mut moved = ConfigSpace::new(IDENTITY).with_memory_bar(0xc001_0000, 0x8000);
        let error = moved.restore(state).unwrap_err();
        assert_eq!(error, ConfigError::Moved { saved: 0xc000_8000, here: 0xc001_0000 });
        let odd = PciConfigStateV1 { command: 1, ..state };
        assert_eq!(space().restore(odd), Err(ConfigError::Command { unknown: 1 }));
    }

    #[test]
    fn a_saved_bar_does_not_fit_a_function_without_one() {
        let mut bare = ConfigSpace::new(IDENTITY);
        assert_eq!(bare.restore(space().save()), Err(ConfigError::NoBar));
        assert_eq!(bare.save().bar_base, 0);
    }

    proptest! {
        /// A guest changes only writable bits, and a restore keeps the bits that it changed.
        #[test]
        fn no_sequence_of_accesses_breaks_the_header(
            writes in prop::collection::vec((any::<u8>(), 0usize..=8, any::<u64>()), 0..50)
        ) {
            let fresh = space();
            let mut space = space();
            for (at, len, value) in writes {
                space.write(at, &value.to_le_bytes()[..len]);
            }
            for at in 0..=255u8 {
                let (mut before, mut after) = ([0xff], [0xff]);
                fresh.read(at, &mut before);
                space.read(at, &mut after);
                let own: u8 = match usize::from(at) {
                    COMMAND => COMMAND_WRITABLE as u8,
                    0x05 => (COMMAND_WRITABLE >> 8) as u8,
                    CACHE_LINE_SIZE | INTERRUPT_LINE => 0xff,
                    BAR..0x14 => 0xff,
                    _ => 0,
                };
                prop_assert_eq!(before[0] & !own, after[0] & !own, "{:#x}", at);
            }
            let mut restored = fresh.clone();
            restored.restore(space.save()).unwrap();
            for at in (0..=252u8).step_by(4) {
                prop_assert_eq!(read_u32(&restored, at), read_u32(&space, at), "{:#x}", at);
            }
        }
    }
}
