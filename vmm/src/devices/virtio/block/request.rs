//! One request (5.2.6): a header that the device reads, data, and a status byte that it writes.
//!
//! A driver may divide the three parts into any descriptors (2.7.4.1), so their position in the bytes of the
//! chain identifies them, not their descriptor.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::transfer::{Pieces, Transfer};
use super::{QUEUE_SIZE, REQUEST_MAX, SECTOR, Shared, identification};
use crate::devices::virtio::Chain;

/// Length of the header: type, reserved, sector.
const HEADER: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Length in bytes of the range of a discard or a write-zeroes: sector, number of sectors, flags.
const RANGE: usize = 16;
/// Flag of a range: the host may free the sectors' storage.
const UNMAP: u32 = 1;

/// The status of a request (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// The work for a request.
#[derive(Debug)]
pub(super) enum Task {
    /// No work is left: the status, and the number of data bytes that were written for the guest.
    Done(Status, u64),
    /// Move data.
    Transfer(Transfer),
    /// Make completed writes durable.
    Flush,
    /// Discard or zero sectors.
    Clear(Clear),
}

impl Task {
    /// Number of bytes that it moves.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Transfer(transfer) => transfer.bytes,
            Self::Done(..) | Self::Flush | Self::Clear(_) => 0,
        }
    }
}

/// Discards or zeroes `bytes` bytes of the file from `offset` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clear {
    /// Discard or zero.
    pub(super) how: How,
    /// Offset of the first byte in the file.
    pub(super) offset: u64,
    /// Number of bytes.
    pub(super) bytes: u64,
}

/// The kind of a [`Clear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// The guest does not need the data.
    Discard,
    /// The sectors read as zeroes, and their storage is freed.
    ZeroAndUnmap,
    /// The sectors read as zeroes and keep their storage.
    Zero,
}

impl Clear {
    /// Returns what to do instead if the host has answered with `error`. Some block devices cannot zero and unmap in
    /// one, and the guest has allowed, not demanded, that storage is freed.
    pub(super) fn instead(self, error: &io::Error) -> Option<Self> {
        (self.how == How::ZeroAndUnmap && is_unsupported(error))
            .then_some(Self { how: How::Zero, ..self })
    }
}

/// Whether the host has no operation of this kind.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    // ENODEV is the answer of a character device, which only tests use.
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV))
}

/// The place for the answer to a request.
#[derive(Debug)]
pub(super) struct Answer {
    status: GuestAddress,
    /// Number of bytes that the device may write before the status.
    before_status: u64,
    /// Whether a descriptor is invalid.
    broken: bool,
}

impl Answer {
    /// Writes the status, after `written` bytes of data. Returns the length for the used ring: how
    /// many bytes were written at the start of what the device may write (2.7.8.2). The status is the
    /// last byte, so it counts only if all bytes before it were written.
    pub(super) fn give(&self, memory: &GuestMemoryMmap, status: Status, written: u64) -> u32 {
        let told = memory.write_obj(status as u8, self.status).is_ok();
        let all = told && written == self.before_status && !self.broken;
        // virtio-queue ensures that a chain is shorter than 4 GiB.
        u32::try_from(written + u64::from(all)).unwrap_or(u32::MAX)
    }
}

/// The bytes of a chain: those that the device reads, then those that it writes, without the status.
struct Buffers<'m> {
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
}

/// Parses a request. Returns `None` if the request has no byte for the status and so cannot be answered.
pub(super) fn parse(
    disk: &Shared,
    memory: &Arc<GuestMemoryMmap>,
    chain: Chain,
) -> Option<(Answer, Task)> {
    let (mut buffers, answer) = collect(memory, chain)?;
    let task = match buffers.header() {
        Some((kind, sector)) if !answer.broken => task(disk, memory, kind, sector, &buffers)
            .unwrap_or_else(|error| {
                tracing::debug!(
                    "disk {}: request {kind} at sector {sector}: {error}",
                    disk.image.path()
                );
                Task::Done(Status::IoError, 0)
            }),
        _ => Task::Done(Status::IoError, 0),
    };
    Some((answer, task))
}

