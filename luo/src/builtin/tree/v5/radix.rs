//! Keys of the kernel's map of preserved memory.
//!
//! The map of Linux 7.3 is a radix tree. A key encodes both the address and the length of a run of
//! pages: `1 << (52 - order) | address >> (12 + order)`. The position of the highest set bit gives
//! the order. The tree has six levels of pages: 512 addresses in levels 5 to 1, 32768 bits in level
//! 0. Source: `include/linux/kho/abi/kexec_handover.h`, `kexec_handover.c`.

/// Bits of an address within a base page.
const PAGE_SHIFT: u32 = 12;
/// The number of the highest set bit in a key of order 0.
const ORDER_0: u32 = 64 - PAGE_SHIFT;
/// Bits of a key that index level 0.
const LEAF_BITS: u32 = 15;
/// Bits of a key that index each level above 0.
const NODE_BITS: u32 = 9;
/// Levels of the tree.
pub const LEVELS: u32 = 6;

/// A run of `1 << order` base pages, aligned to its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// Physical address of its first byte.
    pub address: u64,
    /// Its length is `4096 << order` bytes.
    pub order: u32,
}

impl Run {
    /// Returns the run's key; `None` if the address is not aligned to the length, or the order is
    /// above 52.
    pub fn to_key(self) -> Option<u64> {
        let Self { address, order } = self;
        let shift = PAGE_SHIFT.checked_add(order).filter(|_| order <= ORDER_0)?;
        let unit = address.checked_shr(shift).unwrap_or(0);
        let back = unit.checked_shl(shift).unwrap_or(0);
        (back == address).then_some(1 << (ORDER_0 - order) | unit)
    }

    /// Returns the run with this key; `None` if no run has the key.
    pub fn from_key(key: u64) -> Option<Self> {
        let order = ORDER_0.checked_sub(key.checked_ilog2()?)?;
        let unit = key & !(1 << (ORDER_0 - order));
        let address = unit.checked_shl(PAGE_SHIFT + order).unwrap_or(0);
        Some(Self { address, order })
    }
}

/// Returns the index of a key in its page of a level: of a bit in level 0, of an address in the
/// levels above. `None` if `level` is not below [`LEVELS`].
pub fn index_in_level(key: u64, level: u32) -> Option<usize> {
    let (shift, bits) = match level {
        0 => (0, LEAF_BITS),
        1..LEVELS => (LEAF_BITS + NODE_BITS * (level - 1), NODE_BITS),
        _ => return None,
    };
    usize::try_from(key >> shift & ((1 << bits) - 1)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_highest_bit_of_a_key_gives_its_order() {
        let key = |address, order| Run { address, order }.to_key();
        assert_eq!(key(0x1000, 0), Some(1 << 52 | 1));
        assert_eq!(key(0x20_0000, 9), Some(1 << 43 | 1));
        assert_eq!(key(0x1000, 1), None);
        assert_eq!(key(0x800, 0), None);
        assert_eq!(Run::from_key(0), None);
        assert_eq!(Run::from_key(1 << 53), None);
        assert_eq!(index_in_level(1 << 52 | 0x8001, 0), Some(1));
        assert_eq!(index_in_level(1 << 52 | 0x8001, 1), Some(1));
        assert_eq!(index_in_level(1 << 52, 5), Some(1 << (52 - 51)));
        assert_eq!(index_in_level(0, 6), None);
    }

    proptest! {
        #[test]
        fn keys_and_runs_are_one_to_one(key in 1_u64..1 << 53) {
            let run = Run::from_key(key).unwrap();
            prop_assert_eq!(run.to_key(), Some(key));
        }

        #[test]
        fn every_aligned_run_up_to_order_10_has_a_key(unit in 0_u64..1 << 40, order in 0_u32..=10) {
            let run = Run { address: unit << (12 + order), order };
            prop_assert_eq!(run.to_key().and_then(Run::from_key), Some(run));
        }
    }
}
