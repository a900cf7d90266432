//! Unpacks what Linux can be built to unpack: kernels and initramfs archives in each of its compressions.
//!
//! Memory is bounded whatever the input says: a decoder's window has at most [`WINDOW`] bytes, which is what
//! kernels are compressed with, and nothing is kept besides. The number of unpacked bytes is bounded by
//! [`Limited`].

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;

use crate::lzop;

/// Largest window of a decoder, in bytes. Kernels are compressed with 32 MiB (xz) and 128 MiB (`zstd -22 --ultra`),
/// see scripts/Makefile.lib in Linux.
pub(crate) const WINDOW: u64 = 128 << 20;

/// A compression, known by how the compressed bytes begin (Linux lib/decompress.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA without a container.
    Lzma,
    /// xz.
    Xz,
    /// LZO in the format of lzop.
    Lzo,
    /// LZ4 in its legacy format.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Each compression with its first bytes.
    pub(crate) const ALL: [(Self, &'static [u8]); 7] = [
        (Self::Gzip, &[0x1f, 0x8b]),
        (Self::Bzip2, b"BZh"),
        (Self::Lzma, &[0x5d, 0, 0]),
        (Self::Xz, &[0xfd, b'7', b'z', b'X', b'Z', 0]),
        (Self::Lzo, &[0x89, b'L', b'Z', b'O']),
        (Self::Lz4, &lz4::MAGIC),
        (Self::Zstd, &[0x28, 0xb5, 0x2f, 0xfd]),
    ];

    /// Most bytes that [`Compression::of`] looks at.
    pub(crate) const MAGIC_BYTES: usize = 6;

    /// Returns the compression of bytes that begin with `start`.
    pub fn of(start: &[u8]) -> Option<Self> {
        let known = Self::ALL.iter().find(|(_, magic)| start.starts_with(magic));
        known.map(|(compression, _)| *compression)
    }

    /// The name, as in `CONFIG_KERNEL_` of a kernel's configuration but in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Whether a reader made by [`Compression::unpack`] leaves `packed` just behind the compressed bytes when it
    /// has returned the last unpacked byte.
    pub(crate) fn stops_at_its_end(self) -> bool {
        !matches!(self, Self::Bzip2 | Self::Lz4 | Self::Lzma)
    }

    /// Returns a reader of the unpacked bytes. It errors if the compressed bytes are damaged, if they end early, or
    /// if they need a window larger than [`WINDOW`].
    pub(crate) fn unpack<'a>(self, packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        const WINDOW_KIB: u32 = (WINDOW >> 10) as u32;
        // A reader needs some memory besides its window.
        const MEMORY_KIB: u32 = WINDOW_KIB + (16 << 10);
        Ok(match self {
            Self::Gzip => Box::new(GzDecoder::new(packed)),
            Self::Bzip2 => Box::new(bzip2_rs::DecoderReader::new(packed)),
            Self::Lzma => {
                Box::new(lzma_rust2::LzmaReader::new_mem_limit(packed, MEMORY_KIB, None)?)
            }
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(packed, false, MEMORY_KIB)),
            Self::Lzo => Box::new(Blocks::new(lzop::Unpacker::new(packed)?)),
            Self::Lz4 => Box::new(Blocks::new(lz4::Unpacker { packed })),
            Self::Zstd => {
                let decoder =
                    ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, WINDOW);
                Box::new(decoder.map_err(io::Error::other)?)
            }
        })
    }
}

/// A reader that errors after `left` bytes.
pub(crate) struct Limited<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Limited<R> {
    pub(crate) fn new(inner: R, most: u64) -> Self {
        Self { inner, left: most }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other("it unpacks to more bytes than it may")),
        }
        Ok(read)
    }
}

/// A format of blocks, each of which is unpacked by itself.
pub(crate) trait Unpack {
    /// Unpacks the next block into `block`, which then has at least one byte. Returns `false` at the end.
    fn next_block(&mut self, block: &mut Vec<u8>) -> io::Result<bool>;
}

/// A reader of what blocks unpack to.
struct Blocks<U> {
    unpacker: U,
    block: Vec<u8>,
    position: usize,
    is_at_end: bool,
}

impl<U: Unpack> Blocks<U> {
    fn new(unpacker: U) -> Self {
        Self { unpacker, block: Vec::new(), position: 0, is_at_end: false }
    }
}

impl<U: Unpack> Read for Blocks<U> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.block.len() && !self.is_at_end {
            self.block.clear();
            self.position = 0;
            self.is_at_end = !self.unpacker.next_block(&mut self.block)?;
        }
        let rest = &self.block[self.position..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.position += count;
        Ok(count)
    }
}

/// Reads `size` bytes. Allocates no more than `reader` has.
pub(crate) fn read_block(reader: &mut impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut block = Vec::new();
    match reader.take(size as u64).read_to_end(&mut block)? {
        read if read < size => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(block),
    }
}

/// LZ4's legacy format: the magic number, then blocks, each with its packed size, that unpack to 8 MiB each (the last
/// one to less). Linux reads and writes no other (lib/decompress_unlz4.c).
mod lz4 {
    use std::io::{self, BufRead, Read};

    use super::{Unpack, read_block};

