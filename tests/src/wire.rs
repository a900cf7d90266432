//! What QEMU has seen on a machine's wire, in the format of libpcap: a header of 24 bytes, and in front of each frame 16
//! bytes, of which the third group of four is the number of bytes that follow.

use std::fs;
use std::io;
use std::path::Path;

/// Bytes of each frame that QEMU keeps.
pub const KEPT: usize = 64;

const HEADER: usize = 24;
const FRAME_HEADER: usize = 16;
/// EtherType of the frames that tell where an address is (RFC 903).
const RARP: [u8; 2] = [0x80, 0x35];

/// Frames from one Ethernet address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Those that tell where the address is.
    pub announcements: usize,
    /// All others.
    pub others: usize,
}

/// Counts the frames from `mac`.
pub fn sent_from(mac: [u8; 6], file: &Path) -> io::Result<Sent> {
    Ok(count(mac, &fs::read(file)?))
}

fn count(mac: [u8; 6], bytes: &[u8]) -> Sent {
    let mut sent = Sent::default();
    let mut rest = bytes.get(HEADER..).unwrap_or_default();
    while let Some((header, behind)) = rest.split_first_chunk::<FRAME_HEADER>() {
        let len = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
        // QEMU may be writing the last one.
        let Some((frame, next)) = behind.split_at_checked(len) else { break };
        match (frame.get(6..12), frame.get(12..14)) {
            (Some(from), Some(kind)) if from == mac && kind == RARP => sent.announcements += 1,
            (Some(from), _) if from == mac => sent.others += 1,
            _ => {}
        }
        rest = next;
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(mac: [u8; 6], kind: [u8; 2]) -> Vec<u8> {
        let frame = [&[0xff; 6][..], &mac, &kind, &[0; 40]].concat();
        let len = (frame.len() as u32).to_ne_bytes();
        [&[0; 8][..], &len, &len, &frame].concat()
    }

    #[test]
    fn only_whole_frames_of_the_address_are_counted_and_announcements_apart() {
        let (mac, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let frames = [
            frame(mac, RARP),
            frame(other, RARP),
            frame(mac, [8, 6]),
            frame(mac, RARP),
            frame(mac, RARP)[..30].to_vec(),
        ];
        let file = [vec![0; HEADER], frames.concat()].concat();
        assert_eq!(count(mac, &file), Sent { announcements: 2, others: 1 });
        assert_eq!(count(mac, &[]), Sent::default());
    }
}
