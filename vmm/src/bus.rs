//! Routes port I/O and MMIO of the guest to the part of the machine that claimed the range.
//!
//! The guest chooses address and data. A device gets only accesses that lie within its range, so it can rely on its offset.
//! An access that reaches beyond the end of a range, or that begins in front of one, becomes one of a byte to each of its
//! addresses, the lowest first, as a real bus splits it. An unclaimed address reads as all ones. A device with
//! registers of one byte takes a wider access as one of a byte to each of the ports from there on, as the ISA bus makes it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::mutex::lock;

/// A part of the machine with registers on a bus. A vCPU's thread makes both calls.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` into the range. `data` is filled with ones
    /// before the call; the guest gets what `data` holds after it.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` into the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range overlaps one that is already claimed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bus range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
pub struct Overlap {
    base: u64,
    len: u64,
    other_base: u64,
    other_len: u64,
}

type Shared = Arc<Mutex<dyn BusDevice>>;

/// One address space: ports or physical memory.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Shared)>,
}

impl Bus {
    /// Claims `[base, base + len)` for `device`. Errors if it overlaps a claimed range.
    pub fn insert(&mut self, base: u64, len: u64, device: Shared) -> Result<(), Overlap> {
        // Compares last addresses, because `base + len` may overflow.
        let last = |base: u64, len: u64| base.saturating_add(len.saturating_sub(1));
        let before = self.ranges.range(..=last(base, len)).next_back();
        if let Some((&other_base, &(other_len, _))) = before
            && last(other_base, other_len) >= base
        {
            return Err(Overlap { base, len, other_base, other_len });
        }
        self.ranges.insert(base, (len, device));
        Ok(())
    }

    /// Passes a guest's read at `address` to the device there, or fills `data` with ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            return lock(device).read(offset, data);
        }
        for (at, byte) in (address..=u64::MAX).zip(data) {
            if let Some((offset, device)) = self.find(at, 1) {
                lock(device).read(offset, std::slice::from_mut(byte));
            }
        }
    }

    /// Passes a guest's write at `address` to the device there, if there is a device.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            return lock(device).write(offset, data);
        }
        for (at, byte) in (address..=u64::MAX).zip(data) {
            if let Some((offset, device)) = self.find(at, 1) {
                lock(device).write(offset, std::slice::from_ref(byte));
            }
        }
    }

    /// Returns the device that has all of these addresses, and the offset of the first.
    fn find(&self, address: u64, size: usize) -> Option<(u64, &Shared)> {
        let (base, (len, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(size as u64)?;
        (end <= *len).then_some((offset, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Echo>>) {
        let echo = Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::default();
        bus.insert(0x10, 8, echo.clone()).unwrap();
        (bus, echo)
    }

    #[test]
    fn an_access_reaches_the_device_with_its_offset() {
        let (bus, echo) = bus();
        let mut byte = [0];
        bus.read(0x13, &mut byte);
        assert_eq!(byte, [3]);
        bus.write(0x17, &[9]);
        assert_eq!(echo.lock().unwrap().0, [(7, vec![9])]);
    }

    #[test]
    fn an_access_outside_reads_ones_and_writes_nothing() {
        let (bus, echo) = bus();
        for (address, size) in [(0xf, 1), (0x18, 1), (0xc, 4), (0x18, 8), (u64::MAX, 8)] {
            let mut data = vec![0; size];
            bus.read(address, &mut data);
            assert_eq!(data, vec![0xff; size], "{address:#x}");
            bus.write(address, &data);
        }
        assert!(echo.lock().unwrap().0.is_empty());
    }

    #[test]
    fn an_access_across_the_ends_of_ranges_reaches_each_device_by_the_byte() {
        let (mut bus, echo) = bus();
        let other = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x19, 4, other.clone()).unwrap();
        // The last two bytes of one device, nothing, and the first of the other.
        let mut data = [0; 4];
        bus.read(0x16, &mut data);
        assert_eq!(data, [6, 7, 0xff, 0]);
        bus.write(0x16, &[1, 2, 3, 4]);
        assert_eq!(echo.lock().unwrap().0, [(6, vec![1]), (7, vec![2])]);
        assert_eq!(other.lock().unwrap().0, [(0, vec![4])]);
        // The first byte of a device behind one of nobody's.
        let mut data = [0; 2];
        bus.read(0xf, &mut data);
        assert_eq!(data, [0xff, 0]);
        bus.write(0xf, &[5, 6]);
        assert_eq!(echo.lock().unwrap().0[2..], [(0, vec![6])]);
    }

    #[test]
    fn overlapping_ranges_are_refused_and_adjacent_ones_are_not() {
        let (mut bus, echo) = bus();
        for (base, len) in [(0x10, 8), (0xc, 5), (0x17, 1), (0, 0x100), (0x12, 2)] {
            assert!(bus.insert(base, len, echo.clone()).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0x18, 1, echo.clone()).unwrap();
        bus.insert(0xf, 1, echo).unwrap();
    }

    #[test]
    fn a_range_may_reach_the_end_of_all_addresses() {
        let (mut bus, echo) = bus();
        bus.insert(u64::MAX - 3, 4, echo.clone()).unwrap();
        assert!(bus.insert(u64::MAX, 1, echo.clone()).is_err());
        let mut byte = [0xff];
        bus.read(u64::MAX - 1, &mut byte);
        assert_eq!(byte, [2]);
        bus.write(u64::MAX - 1, &[7]);
        bus.write(u64::MAX, &[0; 2]);
        // Nothing is behind the last address.
        assert_eq!(echo.lock().unwrap().0, [(2, vec![7]), (3, vec![0])]);
    }

    #[test]
    fn a_device_that_panicked_once_is_still_there() {
        let (bus, echo) = bus();
        let other = echo.clone();
        let panicked = std::thread::spawn(move || {
            let _guard = other.lock().unwrap();
            panic!("on purpose");
        });
        panicked.join().unwrap_err();
        bus.write(0x10, &[1]);
        let log = lock(&echo);
        assert_eq!(log.0, [(0, vec![1])]);
    }
}
