//! The state of the serial port.

use vm_superio::serial::SerialState;

use super::{FIFO, OUTBOX};
use crate::state::{Node, Reader, Schema, StateError};

/// `perennial,serial-v1`: the registers by their names in the 16550's data sheet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialStateV1 {
    /// Registers and receive FIFO.
    pub registers: SerialState,
    /// Output that the sink has not taken.
    pub outbox: Vec<u8>,
}

impl Schema for SerialStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,serial-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { registers, outbox } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = registers;
        node.put_u32("dll", (*baud_divisor_low).into());
        node.put_u32("dlm", (*baud_divisor_high).into());
        node.put_u32("ier", (*interrupt_enable).into());
        node.put_u32("iir", (*interrupt_identification).into());
        node.put_u32("lcr", (*line_control).into());
        node.put_u32("lsr", (*line_status).into());
        node.put_u32("mcr", (*modem_control).into());
        node.put_u32("msr", (*modem_status).into());
        node.put_u32("scr", (*scratch).into());
        node.put_bytes("receive-fifo", in_buffer);
        node.put_bytes("outbox", outbox);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let in_buffer = reader.bytes("receive-fifo")?.to_vec();
        if in_buffer.len() > FIFO {
            let problem = format!("{} bytes, the FIFO has {FIFO}", in_buffer.len());
            return Err(reader.invalid("receive-fifo", problem));
        }
        let outbox = reader.bytes("outbox")?.to_vec();
        if outbox.len() > OUTBOX {
            let problem = format!("{} bytes, at most {OUTBOX}", outbox.len());
            return Err(reader.invalid("outbox", problem));
        }
        let registers = SerialState {
            baud_divisor_low: reader.narrow("dll")?,
            baud_divisor_high: reader.narrow("dlm")?,
            interrupt_enable: reader.narrow("ier")?,
            interrupt_identification: reader.narrow("iir")?,
            line_control: reader.narrow("lcr")?,
            line_status: reader.narrow("lsr")?,
            modem_control: reader.narrow("mcr")?,
            modem_status: reader.narrow("msr")?,
            scratch: reader.narrow("scr")?,
            in_buffer,
        };
        Ok(Self { registers, outbox })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::contract_tests;

    impl SerialStateV1 {
        pub(crate) fn sample() -> Self {
            let registers = SerialState {
                baud_divisor_low: 0x0c,
                baud_divisor_high: 0x01,
                interrupt_enable: 0x03,
                interrupt_identification: 0xc1,
                line_control: 0x13,
                line_status: 0x61,
                modem_control: 0x08,
                modem_status: 0xb0,
                scratch: 0x5a,
                in_buffer: b"ls\n".to_vec(),
            };
            Self { registers, outbox: b"login: ".to_vec() }
        }
    }

    contract_tests! {
        SerialStateV1,
        sample: SerialStateV1::sample,
        changes: [
            |s| s.registers.baud_divisor_low += 1,
            |s| s.registers.baud_divisor_high += 1,
            |s| s.registers.interrupt_enable += 1,
            |s| s.registers.interrupt_identification += 1,
            |s| s.registers.line_control += 1,
            |s| s.registers.line_status += 1,
            |s| s.registers.modem_control += 1,
            |s| s.registers.modem_status += 1,
            |s| s.registers.scratch += 1,
            |s| s.registers.in_buffer = vec![1; FIFO],
            |s| s.registers.in_buffer.clear(),
            |s| s.outbox = vec![1; 3 * FIFO],
            |s| s.outbox.clear(),
        ],
        golden: "serial-v1",
    }
}