    pub(super) const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
    /// Size of an unpacked block.
    const BLOCK: usize = 8 << 20;
    /// Largest size of a packed block: that of one that cannot be compressed.
    const PACKED: usize = BLOCK + BLOCK / 255 + 16;

    pub(super) struct Unpacker<R> {
        pub(super) packed: R,
    }

    impl<R: BufRead> Unpack for Unpacker<R> {
        fn next_block(&mut self, block: &mut Vec<u8>) -> io::Result<bool> {
            while block.is_empty() {
                let mut size = [0; 4];
                let read = self.packed.by_ref().take(4).read(&mut size)?;
                if read == 0 {
                    return Ok(false);
                }
                self.packed.read_exact(&mut size[read..])?;
                // Several streams may follow each other.
                if size == MAGIC {
                    continue;
                }
                let size = u32::from_le_bytes(size) as usize;
                if size == 0 || size > PACKED {
                    return Err(io::Error::other(format!(
                        "a block of {size} bytes, LZ4 has smaller"
                    )));
                }
                let packed = read_block(&mut self.packed, size)?;
                block.resize(BLOCK, 0);
                let unpacked = lz4_flex::block::decompress_into(&packed, block);
                block.truncate(unpacked.map_err(io::Error::other)?);
            }
            Ok(true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same text, compressed by the tools that a kernel's build runs.
    const PACKED: [(Compression, &[u8]); 7] = [
        (Compression::Gzip, include_bytes!("../fuzz/seeds/unpack/gzip")),
        (Compression::Bzip2, include_bytes!("../fuzz/seeds/unpack/bzip2")),
        (Compression::Lzma, include_bytes!("../fuzz/seeds/unpack/lzma")),
        (Compression::Xz, include_bytes!("../fuzz/seeds/unpack/xz")),
        (Compression::Lzo, include_bytes!("../fuzz/seeds/unpack/lzo")),
        (Compression::Lz4, include_bytes!("../fuzz/seeds/unpack/lz4")),
        (Compression::Zstd, include_bytes!("../fuzz/seeds/unpack/zstd")),
    ];

    /// What all of them unpack to.
    fn text() -> Vec<u8> {
        (1..=2000).flat_map(|n| format!("line {n} of a text\n").into_bytes()).collect()
    }

    fn unpack(compression: Compression, packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut unpacked = Vec::new();
        let reader = compression.unpack(packed)?;
        Limited::new(reader, 1 << 20).read_to_end(&mut unpacked)?;
        Ok(unpacked)
    }

    #[test]
    fn what_a_kernels_build_compresses_is_unpacked() {
        for (compression, packed) in PACKED {
            assert_eq!(Compression::of(packed), Some(compression));
            assert!(unpack(compression, packed).unwrap() == text(), "{}", compression.name());
        }
    }

    #[test]
    fn every_compression_is_tried_here() {
        for (compression, magic) in Compression::ALL {
            assert!(magic.len() <= Compression::MAGIC_BYTES);
            assert_eq!(Compression::of(magic), Some(compression));
            assert!(PACKED.iter().any(|(tried, _)| *tried == compression));
        }
        assert_eq!(Compression::of(b"070701"), None);
        assert_eq!(Compression::of(b""), None);
    }

    #[test]
    fn cut_anywhere_the_whole_text_does_not_come_out() {
        for (compression, packed) in PACKED {
            for length in (0..packed.len() - 8).step_by(7) {
                let unpacked = unpack(compression, &packed[..length]);
                assert!(!unpacked.is_ok_and(|u| u == text()), "{} {length}", compression.name());
            }
        }
    }

    #[test]
    fn what_follows_the_compressed_bytes_is_left_for_the_next_reader() {
        for (compression, packed) in PACKED.into_iter().filter(|(c, _)| c.stops_at_its_end()) {
            let both = [packed, b"the rest"].concat();
            let mut rest = &both[..];
            let mut unpacked = Vec::new();
            compression.unpack(&mut rest).unwrap().read_to_end(&mut unpacked).unwrap();
            assert!(unpacked == text() && rest == b"the rest", "{}", compression.name());
        }
    }

    #[test]
    fn more_than_the_limit_is_an_error() {
        let reader = Compression::Gzip.unpack(PACKED[0].1).unwrap();
        let mut unpacked = Vec::new();
        Limited::new(reader, text().len() as u64 - 1).read_to_end(&mut unpacked).unwrap_err();
        assert!(unpacked.len() < text().len());
    }

    #[test]
    fn a_window_larger_than_any_kernels_is_refused() {
        // A frame with a window of 1 GiB and one empty block.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 20 << 3, 1, 0, 0];
        assert!(unpack(Compression::Zstd, &frame).is_err());
        // A dictionary of 1 GiB.
        let lzma = [&[0x5d, 0, 0, 0, 0x40][..], &[0xff; 8], &[0; 16]].concat();
        assert!(unpack(Compression::Lzma, &lzma).is_err());
    }

    #[test]
    fn blocks_of_lz4_that_cannot_be_are_errors() {
        for block in [&[0, 0, 0, 0][..], &[0xff; 4], &[1, 0, 0], &[5, 0, 0, 0, 1]] {
            let packed = [&lz4::MAGIC[..], block].concat();
            assert!(unpack(Compression::Lz4, &packed).is_err(), "{block:?}");
        }
    }
}
