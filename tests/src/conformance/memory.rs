//! The simulated memory of a process during a request: the argument, and nothing around it.

use luo::builtin::decode::Fault;

use crate::conformance::system::{Argument, Place};

/// Memory with an argument at its [`Place`].
pub(crate) struct Memory<'a>(&'a mut Argument);

impl<'a> Memory<'a> {
    /// End of the memory: the address of the first missing byte.
    const END: u64 = 1 << 20;

    pub(crate) fn new(argument: &'a mut Argument) -> Self {
        Self(argument)
    }

    /// Number of the argument's bytes that are in memory.
    fn length(&self) -> usize {
        match self.0.place {
            Place::Null => 0,
            Place::CutAfter(length) => length.min(self.0.bytes.len()),
            _ => self.0.bytes.len(),
        }
    }

    /// Address of the argument.
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
