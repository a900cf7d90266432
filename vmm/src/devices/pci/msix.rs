//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2): the vector table, the pending bits, and the
//! control word of the capability. It drives interrupt lines that the machine routes.
//!
//! A vector gets a route for its message when it is first unmasked, and again when the message
//! changes. A vector that is signalled while it is masked becomes pending and fires when it is
//! unmasked. The guest chooses the messages, and they interrupt only this guest; a vector whose
//! message the machine refuses has no route and fires into nothing.

use std::sync::Arc;

use crate::kvm::interrupts::{InterruptError, Interrupts, MsiLine, MsiMessage, Route};
use crate::state::{Node, Reader, Schema, StateError};

/// Capability ID of MSI-X.
pub const CAPABILITY: u8 = 0x11;
/// Size of one table entry in bytes.
pub const ENTRY_SIZE: u64 = 16;
/// Maximum number of vectors in a table.
pub const MAX_VECTORS: u16 = 2048;

/// Control word: MSI-X is on.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Control word: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// The bits of the control word that the guest can change.
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
/// Vector control: this vector is masked.
const VECTOR_MASK: u32 = 1;

/// The MSI-X part of a function. The number of vectors is fixed when it is built.
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
    interrupts: Arc<dyn Interrupts>,
}

struct Vector {
    line: MsiLine,
    entry: Entry,
    pending: bool,
    /// The message that the line is routed to now, if any.
    routed: Option<MsiMessage>,
}

/// One entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

impl Entry {
    /// After reset every vector is masked.
    const RESET: Self = Self { address: 0, data: 0, masked: true };

    /// Returns the entry as the guest sees it: address, data, vector control.
    fn to_bytes(self) -> [u8; ENTRY_SIZE as usize] {
        let [address, rest] = self.to_words();
        (u128::from(address) | u128::from(rest) << 64).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; ENTRY_SIZE as usize]) -> Self {
        let word = u128::from_le_bytes(bytes);
        // Drops the reserved bits of the vector control: they must read as zero.
        Self {
            address: word as u64,
            data: (word >> 64) as u32,
            masked: (word >> 96) as u32 & VECTOR_MASK != 0,
        }
    }

    fn to_words(self) -> [u64; 2] {
        let control = if self.masked { VECTOR_MASK } else { 0 };
        [self.address, u64::from(control) << 32 | u64::from(self.data)]
    }

    fn message(self) -> MsiMessage {
        MsiMessage { address: self.address, data: self.data }
    }
}

impl Msix {
    /// Creates `count` vectors (1..=2048), all masked, with MSI-X off. Errors if the machine has too
    /// few interrupt lines.
    pub fn new(count: u16, interrupts: Arc<dyn Interrupts>) -> Result<Self, InterruptError> {
        debug_assert!((1..=MAX_VECTORS).contains(&count));
        let vectors = (0..count)
            .map(|_| {
                let line = interrupts.allocate()?;
                Ok(Vector { line, entry: Entry::RESET, pending: false, routed: None })
            })
            .collect::<Result<_, InterruptError>>()?;
        Ok(Self { vectors, enabled: false, function_masked: false, interrupts })
    }

    /// Returns the number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Returns the control word of the capability.
    pub fn control(&self) -> u16 {
        let enable = if self.enabled { CONTROL_ENABLE } else { 0 };
        let mask = if self.function_masked { CONTROL_FUNCTION_MASK } else { 0 };
        (self.vectors() - 1) | enable | mask
    }

