//! Tells the network where the guest is, after another host has opened its tap: bridges and switches
//! learn the place of an Ethernet address from frames that come from it.
//!
//! The frame is a RARP request (RFC 903), which changes nothing at its receivers; QEMU sends the same after a
//! migration. It needs no IP address, because the host does not know the guest's: neither an ARP nor a neighbour
//! advertisement could be made without one, and neither is needed, because the guest keeps its addresses and so
//! what neighbours know of them stays right. A driver that supports it is asked to announce its IP addresses as
//! well (5.1.6.5.4).
//!
//! A frame may be lost, because a switch that has just seen its port go down and up may not forward yet. So the
//! frame is repeated with growing waits, as by QEMU.

use std::time::Duration;

use vm_memory::VolatileSlice;

use super::{Shared, header};
use crate::devices::interface::Mac;
use crate::devices::network::Link;
use crate::devices::virtio::Rings;

/// Least bytes of a frame on a wire, without its checksum.
const LEN: usize = 60;

/// How often the guest is announced.
pub(super) const ROUNDS: u8 = 5;
/// Waits between the rounds.
const WAITS: [Duration; ROUNDS as usize - 1] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

/// Sends the frames of the next round into the tap, as if the guest had sent them: one for its address, and one
/// for each further address that its driver wants frames for. Returns the wait until the next round. `None` if
/// there is none.
pub(super) fn send_next(shared: &Shared, rings: &Rings) -> Option<Duration> {
    let (macs, left) = {
        let mut driver = shared.driver();
        if driver.announcements == 0 || driver.link() != Link::Up {
            driver.announcements = 0;
            return None;
        }
        driver.announcements -= 1;
        let further = driver.filter.unicast.macs.iter().filter(|mac| mac.is_of_interface());
        let macs: Vec<Mac> = std::iter::once(&driver.mac).chain(further).copied().collect();
        (macs, usize::from(driver.announcements))
    };
    for mac in macs {
        let mut frame = frame(mac);
        let frame = [VolatileSlice::from(&mut frame[..])];
        if let Err(error) = shared.taps[0].write([0; header::LEN], &frame) {
            shared.tap_failed(0, "announce the guest by", &error, rings);
        }
    }
    wait(left)
}

/// Returns the wait before the next of `left` rounds.
fn wait(left: usize) -> Option<Duration> {
    (left > 0).then(|| WAITS[WAITS.len() - left])
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
    fn each_wait_is_longer_than_the_last() {
        let waits: Vec<_> = (0..usize::from(ROUNDS)).rev().map(wait).collect();
        let ms = Duration::from_millis;
        assert_eq!(waits, [Some(ms(50)), Some(ms(150)), Some(ms(250)), Some(ms(350)), None]);
    }

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
