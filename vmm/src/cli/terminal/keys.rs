//! The key sequences that are for this program and not for the guest. All begin with Ctrl-A, as in QEMU:
//!
//! ```text
//!   Ctrl-A x        leave
//!   Ctrl-A h or ?   print this list
//!   Ctrl-A Ctrl-A   send one Ctrl-A to the guest
//! ```
//!
//! Any other key after Ctrl-A cancels the sequence, and the guest gets neither of the two.

/// The key that begins a sequence.
const PREFIX: u8 = 0x01;

/// Said once, when the guest gets the terminal.
pub(super) const HINT: &str = "Ctrl-A x leaves, Ctrl-A h lists the keys";
/// Said when asked with Ctrl-A h.
pub(super) const HELP: &str =
    "Ctrl-A x leaves; Ctrl-A h prints this; Ctrl-A Ctrl-A sends one Ctrl-A to the guest";

/// What a key sequence asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Leave,
    Help,
}

/// Separates key sequences from input for the guest. A sequence may be split between two reads.
#[derive(Debug, Default)]
pub(super) struct Keys {
    /// Whether the last byte was the prefix.
    begun: bool,
}

impl Keys {
    /// Passes the guest's bytes of `input` to `guest`, and returns the orders in it. Nothing after
    /// [`Order::Leave`] is passed.
    pub(super) fn sort(&mut self, input: &[u8], mut guest: impl FnMut(u8)) -> Vec<Order> {
        let mut orders = Vec::new();
        for &byte in input {
            match (std::mem::take(&mut self.begun), byte) {
                (false, PREFIX) => self.begun = true,
                (false, byte) => guest(byte),
                (true, PREFIX) => guest(PREFIX),
                (true, b'x' | b'X') => {
                    orders.push(Order::Leave);
                    return orders;
                }
                (true, b'h' | b'H' | b'?') => orders.push(Order::Help),
                (true, _) => {}
            }
        }
        orders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorts the reads one after the other; returns the guest's bytes and the orders.
    fn sorted(reads: &[&[u8]]) -> (Vec<u8>, Vec<Order>) {
        let (mut keys, mut guest, mut orders) = (Keys::default(), Vec::new(), Vec::new());
        for read in reads {
            orders.extend(keys.sort(read, |byte| guest.push(byte)));
        }
        (guest, orders)
    }

    #[test]
    fn all_but_sequences_is_for_the_guest() {
        let bytes: Vec<u8> = (0..=255).filter(|byte| *byte != PREFIX).collect();
        assert_eq!(sorted(&[&bytes]), (bytes, vec![]));
    }

    #[test]
    fn a_sequence_may_be_split_between_reads() {
        assert_eq!(sorted(&[b"ab\x01xcd"]), (b"ab".to_vec(), vec![Order::Leave]));
        assert_eq!(sorted(&[b"ab\x01", b"x"]), (b"ab".to_vec(), vec![Order::Leave]));
        assert_eq!(sorted(&[b"\x01", b"h", b"x"]), (b"x".to_vec(), vec![Order::Help]));
    }

    #[test]
    fn the_guest_gets_a_doubled_prefix_once_and_no_cancelled_sequence() {
        assert_eq!(sorted(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(sorted(&[b"\x01qx"]), (b"x".to_vec(), vec![]));
    }
}