/// Looks up every descriptor of a chain, and takes the status off the end.
fn collect(memory: &GuestMemoryMmap, chain: Chain) -> Option<(Buffers<'_>, Answer)> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut broken = false;
    let mut end = GuestAddress(0);
    for (number, descriptor) in chain.enumerate() {
        // No chain is longer than the queue (2.7.5.3.1). An indirect table could have 65535 descriptors, and
        // a pause would wait for all of them.
        if number == usize::from(QUEUE_SIZE) {
            broken = true;
            break;
        }
        let len = descriptor.len() as usize;
        if len == 0 {
            continue;
        }
        match memory.get_slice(descriptor.addr(), len) {
            Ok(slice) if descriptor.is_write_only() => {
                // Within RAM, so the sum is an address.
                end = GuestAddress(descriptor.addr().0 + len as u64 - 1);
                writable.push(slice);
            }
            // Descriptors that the device reads come before those that it writes (2.7.4.2).
            Ok(slice) if writable.is_empty() => readable.push(slice),
            _ => broken = true,
        }
    }
    let last = writable.pop()?;
    if last.len() > 1 {
        writable.push(last.subslice(0, last.len() - 1).ok()?);
    }
    let before_status = writable.iter().map(|slice| slice.len() as u64).sum();
    let answer = Answer { status: end, before_status, broken };
    Some((Buffers { readable, writable }, answer))
}

impl Buffers<'_> {
    /// Takes the header off the front of the bytes that the device reads.
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

fn task(
    disk: &Shared,
    memory: &Arc<GuestMemoryMmap>,
    kind: u32,
    sector: u64,
    buffers: &Buffers<'_>,
) -> io::Result<Task> {
    let transfer = |slices: &[VolatileSlice<'_>], write| {
        let bytes = slices.iter().try_fold(0u64, |sum, slice| sum.checked_add(slice.len() as u64));
        let (offset, bytes) = range(disk, sector, bytes)?;
        if bytes == 0 {
            return Ok(Task::Done(Status::Ok, 0));
        }
        let pieces = Pieces::new(memory, slices);
        let cached = disk.needs_cache(offset, bytes, &pieces);
        Ok(Task::Transfer(Transfer { write, pieces, offset, rest: bytes, bytes, cached }))
    };
    match kind {
        T_IN => transfer(&buffers.writable, false),
        T_OUT if disk.image.options.readonly => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        T_OUT => transfer(&buffers.readable, true),
        T_FLUSH if disk.image.options.readonly => Ok(Task::Done(Status::Ok, 0)),
        T_FLUSH => Ok(Task::Flush),
        T_GET_ID => identify(disk, &buffers.writable),
        T_DISCARD | T_WRITE_ZEROES if disk.image.options.readonly => {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
        T_DISCARD => clear(disk, &buffers.readable, true),
        T_WRITE_ZEROES => clear(disk, &buffers.readable, false),
        _ => Ok(Task::Done(Status::Unsupported, 0)),
    }
}

fn identify(disk: &Shared, slices: &[VolatileSlice<'_>]) -> io::Result<Task> {
    let mut rest = &disk.id[..];
    for slice in slices {
        let count = slice.len().min(rest.len());
        slice.write_slice(&rest[..count], 0).map_err(io::Error::other)?;
        rest = &rest[count..];
    }
    match rest.is_empty() {
        true => Ok(Task::Done(Status::Ok, identification::LEN as u64)),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Parses the data of a discard or a write-zeroes: one range, because the configuration allows only one
/// (`max_discard_seg`, `max_write_zeroes_seg`).
fn clear(disk: &Shared, slices: &[VolatileSlice<'_>], discard: bool) -> io::Result<Task> {
    let mut data = [0; RANGE];
    let mut rest = &mut data[..];
    for slice in slices {
        if slice.len() > rest.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (part, after) = rest.split_at_mut(slice.len());
        slice.read_slice(part, 0).map_err(io::Error::other)?;
        rest = after;
    }
    if !rest.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = data;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let how = match (discard, u32::from_le_bytes(flags)) {
        (true, 0) => How::Discard,
        (false, 0) => How::Zero,
        (false, UNMAP) => How::ZeroAndUnmap,
        // Flags that are not defined, or not for a discard (5.2.6.2).
        _ => return Ok(Task::Done(Status::Unsupported, 0)),
    };
    match range(disk, sector, Some(u64::from(sectors) * SECTOR))? {
        (_, 0) => Ok(Task::Done(Status::Ok, 0)),
        (offset, bytes) => Ok(Task::Clear(Clear { how, offset, bytes })),
    }
}

/// Returns the offset in the file of `sector`, and `bytes`. Errors if they are not whole sectors of the
/// disk, or are too many.
fn range(disk: &Shared, sector: u64, bytes: Option<u64>) -> io::Result<(u64, u64)> {
    let bytes = bytes.filter(|bytes| bytes.is_multiple_of(SECTOR) && *bytes <= REQUEST_MAX);
    let end = bytes.and_then(|bytes| sector.checked_add(bytes / SECTOR));
    match (bytes, end) {
        // `end` is within the disk, whose size in bytes fits 64 bits: so does this product.
        (Some(bytes), Some(end)) if end <= disk.sectors() => Ok((sector * SECTOR, bytes)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