    /// Handles a guest's write to the control word.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        self.route();
        self.deliver();
    }

    /// Handles a guest's read of `data.len()` bytes at `offset` in the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.entry(offset).map(|vector| vector.entry.to_bytes());
        let start = (offset % ENTRY_SIZE) as usize;
        if let Some(source) = bytes.as_ref().and_then(|b| b.get(start..start + data.len())) {
            data.copy_from_slice(source);
        }
    }

    /// Handles a guest's write at `offset` in the table: an aligned 32-bit or 64-bit word, as the
    /// specification demands. Other writes are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let index = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
        let (true, Some(vector)) = (aligned, self.vectors.get_mut(index)) else { return };
        let mut bytes = vector.entry.to_bytes();
        let start = (offset % ENTRY_SIZE) as usize;
        bytes[start..start + data.len()].copy_from_slice(data);
        vector.entry = Entry::from_bytes(bytes);
        self.route();
        self.deliver();
    }

    /// Handles a guest's read at `offset` in the array of pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = (0..8)
                .filter(|bit| {
                    let index = at.saturating_mul(8).saturating_add(*bit);
                    usize::try_from(index)
                        .ok()
                        .and_then(|index| self.vectors.get(index))
                        .is_some_and(|vector| vector.pending)
                })
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Fires `vector`, or makes it pending if it is masked. With MSI-X off the signal is dropped.
    pub fn signal(&mut self, vector: u16) {
        let fires = self.enabled && !self.function_masked;
        let Some(target) = self.vectors.get_mut(usize::from(vector)) else { return };
        if fires && !target.entry.masked {
            target.line.trigger();
        } else if self.enabled {
            target.pending = true;
        }
    }

    /// Fires all vectors that are pending and not masked.
    pub fn deliver(&mut self) {
        if !self.enabled || self.function_masked {
            return;
        }
        for vector in self.vectors.iter_mut().filter(|v| v.pending && !v.entry.masked) {
            vector.pending = false;
            vector.line.trigger();
        }
    }

    /// Clears all pending bits. Called when the function is reset.
    pub fn forget_pending(&mut self) {
        self.vectors.iter_mut().for_each(|vector| vector.pending = false);
    }

    /// Returns the state of the table, the pending bits and the control word.
    pub fn save(&self) -> MsixStateV1 {
        let Self { vectors, enabled, function_masked, interrupts: _ } = self;
        let mut pending = vec![0; vectors.len().div_ceil(64)];
        for (index, _) in vectors.iter().enumerate().filter(|(_, v)| v.pending) {
            pending[index / 64] |= 1u64 << (index % 64);
        }
        MsixStateV1 {
            enabled: *enabled,
            function_masked: *function_masked,
            table: vectors.iter().flat_map(|v| v.entry.to_words()).collect(),
            pending,
        }
    }

    /// Restores a saved state and sets up the routes; fires no vector. Errors if the saved function
    /// had a different number of vectors.
    pub fn restore(&mut self, state: MsixStateV1) -> Result<(), VectorsError> {
        let MsixStateV1 { enabled, function_masked, table, pending } = state;
        let (words, _) = table.as_chunks::<2>();
        if words.len() != self.vectors.len() || pending.len() != words.len().div_ceil(64) {
            return Err(VectorsError { saved: words.len(), here: self.vectors.len() });
        }
        for (index, (vector, [address, rest])) in self.vectors.iter_mut().zip(words).enumerate() {
            vector.entry = Entry {
                address: *address,
                data: *rest as u32,
                masked: (rest >> 32) as u32 & VECTOR_MASK != 0,
            };
            vector.pending = pending[index / 64] >> (index % 64) & 1 != 0;
        }
        self.enabled = enabled;
        self.function_masked = function_masked;
        self.route();
        Ok(())
    }

    fn entry(&self, offset: u64) -> Option<&Vector> {
        self.vectors.get(usize::try_from(offset / ENTRY_SIZE).ok()?)
    }

    /// Routes the lines of all unmasked vectors to the messages in the table.
    fn route(&mut self) {
        if !self.enabled || self.function_masked {
            return;
        }
        let changes: Vec<Route> = self
            .vectors
            .iter()
            .filter(|v| !v.entry.masked && v.routed != Some(v.entry.message()))
            .map(|v| (v.line.gsi(), Some(v.entry.message())))
            .collect();
        if changes.is_empty() {
            return;
        }
        // All routes in one call; if the machine refuses one of them, each in a call of its own, so
        // that the good ones still take effect.
        let together = self.interrupts.program(&changes).is_ok();
        for vector in &mut self.vectors {
            let Some(route) = changes.iter().find(|(gsi, _)| *gsi == vector.line.gsi()) else {
                continue;
            };
            vector.routed = match together || self.interrupts.program(&[*route]).is_ok() {
                true => route.1,
                false => {
                    tracing::debug!(
                        ?route,
                        "the machine refuses the guest's interrupt message; its vector will not fire"
                    );
                    let _ = self.interrupts.program(&[(vector.line.gsi(), None)]);
                    None
                }
            };
        }
    }
}

