//! The header in front of every frame (5.1.6). It says which work on the frame is left: computing the checksum,
//! dividing the frame into segments. The guest writes the header of frames that it sends, the host's kernel
//! that of frames that the guest receives.
//!
//! A side gets only headers whose features it has negotiated. A guest's header is checked before the kernel
//! gets it, because the kernel changes the frame as the header says.

use super::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, FRAME_MAX,
    FRAME_MIN,
};

/// Length of the header in bytes, which in version 1 does not depend on features (5.1.6.1).
pub(super) const LEN: usize = 12;

/// Flags: the checksum is still to be computed; it was verified (5.1.6).
pub(super) const NEEDS_CSUM: u8 = 1;
pub(super) const DATA_VALID: u8 = 2;

/// Kinds of segments that a frame is to be divided into.
pub(super) const GSO_NONE: u8 = 0;
pub(super) const GSO_TCPV4: u8 = 1;
pub(super) const GSO_TCPV6: u8 = 4;

/// Smallest segments that a frame may be divided into, in bytes. Linux's TCP never uses smaller ones
/// (`TCP_MIN_SND_MSS`, include/net/tcp.h). Segments of one byte would make tens of thousands of frames for
/// the host's kernel out of one.
const SEGMENT_MIN: u16 = 48;

/// The header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    /// Length of all headers in front of the first segment's data; a hint.
    pub(super) hdr_len: u16,
    /// Bytes of data in a segment.
    pub(super) gso_size: u16,
    /// Offset of the first byte that the checksum covers.
    pub(super) csum_start: u16,
    /// Offset of the checksum, from `csum_start`.
    pub(super) csum_offset: u16,
    /// How many of the guest's buffers a received frame takes.
    pub(super) num_buffers: u16,
}

