//! Tells the network where the guest is, after another host has opened its tap: bridges and switches
//! learn the place of an address from frames that come from it.
//!
//! The frame is a RARP request (RFC 903), which changes nothing at its receivers; QEMU sends the same after a
//! migration. It needs no IP address, because the host does not know the guest's. A driver that supports it
//! is asked to announce its IP addresses as well (5.1.6.5.4).

use vm_memory::VolatileSlice;

use super::{Shared, header};
use crate::devices::interface::Mac;
use crate::devices::virtio::Rings;

/// Least bytes of a frame on a wire, without its checksum.
const LEN: usize = 60;

/// Sends the frame into the tap, as if the guest had sent it.
pub(super) fn send(shared: &Shared, rings: &Rings) {
    let mut frame = frame(shared.driver().mac);
    let Some(tap) = shared.taps.first() else { return };
    let frame = [VolatileSlice::from(&mut frame[..])];
    if let Err(error) = tap.write([0; header::LEN], &frame) {
        shared.tap_failed("announce the guest by", &error, rings);
    }
}

fn frame(mac: Mac) -> [u8; LEN] {
    let mut frame = [0; LEN];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&Mac::BROADCAST.0);
    put(&mac.0);
    // EtherType RARP; Ethernet and IPv4, with the lengths of their addresses; request reverse.
    put(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    // Sender and target: the guest, whose IPv4 address is not known.
    for _ in 0..2 {
        put(&mac.0);
        put(&[0; 4]);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_broadcast_reverse_request_of_the_guest_for_itself() {
        let frame = frame(Mac([2, 1, 2, 3, 4, 5]));
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..14], [2, 1, 2, 3, 4, 5, 0x80, 0x35]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        for at in [22, 32] {
            assert_eq!(frame[at..at + 10], [2, 1, 2, 3, 4, 5, 0, 0, 0, 0]);
        }
        assert_eq!(frame[42..], [0; 18]);
    }
}