/// The saved table and this function's table differ in size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved function has {saved} MSI-X vectors, this one has {here}")]
pub struct VectorsError {
    saved: usize,
    here: usize,
}

/// The MSI-X state of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsixStateV1 {
    /// Control word: MSI-X is on.
    pub enabled: bool,
    /// Control word: all vectors are masked.
    pub function_masked: bool,
    /// Two words for each vector, together the 16 bytes of a table entry: first the message address,
    /// then the message data (lower half) and the vector control (upper half, 0 or 1).
    pub table: Vec<u64>,
    /// The pending bits: vector n is bit n % 64 of word n / 64.
    pub pending: Vec<u64>,
}

impl Schema for MsixStateV1 {
    const COMPATIBLE: &'static [&'static str] = &["perennial,msix-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { enabled, function_masked, table, pending } = self;
        node.put_bool("enabled", *enabled);
        node.put_bool("function-masked", *function_masked);
        node.put_u64s("table", table);
        node.put_u64s("pending", pending);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        let table = reader.u64s("table")?;
        let vectors = table.len() / 2;
        if table.len() % 2 != 0 || vectors == 0 || vectors > usize::from(MAX_VECTORS) {
            let problem = format!("{} words are not 1 to {MAX_VECTORS} vectors", table.len());
            return Err(reader.invalid("table", problem));
        }
        if let Some(word) = table.iter().skip(1).step_by(2).find(|w| *w >> 33 != 0) {
            let problem = format!("{word:#x} has reserved bits of the vector control");
            return Err(reader.invalid("table", problem));
        }
        let pending = reader.u64s("pending")?;
        let beyond = pending.last().is_some_and(|w| vectors % 64 != 0 && w >> (vectors % 64) != 0);
        if pending.len() != vectors.div_ceil(64) || beyond {
            let problem = format!("{} words do not fit {vectors} vectors", pending.len());
            return Err(reader.invalid("pending", problem));
        }
        Ok(Self {
            enabled: reader.bool("enabled")?,
            function_masked: reader.bool("function-masked")?,
            table,
            pending,
        })
    }
}

#[cfg(test)]
mod vectors;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::contract::{contract_tests, refusal};

    impl MsixStateV1 {
        /// Two vectors: the first has a message, the second is masked and pending.
        pub(crate) fn sample() -> Self {
            let masked = u64::from(VECTOR_MASK) << 32;
            Self {
                enabled: true,
                function_masked: true,
                table: vec![0xfee0_1000, 0x4021, 0xfee0_2000, masked | 0x4022],
                pending: vec![0b10],
            }
        }
    }

    contract_tests! {
        MsixStateV1,
        sample: MsixStateV1::sample,
        changes: [
            |s| s.enabled = false,
            |s| s.function_masked = false,
            |s| s.table[0] += 4,
            |s| s.table[3] &= 0xffff_ffff,
            |s| {
                s.table.truncate(2);
                s.pending[0] = 1;
            },
            |s| s.pending[0] = 0b01,
        ],
        golden: "msix-v1",
    }

    fn refused(change: fn(&mut MsixStateV1)) -> String {
        refusal(MsixStateV1::sample(), change)
    }

    #[test]
    fn an_invalid_table_is_refused() {
        assert!(refused(|s| s.table.clear()).contains("`table`: 0 words are not 1 to 2048"));
        assert!(refused(|s| s.table.truncate(3)).contains("`table`: 3 words"));
        assert!(refused(|s| s.table = vec![0; 2 * 2049]).contains("`table`: 4098 words"));
        assert!(refused(|s| s.table[1] |= 1 << 33).contains("reserved bits"));
        assert!(refused(|s| s.pending.push(0)).contains("`pending`: 2 words do not fit 2"));
        assert!(refused(|s| s.pending[0] = 0b100).contains("`pending`"));
    }
}