impl Header {
    pub(super) fn from_bytes(bytes: [u8; LEN]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = bytes;
        let word = |low, high| u16::from_le_bytes([low, high]);
        Self {
            flags,
            gso_type,
            hdr_len: word(a, b),
            gso_size: word(c, d),
            csum_start: word(e, f),
            csum_offset: word(g, h),
            num_buffers: word(i, j),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; LEN] {
        let Self { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers } =
            self;
        let mut bytes = [flags, gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [hdr_len, gso_size, csum_start, csum_offset, num_buffers];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Returns the header for the host's kernel, of a frame of `len` bytes from a driver that negotiated
    /// `features`. The error says why the frame is not sent.
    pub(super) fn checked_to_send(self, features: u64, len: usize) -> Result<Self, &'static str> {
        if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            return Err("it is shorter or longer than a frame can be");
        }
        let mut header = Self { flags: self.flags & NEEDS_CSUM, num_buffers: 0, ..self };
        match header.flags {
            0 => (header.csum_start, header.csum_offset) = (0, 0),
            _ if features & F_CSUM == 0 => return Err("CSUM is not negotiated"),
            _ => {
                let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
                if usize::from(self.csum_start) < FRAME_MIN || end > len {
                    return Err("its checksum field lies outside the frame");
                }
            }
        }
        let offered = match self.gso_type {
            GSO_NONE => {
                (header.hdr_len, header.gso_size) = (0, 0);
                return Ok(header);
            }
            GSO_TCPV4 => F_HOST_TSO4,
            GSO_TCPV6 => F_HOST_TSO6,
            _ => return Err("its kind of segmentation is unknown"),
        };
        if features & offered == 0 {
            return Err("its kind of segmentation is not negotiated");
        }
        if header.flags & NEEDS_CSUM == 0 {
            return Err("it asks for segmentation without checksums");
        }
        if self.gso_size < SEGMENT_MIN || usize::from(self.hdr_len) > len {
            return Err("its segments are too small, or its headers longer than the frame");
        }
        Ok(header)
    }

    /// Returns the header for a driver that negotiated `features`, of a frame from the host's kernel that
    /// takes `num_buffers` buffers. `None` if the driver cannot use the frame, because the frame was in the
    /// tap's queue when another driver used the device.
    pub(super) fn checked_to_receive(self, features: u64, num_buffers: u16) -> Option<Self> {
        let mut header = Self { num_buffers, ..self };
        match features & F_GUEST_CSUM {
            0 if self.flags & NEEDS_CSUM != 0 => return None,
            0 => header.flags = 0,
            _ => header.flags &= NEEDS_CSUM | DATA_VALID,
        }
        let needed = match self.gso_type {
            GSO_NONE => return Some(header),
            GSO_TCPV4 => F_GUEST_TSO4,
            GSO_TCPV6 => F_GUEST_TSO6,
            _ => return None,
        };
        (features & needed != 0).then_some(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 =
        F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_GUEST_TSO4 | F_GUEST_TSO6;

    const PLAIN: Header = Header {
        flags: 0,
        gso_type: GSO_NONE,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
        num_buffers: 0,
    };
    const SEGMENTS: Header = Header {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 66,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };

    #[test]
    fn a_header_is_twelve_bytes_little_endian() {
        let bytes = [1, 4, 0x42, 0, 0xa8, 5, 0x22, 0, 0x10, 0, 3, 1];
        let header = Header { gso_type: GSO_TCPV6, num_buffers: 0x103, ..SEGMENTS };
        assert_eq!(Header::from_bytes(bytes), header);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn what_a_driver_may_ask_for_is_sent_as_it_asks() {
        for (header, len) in [(PLAIN, 14), (PLAIN, FRAME_MAX), (SEGMENTS, 65_000)] {
            assert_eq!(header.checked_to_send(ALL, len), Ok(header));
        }
        let checksum = Header { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..PLAIN };
        assert_eq!(checksum.checked_to_send(ALL, 52), Ok(checksum), "the last two bytes");
        // What does not count is not passed on.
        let noise = Header { flags: 0xfe, csum_start: 9, num_buffers: 7, gso_size: 3, ..PLAIN };
        assert_eq!(noise.checked_to_send(ALL, 60), Ok(PLAIN));
    }

    #[test]
    fn absurd_headers_are_refused() {
        let refused = |header: Header, features, len| {
            header.checked_to_send(features, len).expect_err(&format!("{header:?}"))
        };
        for len in [0, 13, FRAME_MAX + 1] {
            refused(PLAIN, ALL, len);
        }
        let checksum = Header { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..PLAIN };
        refused(checksum, ALL & !F_CSUM, 60);
        refused(checksum, ALL, 51);
        refused(Header { csum_start: 13, ..checksum }, ALL, 60);
        refused(Header { csum_start: 0xffff, csum_offset: 0xffff, ..checksum }, ALL, FRAME_MAX);
        for features in [ALL & !F_HOST_TSO4, 0] {
            refused(SEGMENTS, features, 65_000);
        }
        refused(Header { gso_type: GSO_TCPV6, ..SEGMENTS }, ALL & !F_HOST_TSO6, 65_000);
        // UDP, ECN, and what is not defined.
        for gso_type in [2, 3, 5, 0x81, 0xff] {
            refused(Header { gso_type, ..SEGMENTS }, ALL, 65_000);
        }
        refused(Header { flags: 0, ..SEGMENTS }, ALL, 65_000);
        for gso_size in [0, 1, 47] {
            refused(Header { gso_size, ..SEGMENTS }, ALL, 65_000);
        }
        refused(Header { hdr_len: 61, ..SEGMENTS }, ALL, 60);
    }

    #[test]
    fn whatever_a_driver_writes_the_kernel_gets_only_what_lies_in_the_frame_and_is_negotiated() {
        let offsets = [0, 13, 14, 33, 34, 48, 59, 60, 0x7fff, 0xfffe, 0xffff];
        let sizes = [0, 1, 47, 48, 1448, 0xffff];
        let mut accepted = 0;
        for (flags, gso_type) in (0..=255).flat_map(|flags| (0..=255).map(move |gso| (flags, gso)))
        {
            // All combinations would be too many: each pair of flags and type gets another few of them.
            let pick = |list: &[u16], by: usize| {
                list[(usize::from(flags) * by + usize::from(gso_type)) % list.len()]
            };
            for len in [14, 60, 1514, FRAME_MAX] {
                for features in [0, F_CSUM, F_CSUM | F_HOST_TSO4, ALL] {
                    let header = Header {
                        flags,
                        gso_type,
                        hdr_len: pick(&offsets, 3),
                        gso_size: pick(&sizes, 5),
                        csum_start: pick(&offsets, 7),
                        csum_offset: pick(&offsets, 11),
                        num_buffers: pick(&offsets, 13),
                    };
                    let Ok(sent) = header.checked_to_send(features, len) else { continue };
                    accepted += 1;
                    assert!(sent.flags & !NEEDS_CSUM == 0 && sent.num_buffers == 0, "{header:?}");
                    let end = usize::from(sent.csum_start) + usize::from(sent.csum_offset) + 2;
                    let asks = sent.flags == NEEDS_CSUM;
                    assert!(!asks || (features & F_CSUM != 0 && end <= len), "{header:?} of {len}");
                    assert!(asks || (sent.csum_start, sent.csum_offset) == (0, 0), "{header:?}");
                    let segments = match sent.gso_type {
                        GSO_NONE => (sent.hdr_len, sent.gso_size) == (0, 0),
                        GSO_TCPV4 => features & F_HOST_TSO4 != 0,
                        GSO_TCPV6 => features & F_HOST_TSO6 != 0,
                        _ => false,
                    };
                    let sized = sent.gso_type == GSO_NONE
                        || (asks
                            && sent.gso_size >= SEGMENT_MIN
                            && usize::from(sent.hdr_len) <= len);
                    assert!(segments && sized, "{header:?} of {len}");
                }
            }
        }
        assert!(accepted > 1000, "{accepted}");
    }

    #[test]
    fn a_driver_gets_only_what_it_agreed_to() {
        let received = |header: Header, features| header.checked_to_receive(features, 1);
        let one = |header| Some(Header { num_buffers: 1, ..header });
        assert_eq!(received(PLAIN, 0), one(PLAIN));
        assert_eq!(received(SEGMENTS, ALL), one(SEGMENTS));
        assert_eq!(received(SEGMENTS, ALL & !F_GUEST_TSO4), None);
        assert_eq!(received(Header { gso_type: GSO_TCPV6, ..SEGMENTS }, ALL & !F_GUEST_TSO6), None);
        assert_eq!(received(Header { gso_type: 3, ..SEGMENTS }, ALL), None);
        assert_eq!(received(Header { flags: NEEDS_CSUM, ..PLAIN }, 0), None);
        let verified = Header { flags: DATA_VALID, ..PLAIN };
        assert_eq!(received(verified, 0), one(PLAIN));
        assert_eq!(received(verified, F_GUEST_CSUM), one(verified));
    }
}
