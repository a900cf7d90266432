//! The state of the serial port.

use super::OUTBOX;
use super::uart::Uart;
use crate::state::{Node, Reader, Schema, StateError};

/// `perennial,serial-v1`: the registers by their names in the 16550's data sheet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialStateV1 {
    /// Registers and receive FIFO.
    pub registers: Uart,
    /// Output that the sink has not taken.
    pub outbox: Vec<u8>,
}

impl Schema for SerialStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,serial-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { registers, outbox } = self;
        let Uart { dll, dlm, ier, fcr, lcr, mcr, msr, scr, overrun, empty_pending, received } =
            registers;
        for (name, value) in [
            ("dll", dll),
            ("dlm", dlm),
            ("ier", ier),
            ("fcr", fcr),
            ("lcr", lcr),
            ("mcr", mcr),
            ("msr", msr),
            ("scr", scr),
        ] {
            node.put_u32(name, (*value).into());
        }
        node.put_bool("overrun", *overrun);
        node.put_bool("transmitter-empty-pending", *empty_pending);
        node.put_bytes("receive-fifo", &received.iter().copied().collect::<Vec<_>>());
        node.put_bytes("outbox", outbox);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let registers = Uart {
            dll: reader.narrow("dll")?,
            dlm: reader.narrow("dlm")?,
            ier: reader.narrow("ier")?,
            fcr: reader.narrow("fcr")?,
            lcr: reader.narrow("lcr")?,
            mcr: reader.narrow("mcr")?,
            msr: reader.narrow("msr")?,
            scr: reader.narrow("scr")?,
            overrun: reader.bool("overrun")?,
            empty_pending: reader.bool("transmitter-empty-pending")?,
            received: reader.bytes("receive-fifo")?.to_vec().into(),
        };
        registers.check().map_err(|(property, problem)| reader.invalid(property, problem))?;
        let outbox = reader.bytes("outbox")?.to_vec();
        if outbox.len() > OUTBOX {
            let problem = format!("{} bytes, at most {OUTBOX}", outbox.len());
            return Err(reader.invalid("outbox", problem));
        }
        Ok(Self { registers, outbox })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::uart::FIFO;
    use crate::state::contract::{contract_tests, refusal};

    impl SerialStateV1 {
        pub(crate) fn sample() -> Self {
            let registers = Uart {
                dll: 0x0c,
                dlm: 0x01,
                ier: 0x03,
                fcr: 0x81,
                lcr: 0x13,
                mcr: 0x08,
                msr: 0xb1,
                scr: 0x5a,
                overrun: false,
                empty_pending: true,
                received: b"ls\n".to_vec().into(),
            };
            Self { registers, outbox: b"login: ".to_vec() }
        }
    }

    contract_tests! {
        SerialStateV1,
        sample: SerialStateV1::sample,
        changes: [
            |s| s.registers.dll += 1,
            |s| s.registers.dlm += 1,
            |s| s.registers.ier += 1,
            |s| s.registers.fcr = 0x41,
            |s| s.registers.lcr += 1,
            |s| s.registers.mcr += 1,
            |s| s.registers.msr += 1,
            |s| s.registers.scr += 1,
            |s| s.registers.overrun = true,
            |s| s.registers.empty_pending = false,
            |s| s.registers.received = vec![1; FIFO].into(),
            |s| s.registers.received.clear(),
            |s| s.outbox = vec![1; 3 * FIFO],
            |s| s.outbox.clear(),
        ],
        golden: "serial-v1",
    }

    #[test]
    fn registers_that_no_guest_can_have_written_are_refused_by_name() {
        for (change, property) in [
            ((|s| s.registers.ier = 0x10) as fn(&mut SerialStateV1), "ier"),
            (|s| s.registers.fcr = 0x20, "fcr"),
            (|s| s.registers.fcr = 0x80, "fcr"),
            (|s| s.registers.mcr = 0x20, "mcr"),
            (|s| s.registers.received = vec![1; FIFO + 1].into(), "receive-fifo"),
            (|s| s.registers.fcr = 0, "receive-fifo"),
            (|s| s.outbox = vec![1; OUTBOX + 1], "outbox"),
        ] {
            let error = refusal(SerialStateV1::sample(), change);
            assert!(error.contains(&format!("`{property}`")), "{property}: {error}");
        }
    }
}
