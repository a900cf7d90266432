//! What is booted from the disk: a kernel, or an initramfs that may be several files one behind the other.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::file_system::DiskFile;
use super::view::sought;

/// Bytes that are copied into guest memory at once.
const PIECE: usize = 64 << 10;

/// One or more pieces of files of the disk, read one behind the other.
pub struct Image {
    pieces: Vec<Piece>,
    bytes: u64,
    position: u64,
}

struct Piece {
    file: DiskFile,
    /// The first byte in the file.
    start: u64,
    bytes: u64,
    /// Zeroes behind it.
    padding: u64,
}

/// Each piece of an image but the last has a multiple of this many bytes: Linux finds an archive of an initramfs only
/// where a multiple begins, and GRUB and systemd's stub add the zeroes too.
const ALIGNMENT: u64 = 4;

impl Image {
    /// Whole files.
    pub(super) fn new(files: Vec<DiskFile>) -> Self {
        Self::of_pieces(files.into_iter().map(|file| (0, file.bytes, file)))
    }

    /// Pieces of files: the first byte of each, its length, and the file.
    pub(super) fn of_pieces(pieces: impl Iterator<Item = (u64, u64, DiskFile)>) -> Self {
        let padding = |bytes: u64| bytes.wrapping_neg() % ALIGNMENT;
        let mut pieces: Vec<_> = pieces
            .map(|(start, bytes, file)| Piece { file, start, bytes, padding: padding(bytes) })
            .collect();
        if let Some(last) = pieces.last_mut() {
            last.padding = 0;
        }
        let padded = |piece: &Piece| piece.bytes.saturating_add(piece.padding);
        let bytes = pieces.iter().map(padded).fold(0, u64::saturating_add);
        Self { pieces, bytes, position: 0 }
    }
}

impl Read for Image {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let mut start = 0;
        for piece in &mut self.pieces {
            let offset = self.position - start;
            if offset < piece.bytes {
                piece.file.seek(SeekFrom::Start(piece.start.saturating_add(offset)))?;
                let left = usize::try_from(piece.bytes - offset).unwrap_or(usize::MAX);
                let most = left.min(target.len());
                let count = piece.file.read(&mut target[..most])?;
                self.position += count as u64;
                return Ok(count);
            }
            let left = piece.padding.saturating_sub(offset - piece.bytes);
            if left > 0 {
                let count = target.len().min(left as usize);
                target[..count].fill(0);
                self.position += count as u64;
                return Ok(count);
            }
            start += piece.bytes + piece.padding;
        }
        Ok(0)
    }
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = sought(to, self.position, self.bytes)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Image {
    /// Fills the target, unless the image ends before: loaders of kernels take a short read for the end, because
    /// a read of a file has none.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut piece = vec![0; PIECE.min(target.len())];
        let mut done = 0;
        while done < target.len() {
            let most = piece.len().min(target.len() - done);
            let count = self.read(&mut piece[..most]).map_err(VolatileMemoryError::IOError)?;
            if count == 0 {
                break;
            }
            target.write_slice(&piece[..count], done)?;
            done += count;
        }
        Ok(done)
    }
}
