//! The registers of a 16550A (National Semiconductor PC16550D data sheet; Texas Instruments TL16C550C), as
//! a guest sees them. The line itself is elsewhere: a byte that the guest sends leaves through
//! [`Written::sent`], a byte that arrives comes in through [`Uart::receive`].
//!
//! ```text
//!  cause of an interrupt      pending while                       IIR     it ends with
//!  receiver line status       overrun                             0x06    a read of LSR
//!  received data              FIFO at its trigger level           0x04    reads of RBR
//!  character timeout          FIFO below its trigger level        0x0c    reads of RBR
//!  transmitter empty          set by a sent byte, or by its IER   0x02    a read of IIR, a sent byte
//!  modem status               an input changed                    0x00    a read of MSR
//! ```
//!
//! Two simplifications: a byte is on the line as soon as the guest has written it, so the transmitter is
//! always empty; and bytes arrive without pauses, so a FIFO below its trigger level times out at once.

use std::collections::VecDeque;

/// Bytes of the receive FIFO. Without FIFO mode one byte has room.
pub(super) const FIFO: usize = 16;

/// Offsets of the registers. With DLAB the first two are the divisor latch; FCR is the written side of IIR.
pub(super) const DATA: u64 = 0;
pub(super) const IER: u64 = 1;
pub(super) const IIR: u64 = 2;
pub(super) const FCR: u64 = 2;
pub(super) const LCR: u64 = 3;
pub(super) const MCR: u64 = 4;
pub(super) const LSR: u64 = 5;
pub(super) const MSR: u64 = 6;
pub(super) const SCR: u64 = 7;

/// Interrupt enable register: received data, transmitter empty, receiver line status, modem status.
const IER_DATA: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
const IER_BITS: u8 = 0x0f;
/// Interrupt identification register: no interrupt is pending; FIFO mode is on.
const IIR_NONE: u8 = 0x01;
const IIR_FIFO: u8 = 0xc0;
/// FIFO control register: FIFO mode; clear the receive FIFO; DMA mode, which has no effect here; the two
/// bits of the trigger level.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
const FCR_BITS: u8 = FCR_ENABLE | 1 << 3 | 0xc0;
/// Received bytes from which on there is a received data interrupt, by the trigger bits of FCR.
const TRIGGER: [usize; 4] = [1, 4, 8, 14];
/// Line control register: the first two registers are the divisor latch.
const LCR_DLAB: u8 = 1 << 7;
/// Modem control register: DTR, RTS, OUT1, OUT2, loopback.
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;
/// Line status register: data ready; overrun; the transmitter's two bits.
const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_EMPTY: u8 = 0x60;
/// Modem status register: the upper half has the inputs, the lower half says which have changed.
const MSR_CHANGES: u8 = 0x0f;
const MSR_RING: u8 = 1 << 6;
/// The inputs of a port whose other end is ready: DCD, DSR, CTS.
const CONNECTED: u8 = 0xb0;

/// The registers, and all else that a 16550A remembers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uart {
    /// Divisor latch, low byte. The speed has no effect.
    pub(super) dll: u8,
    /// Divisor latch, high byte.
    pub(super) dlm: u8,
    /// Interrupt enable register.
    pub(super) ier: u8,
    /// FIFO control register, without the bits that clear.
    pub(super) fcr: u8,
    /// Line control register. Only DLAB has an effect.
    pub(super) lcr: u8,
    /// Modem control register.
    pub(super) mcr: u8,
    /// Modem status register.
    pub(super) msr: u8,
    /// Scratch register.
    pub(super) scr: u8,
    /// A byte was lost because the FIFO was full; LSR has not been read since.
    pub(super) overrun: bool,
    /// The transmitter became empty, and the guest has not read that in IIR.
    pub(super) empty_pending: bool,
    /// Received bytes that the guest has not read, oldest first.
    pub(super) received: VecDeque<u8>,
}

/// What a write to a register causes outside the registers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    /// A byte for the line.
    pub(super) sent: Option<u8>,
    /// Whether to interrupt the guest.
    pub(super) interrupt: bool,
    /// Whether the port's thread may go on to receive: bytes that had no room have some now.
    pub(super) room: bool,
}

/// What a read of a register returns and causes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Read {
    /// The register's value.
    pub(super) value: u8,
    /// Whether the port's thread may go on to receive: bytes that had no room have some now.
    pub(super) room: bool,
}

