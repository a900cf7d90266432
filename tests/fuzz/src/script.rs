//! Reads bytes as a script: numbers, choices, and pieces of text.

/// The unread rest of a script. After the end every number is 0 and every piece is empty, so that every
/// prefix of a script is a valid script.
#[derive(Debug, Clone, Copy)]
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    /// A script from its beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all bytes are read.
    pub fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte. `None` at the end of the script.
    pub fn step(&mut self) -> Option<u8> {
        (!self.is_at_end()).then(|| self.u8())
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// All remaining bytes.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    /// A piece that is preceded by its length in one byte.
    pub fn piece(&mut self) -> &'a [u8] {
        let count = self.u8().into();
        self.bytes(count)
    }

    /// A piece that is preceded by its length in two bytes.
    pub fn long_piece(&mut self) -> &'a [u8] {
        let count = self.u16().into();
        self.bytes(count)
    }

    /// The lowest bit of a byte.
    pub fn bool(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// A little-endian number.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A little-endian number.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A little-endian number.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_that_is_cut_off_goes_on_with_nothing() {
        let mut script = Script::new(&[2, b'a', b'b', 0xcd, 0xab, 7]);
        assert_eq!(script.piece(), b"ab");
        assert_eq!(script.u16(), 0xabcd);
        assert_eq!(script.u32(), 7);
        assert_eq!((script.step(), script.u64(), script.bool()), (None, 0, false));
        assert_eq!(
            (script.piece(), script.long_piece(), script.rest()),
            (&[][..], &[][..], &[][..])
        );
    }
}
