//! The memory of a process during one request: its argument, and nothing around it.

use luo::builtin::decode::Fault;

use crate::conformance::system::{Argument, Place};

/// The argument where it is said to be.
pub(crate) struct Memory<'a>(&'a mut Argument);

impl<'a> Memory<'a> {
    /// Where memory ends.
    const END: u64 = 1 << 20;

    pub(crate) fn new(argument: &'a mut Argument) -> Self {
        Self(argument)
    }

    /// How many bytes of the argument are there.
    fn length(&self) -> usize {
        match self.0.place {
            Place::Null => 0,
            Place::CutAfter(length) => length.min(self.0.bytes.len()),
            _ => self.0.bytes.len(),
        }
    }

    /// Where the argument is.
    pub(crate) fn address(&self) -> u64 {
        let length = self.length() as u64;
        match self.0.place {
            Place::Null => 0,
            Place::Unaligned => Self::END - length - 1,
            _ => Self::END - length,
        }
    }

    fn bytes(&mut self, address: u64, length: usize) -> Result<&mut [u8], Fault> {
        let (base, mapped) = (self.address(), self.length());
        let start = address.checked_sub(base).and_then(|start| usize::try_from(start).ok());
        let start = start.filter(|start| *start <= mapped).ok_or(Fault)?;
        let end = start.checked_add(length).filter(|end| *end <= mapped).ok_or(Fault)?;
        Ok(&mut self.0.bytes[start..end])
    }

    pub(crate) fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        bytes.copy_from_slice(self.bytes(address, bytes.len())?);
        Ok(())
    }

    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        if self.0.place == Place::ReadOnly {
            return Err(Fault);
        }
        self.bytes(address, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
}