impl Default for Uart {
    /// The registers as a PC's firmware leaves them: 9600 baud, 8 data bits, OUT2, no FIFO mode, no
    /// interrupts.
    fn default() -> Self {
        Self {
            dll: 0x0c,
            dlm: 0,
            ier: 0,
            fcr: 0,
            lcr: 0x03,
            mcr: 0x08,
            msr: CONNECTED,
            scr: 0,
            overrun: false,
            empty_pending: false,
            received: VecDeque::new(),
        }
    }
}

impl Uart {
    /// The guest reads a register.
    pub(super) fn read(&mut self, offset: u64) -> Read {
        let held = self.holds_input_back();
        let value = match offset {
            DATA if self.is_latch_open() => self.dll,
            IER if self.is_latch_open() => self.dlm,
            DATA => self.received.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR => self.identify(),
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.line_status(),
            MSR => {
                let status = self.msr;
                self.msr &= !MSR_CHANGES;
                status
            }
            SCR => self.scr,
            _ => 0xff,
        };
        Read { value, room: held && !self.holds_input_back() }
    }

    /// The guest writes a register.
    pub(super) fn write(&mut self, offset: u64, value: u8) -> Written {
        let held = self.holds_input_back();
        let mut written = Written::default();
        match offset {
            DATA if self.is_latch_open() => self.dll = value,
            IER if self.is_latch_open() => self.dlm = value,
            DATA => written = self.send(value),
            IER => written.interrupt = self.enable_interrupts(value & IER_BITS),
            FCR => self.control_fifo(value),
            LCR => self.lcr = value,
            MCR => written.interrupt = self.control_modem(value & MCR_BITS),
            SCR => self.scr = value,
            // LSR and MSR can be read only, and there are no others.
            _ => {}
        }
        written.room = held && !self.holds_input_back();
        written
    }

    /// Bytes that [`Uart::receive`] takes now. In loopback mode the receiver is disconnected.
    pub(super) fn room(&self) -> usize {
        match self.mcr & MCR_LOOPBACK {
            0 => self.capacity().saturating_sub(self.received.len()),
            _ => 0,
        }
    }

