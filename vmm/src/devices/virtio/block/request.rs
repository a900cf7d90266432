//! One request (5.2.6): a header that the device reads, data, and a status byte that it writes.
//!
//! A driver may cut all three into descriptors as it likes (2.7.4.1), so they are found by their
//! position in the bytes of the chain, not by descriptor.

use std::io;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::{QUEUE_SIZE, REQUEST_MAX, SECTOR, Shared, file, identification};
use crate::devices::virtio::Chain;

/// Length of the header: type, reserved, sector.
const HEADER: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// The bytes of a chain: those that the device reads, then those that it writes, without the status.
pub(super) struct Buffers<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    status: VolatileSlice<'m>,
    /// A descriptor was not as it must be; nothing of the request is executed.
    broken: bool,
}

impl<'m> Buffers<'m> {
    /// Looks up every descriptor. `None` if there is no place for the status.
    pub(super) fn collect(memory: &'m GuestMemoryMmap, chain: Chain) -> Option<Self> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut broken = false;
        for (number, descriptor) in chain.enumerate() {
            // No chain is longer than the queue (2.7.5.3.1). A table could hold 65535 descriptors,
            // and a pause waits for all of a request.
            if number == usize::from(QUEUE_SIZE) {
                broken = true;
                break;
            }
            let len = descriptor.len() as usize;
            if len == 0 {
                continue;
            }
            match memory.get_slice(descriptor.addr(), len) {
                Ok(slice) if descriptor.is_write_only() => writable.push(slice),
                // What the device reads comes before what it writes (2.7.4.2).
                Ok(slice) if writable.is_empty() => readable.push(slice),
                _ => broken = true,
            }
        }
        let last = writable.pop()?;
        let rest = last.len() - 1;
        let status = last.subslice(rest, 1).ok()?;
        if rest > 0 {
            writable.push(last.subslice(0, rest).ok()?);
        }
        Some(Self { readable, writable, status, broken })
    }

    /// Takes the header off the front of what is read.
    fn header(&mut self) -> Option<(u32, u64)> {
        let mut bytes = [0; HEADER];
        let mut filled = 0;
        while filled < HEADER {
            let first = *self.readable.first()?;
            let count = first.len().min(HEADER - filled);
            first.read_slice(&mut bytes[filled..filled + count], 0).ok()?;
            filled += count;
            match first.len() == count {
                true => drop(self.readable.remove(0)),
                false => self.readable[0] = first.offset(count).ok()?,
            }
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        Some((u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector)))
    }
}

/// Executes a request. Returns the length for the used ring: how many bytes were written at the start
/// of what the device may write (2.7.8.2). The status is the last byte, so it counts only if all
/// bytes before it were written.
pub(super) fn execute(disk: &Shared, mut buffers: Buffers<'_>) -> u32 {
    let (status, written) = match buffers.header() {
        Some((kind, sector)) if !buffers.broken => run(disk, kind, sector, &buffers),
        _ => (S_IOERR, 0),
    };
    let before_status: u64 = buffers.writable.iter().map(|slice| slice.len() as u64).sum();
    match buffers.status.write_obj(status, 0) {
        Ok(()) if u64::from(written) == before_status && !buffers.broken => {
            written.saturating_add(1)
        }
        _ => written,
    }
}

fn run(disk: &Shared, kind: u32, sector: u64, buffers: &Buffers<'_>) -> (u8, u32) {
    let done = match kind {
        T_IN => read(disk, sector, &buffers.writable),
        T_OUT => write(disk, sector, &buffers.readable).map(|()| 0),
        T_FLUSH => disk.flush().map(|()| 0),
        T_GET_ID => identify(disk, &buffers.writable),
        _ => return (S_UNSUPP, 0),
    };
    match done {
        Ok(written) => (S_OK, written),
        Err(error) => {
            tracing::debug!("disk {}: request {kind} at sector {sector}: {error}", disk.image.path);
            (S_IOERR, 0)
        }
    }
}

fn read(disk: &Shared, sector: u64, slices: &[VolatileSlice<'_>]) -> io::Result<u32> {
    let (mut offset, total) = range(disk, sector, slices)?;
    for slice in slices {
        file::read(&disk.image.file, slice, offset)?;
        offset += slice.len() as u64;
    }
    // A chain is shorter than 4 GiB: the queue sees to that.
    Ok(u32::try_from(total).unwrap_or(u32::MAX))
}

fn write(disk: &Shared, sector: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    if disk.image.readonly {
        return Err(io::ErrorKind::ReadOnlyFilesystem.into());
    }
    let (mut offset, _) = range(disk, sector, slices)?;
    for slice in slices {
        file::write(&disk.image.file, slice, offset)?;
        offset += slice.len() as u64;
    }
    match disk.driver_flushes.load(Ordering::Relaxed) {
        true => Ok(()),
        false => disk.flush(),
    }
}

fn identify(disk: &Shared, slices: &[VolatileSlice<'_>]) -> io::Result<u32> {
    let mut rest = &disk.id[..];
    for slice in slices {
        let count = slice.len().min(rest.len());
        slice.write_slice(&rest[..count], 0).map_err(io::Error::other)?;
        rest = &rest[count..];
    }
    match rest.is_empty() {
        true => Ok(identification::LEN as u32),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Offset in the file and number of bytes, if whole sectors of the disk are meant, and not too many.
fn range(disk: &Shared, sector: u64, slices: &[VolatileSlice<'_>]) -> io::Result<(u64, u64)> {
    let bytes = slices.iter().try_fold(0u64, |sum, slice| sum.checked_add(slice.len() as u64));
    let bytes = bytes.filter(|bytes| bytes.is_multiple_of(SECTOR) && *bytes <= REQUEST_MAX);
    let end = bytes.and_then(|bytes| sector.checked_add(bytes / SECTOR));
    match (bytes, end) {
        // `end` is within the disk, whose size in bytes fits 64 bits: so does this product.
        (Some(bytes), Some(end)) if end <= disk.sectors => Ok((sector * SECTOR, bytes)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
