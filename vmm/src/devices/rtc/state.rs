//! The state of the real-time clock.

use super::registers::{A, B, C, CMOS, D, Registers, UPDATING};
use super::time::Seen;
use crate::state::{Node, Reader, Schema, StateError};

/// `perennial,rtc-v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RtcStateV1 {
    /// Index register and CMOS memory.
    pub registers: Registers,
    /// The clock's date minus the host's, in seconds.
    pub offset_s: i64,
    /// The clocks at the pause.
    pub seen: Seen,
}

/// Most that the clock's date may differ from the host's: the years 0 to 9999 are 3.2 * 10^11 s.
pub(super) const MOST_OFFSET_S: i64 = 1 << 39;

impl Schema for RtcStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,rtc-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { registers, offset_s, seen } = self;
        let Registers { index, cmos } = registers;
        let Seen { realtime_ns, clock_ns } = seen;
        node.put_u32("index", (*index).into());
        node.put_bytes("cmos", cmos);
        // Two's complement.
        node.put_u64("offset-s", offset_s.cast_unsigned());
        node.put_u64("realtime-ns", *realtime_ns);
        node.put_u64("clock-ns", *clock_ns);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let index: u8 = reader.narrow("index")?;
        let bytes = reader.bytes("cmos")?;
        let cmos = <[u8; CMOS]>::try_from(bytes).map_err(|_| {
            reader.invalid("cmos", format!("{} bytes, an RTC has {CMOS}", bytes.len()))
        })?;
        let offset_s = reader.u64("offset-s")?.cast_signed();
        let seen =
            Seen { realtime_ns: reader.u64("realtime-ns")?, clock_ns: reader.u64("clock-ns")? };
        if usize::from(index) >= CMOS {
            return Err(reader.invalid("index", format!("{index}, an RTC has {CMOS} bytes")));
        }
        if cmos[A] & UPDATING != 0 || cmos[C] & 0x8f != 0 || cmos[D] != 0 {
            let found = [A, B, C, D].map(|register| cmos[register]);
            let problem =
                format!("registers A to D are {found:02x?}, with bits that are not stored");
            return Err(reader.invalid("cmos", problem));
        }
        if !(-MOST_OFFSET_S..=MOST_OFFSET_S).contains(&offset_s) {
            let problem = format!("{offset_s} s lead beyond the years 0 to 9999");
            return Err(reader.invalid("offset-s", problem));
        }
        Ok(Self { registers: Registers { index, cmos }, offset_s, seen })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::{contract_tests, refusal};

    impl RtcStateV1 {
        pub(crate) fn sample() -> Self {
            let mut cmos = [0; CMOS];
            for (at, byte) in (1..).zip(&mut cmos) {
                *byte = at;
            }
            (cmos[A], cmos[B], cmos[C], cmos[D]) = (0x26, 0x32, 0x10, 0);
            let seen = Seen { realtime_ns: 1_795_000_000_000_000_000, clock_ns: 500 };
            Self { registers: Registers { index: 0x0b, cmos }, offset_s: -3600, seen }
        }
    }

    contract_tests! {
        RtcStateV1,
        sample: RtcStateV1::sample,
        changes: [
            |s| s.registers.index += 1,
            |s| s.registers.cmos[0] += 1,
            |s| s.registers.cmos[127] += 1,
            |s| s.offset_s += 1,
            |s| s.seen.realtime_ns += 1,
            |s| s.seen.clock_ns += 1,
        ],
        golden: "rtc-v1",
    }

    #[test]
    fn values_that_no_clock_can_have_are_refused_by_name() {
        for (change, property) in [
            ((|s| s.registers.index = 128) as fn(&mut RtcStateV1), "index"),
            (|s| s.registers.cmos[A] |= 0x80, "cmos"),
            (|s| s.registers.cmos[C] |= 0x80, "cmos"),
            (|s| s.registers.cmos[D] = 0x80, "cmos"),
            (|s| s.offset_s = i64::MIN, "offset-s"),
            (|s| s.offset_s = MOST_OFFSET_S + 1, "offset-s"),
        ] {
            let error = refusal(RtcStateV1::sample(), change);
            assert!(error.contains(&format!("`{property}`")), "{property}: {error}");
        }
    }
}