    /// Takes bytes from the line; those beyond [`Uart::room`] are lost. Returns whether to interrupt the
    /// guest.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().for_each(|byte| self.put(*byte));
        !bytes.is_empty() && self.ier & IER_DATA != 0
    }

    /// Most bytes in the receive FIFO.
    pub(super) fn capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    /// Whether input may wait outside. To spare a wake-up for each byte, it goes on waiting until the FIFO
    /// is empty.
    fn holds_input_back(&self) -> bool {
        self.room() == 0 || !self.received.is_empty()
    }

    fn is_latch_open(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn put(&mut self, byte: u8) {
        match self.received.len() < self.capacity() {
            true => self.received.push_back(byte),
            // With a FIFO the new byte is lost, without it the old one.
            false => {
                self.overrun = true;
                if self.fcr & FCR_ENABLE == 0 {
                    self.received = VecDeque::from([byte]);
                }
            }
        }
    }

    fn send(&mut self, byte: u8) -> Written {
        self.empty_pending = true;
        let mut written = Written { interrupt: self.ier & IER_EMPTY != 0, ..Written::default() };
        match self.mcr & MCR_LOOPBACK {
            0 => written.sent = Some(byte),
            _ => {
                self.put(byte);
                written.interrupt |= self.pending() != IIR_NONE;
            }
        }
        written
    }

    /// Returns whether an interrupt is pending that was not enabled before.
    fn enable_interrupts(&mut self, enabled: u8) -> bool {
        let new = enabled & !self.ier;
        // Drivers rely on it: enabling this interrupt while the transmitter is empty raises it.
        self.empty_pending |= new & IER_EMPTY != 0;
        self.ier = enabled;
        new != 0 && self.pending() != IIR_NONE
    }

    fn control_fifo(&mut self, value: u8) {
        let changes_mode = (value ^ self.fcr) & FCR_ENABLE != 0;
        // The other bits count only together with the mode's.
        let value = if value & FCR_ENABLE != 0 { value } else { 0 };
        if changes_mode || value & FCR_CLEAR_RECEIVE != 0 {
            self.received.clear();
        }
        self.fcr = value & FCR_BITS;
    }

    /// Returns whether to interrupt the guest: in loopback mode the four outputs are the inputs.
    fn control_modem(&mut self, value: u8) -> bool {
        self.mcr = value;
        let inputs = match value & MCR_LOOPBACK {
            0 => CONNECTED,
            // DTR is DSR, RTS is CTS, OUT1 is RI, OUT2 is DCD.
            _ => (value & 1) << 5 | (value & 2) << 3 | (value & 4) << 4 | (value & 8) << 4,
        };
        let mut changed = (inputs ^ self.msr) & !MSR_CHANGES;
        if inputs & MSR_RING != 0 {
            // Only the end of ringing counts.
            changed &= !MSR_RING;
        }
        self.msr = inputs | self.msr & MSR_CHANGES | changed >> 4;
        changed != 0 && self.ier & IER_MODEM != 0
    }

    /// The pending interrupt of the highest priority, as IIR shows it without its FIFO bits.
    fn pending(&self) -> u8 {
        let level = TRIGGER[usize::from(self.fcr >> 6)];
        let is_fifo = self.fcr & FCR_ENABLE != 0;
        if self.ier & IER_LINE != 0 && self.overrun {
            0x06
        } else if self.ier & IER_DATA != 0 && !self.received.is_empty() {
            if is_fifo && self.received.len() < level { 0x0c } else { 0x04 }
        } else if self.ier & IER_EMPTY != 0 && self.empty_pending {
            0x02
        } else if self.ier & IER_MODEM != 0 && self.msr & MSR_CHANGES != 0 {
            0x00
        } else {
            IIR_NONE
        }
    }

    /// Reads IIR. Only the interrupt that is shown ends, and only if it is the transmitter's.
    fn identify(&mut self) -> u8 {
        let pending = self.pending();
        if pending == 0x02 {
            self.empty_pending = false;
        }
        pending | if self.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 }
    }

    fn line_status(&mut self) -> u8 {
        let data = if self.received.is_empty() { 0 } else { LSR_DATA };
        let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
        LSR_EMPTY | data | overrun
    }

    /// What is wrong with registers from a state document: the property, and the problem.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        for (name, value, bits) in [
            ("ier", self.ier, IER_BITS),
            ("fcr", self.fcr, if self.fcr & FCR_ENABLE != 0 { FCR_BITS } else { 0 }),
            ("mcr", self.mcr, MCR_BITS),
        ] {
            if value & !bits != 0 {
                return Err((name, format!("{value:#x} has bits besides {bits:#x}")));
            }
        }
        if self.received.len() > self.capacity() {
            let (bytes, room) = (self.received.len(), self.capacity());
            return Err(("receive-fifo", format!("{bytes} bytes, the FIFO has room for {room}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(uart: &mut Uart, offset: u64) -> u8 {
        uart.read(offset).value
    }

    /// A port in FIFO mode with this trigger level (FCR bits 6 and 7) and all interrupts enabled.
    fn fifo(level: u8) -> Uart {
        let mut uart = Uart::default();
        uart.write(FCR, FCR_ENABLE | level << 6);
        uart.write(IER, IER_BITS);
        // Enabling the transmitter's interrupt raised it.
        assert_eq!(get(&mut uart, IIR), 0xc2);
        uart
    }

    #[test]
    fn pending_interrupts_are_shown_one_by_one_and_none_ends_another() {
        let mut uart = fifo(0);
        uart.write(DATA, b'a');
        uart.receive(&[7; FIFO + 1]);
        uart.write(MCR, MCR_LOOPBACK);
        assert_eq!(get(&mut uart, IIR), 0xc6, "receiver line status");
        assert_eq!(get(&mut uart, LSR), LSR_EMPTY | LSR_OVERRUN | LSR_DATA);
        for _ in 0..FIFO {
            assert_eq!(get(&mut uart, IIR), 0xc4, "received data");
            assert_eq!(get(&mut uart, DATA), 7);
        }
        assert_eq!(get(&mut uart, IIR), 0xc2, "transmitter empty");
        assert_eq!(get(&mut uart, IIR), 0xc0, "modem status");
        assert_eq!(get(&mut uart, MSR), MSR_CHANGES & !(1 << 2), "RI was off before and is off");
        assert_eq!(get(&mut uart, IIR), 0xc1);
    }

    #[test]
    fn a_fifo_below_its_trigger_level_times_out() {
        for (level, trigger) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
            let mut uart = fifo(level);
            for byte in 1..=trigger {
                assert!(uart.receive(&[byte]));
                let data = if byte == trigger { 0xc4 } else { 0xcc };
                assert_eq!(get(&mut uart, IIR), data, "byte {byte} of {trigger}");
            }
        }
    }

    #[test]
    fn without_fifo_mode_a_new_byte_replaces_the_old_one() {
        let mut uart = Uart::default();
        assert_eq!(uart.room(), 1);
        uart.write(IER, IER_DATA);
        uart.receive(b"ab");
        assert_eq!(get(&mut uart, IIR), 0x04, "no FIFO bits");
        assert_eq!(get(&mut uart, LSR), LSR_EMPTY | LSR_DATA | LSR_OVERRUN);
        assert_eq!(uart.read(DATA), Read { value: b'b', room: true });
        assert_eq!(get(&mut uart, LSR), LSR_EMPTY);
    }

    #[test]
    fn the_fifo_is_cleared_by_its_bit_and_by_a_change_of_the_mode() {
        for (value, left) in [(1, 3), (1 | FCR_CLEAR_RECEIVE, 0), (0, 0), (FCR_CLEAR_RECEIVE, 0)] {
            let mut uart = fifo(0);
            uart.receive(b"abc");
            assert_eq!(uart.write(FCR, value).room, left == 0, "{value}");
            assert_eq!(uart.received.len(), left, "{value}");
            // The bit is a command.
            assert_eq!(uart.fcr, value & FCR_ENABLE);
        }
        // Without the mode's bit no other counts.
        let mut uart = Uart::default();
        uart.write(FCR, 0xc0);
        assert_eq!(uart.fcr, 0);
    }

    #[test]
    fn the_transmitter_interrupts_when_it_is_enabled_and_after_each_byte() {
        let mut uart = Uart::default();
        assert!(uart.write(IER, IER_EMPTY).interrupt);
        assert_eq!((get(&mut uart, IIR), get(&mut uart, IIR)), (0x02, IIR_NONE));
        assert!(!uart.write(IER, IER_EMPTY).interrupt, "it was enabled already");
        let sent = Written { sent: Some(b'x'), interrupt: true, room: false };
        assert_eq!(uart.write(DATA, b'x'), sent);
        assert_eq!(get(&mut uart, IIR), 0x02);
        uart.write(IER, 0);
        assert!(!uart.write(DATA, b'y').interrupt);
        assert!(uart.write(IER, IER_EMPTY).interrupt);
    }

    #[test]
    fn loopback_connects_the_port_with_itself_and_with_nothing_else() {
        let mut uart = fifo(0);
        let silent = |written: Written| written.sent.is_none();
        // DTR and OUT1 on: DSR and RI.
        assert!(uart.write(MCR, MCR_LOOPBACK | 0b0101).interrupt);
        assert_eq!(get(&mut uart, MSR), 0x60 | 1 << 0 | 1 << 3, "CTS and DCD went off");
        assert_eq!(get(&mut uart, MSR), 0x60);
        assert!(silent(uart.write(DATA, b'l')));
        assert_eq!((uart.room(), get(&mut uart, DATA)), (0, b'l'));
        // Ringing ends.
        assert!(uart.write(MCR, MCR_LOOPBACK | 0b0001).interrupt);
        assert_eq!(get(&mut uart, MSR), 0x20 | 1 << 2);
        assert!(uart.write(MCR, 0x08).room);
        assert_eq!(get(&mut uart, MSR) & !MSR_CHANGES, CONNECTED);
    }

    #[test]
    fn the_divisor_latch_hides_data_and_interrupt_enable() {
        let mut uart = fifo(0);
        uart.receive(b"z");
        uart.write(LCR, LCR_DLAB);
        assert_eq!(uart.write(DATA, 1), Written::default());
        uart.write(IER, 2);
        assert_eq!((get(&mut uart, DATA), get(&mut uart, IER)), (1, 2));
        uart.write(LCR, 0x03);
        assert_eq!((get(&mut uart, DATA), get(&mut uart, IER)), (b'z', IER_BITS));
    }
}
