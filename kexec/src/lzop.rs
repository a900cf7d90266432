//! Unpacks LZO in the format of lzop: a header with a checksum, then blocks, each with a checksum of what it unpacks
//! to, up to a size of zero.
//!
//! Only what Linux unpacks too (lib/decompress_unlzo.c) is accepted: blocks of at most 256 KiB with one checksum each,
//! which is how `lzop` writes them unless it is told otherwise. Linux ignores the checksums. Here a wrong one is an
//! error, because it shows a damaged file. All numbers are big-endian.

use std::io::{self, Read};

use crate::compression::{Unpack, read_block};

/// How a file begins.
const MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, b'\r', b'\n', 0x1a, b'\n'];

/// Most bytes that a block unpacks to (`LZO_BLOCK_SIZE`).
const BLOCK: usize = 256 << 10;
/// The first version of lzop with a level and a time of 64 bits in the header.
const VERSION_WITH_LEVEL: u16 = 0x940;
/// The methods, all of which write LZO1X: LZO1X-1, LZO1X-1(15) and LZO1X-999.
const METHODS: [u8; 3] = [1, 2, 3];
/// Flags of a header (conf.h in lzop): the checksum of what a block unpacks to.
const UNPACKED_ADLER32: u32 = 1;
const UNPACKED_CRC32: u32 = 0x100;
/// Flag: the header's checksum is a CRC-32, not an Adler-32.
const HEADER_CRC32: u32 = 0x1000;
/// Flags of what Linux would take for something else: checksums of packed blocks, an extra field, a filter.
const UNREADABLE: [(u32, &str); 4] = [
    (2, "an Adler-32 checksum of each packed block"),
    (0x200, "a CRC-32 checksum of each packed block"),
    (0x40, "an extra field in its header"),
    (0x800, "a filter"),
];

type Checksum = fn(&[u8]) -> u32;

/// The blocks of one file.
pub(crate) struct Unpacker<R> {
    packed: R,
    checksum: Checksum,
}

impl<R: Read> Unpacker<R> {
    /// Reads the header.
    pub(crate) fn new(packed: R) -> io::Result<Self> {
        let mut header = Header { packed, bytes: Vec::new() };
        if header.next::<9>()? != MAGIC {
            return Err(io::Error::other("it does not begin like a file of lzop"));
        }
        let has_level = u16::from_be_bytes(header.next()?) >= VERSION_WITH_LEVEL;
        // The version of the library, and the version that can unpack it.
        header.next::<4>()?;
        let [method] = header.next()?;
        if has_level {
            header.next::<1>()?;
        }
        let flags = u32::from_be_bytes(header.next()?);
        if let Some((_, what)) = UNREADABLE.iter().find(|(flag, _)| flags & flag != 0) {
            return Err(io::Error::other(format!("Linux does not unpack LZO with {what}")));
        }
        if !METHODS.contains(&method) {
            return Err(io::Error::other(format!("method {method} of lzop is not LZO1X")));
        }
        let checksum: Checksum = match (flags & UNPACKED_ADLER32, flags & UNPACKED_CRC32) {
            (0, 0) => return Err(io::Error::other("Linux does not unpack LZO without checksums")),
            (_, 0) => adler2::adler32_slice,
            (0, _) => crc32fast::hash,
            _ => return Err(io::Error::other("Linux does not unpack LZO with two checksums")),
        };
        // The file's mode, and its time.
        header.next::<8>()?;
        if has_level {
            header.next::<4>()?;
        }
        let [name_length] = header.next()?;
        for _ in 0..name_length {
            header.next::<1>()?;
        }
        let of_header: Checksum = match flags & HEADER_CRC32 {
            0 => adler2::adler32_slice,
            _ => crc32fast::hash,
        };
        let is = of_header(&header.bytes[MAGIC.len()..]);
        let expected = u32::from_be_bytes(header.next()?);
        check("the header", is, expected)?;
        Ok(Self { packed: header.packed, checksum })
    }
}

impl<R: Read> Unpack for Unpacker<R> {
    fn next_block(&mut self, block: &mut Vec<u8>) -> io::Result<bool> {
        let mut number = || {
            let mut bytes = [0; 4];
            self.packed.read_exact(&mut bytes)?;
            io::Result::Ok(u32::from_be_bytes(bytes))
        };
        let size = number()? as usize;
        if size == 0 {
            return Ok(false);
        }
        let (packed_size, expected) = (number()? as usize, number()?);
        if size > BLOCK || packed_size == 0 || packed_size > size {
            let problem =
                format!("a block of {packed_size} bytes that unpacks to {size}: LZO has none such");
            return Err(io::Error::other(problem));
        }
        let packed = read_block(&mut self.packed, packed_size)?;
        if packed_size == size {
            // It cannot be compressed.
            *block = packed;
        } else {
            block.resize(size, 0);
            let unpacked = lzo::decompress_into(&packed, block).map_err(io::Error::other)?;
            if unpacked != size {
                let problem = format!("a block of {size} bytes unpacks to {unpacked}");
                return Err(io::Error::other(problem));
            }
        }
        check("a block", (self.checksum)(block), expected)?;
        Ok(true)
    }
}

/// Reads a header, and keeps what it has read for the checksum.
struct Header<R> {
    packed: R,
    bytes: Vec<u8>,
}

impl<R: Read> Header<R> {
    fn next<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.packed.read_exact(&mut bytes)?;
        self.bytes.extend_from_slice(&bytes);
        Ok(bytes)
    }
}

/// Errors if the checksum of `what` is not the expected one.
fn check(what: &str, is: u32, expected: u32) -> io::Result<()> {
    match is == expected {
        true => Ok(()),
        false => {
            let problem = format!("{what} has the checksum {is:#x}, but {expected:#x} is recorded");
            Err(io::Error::other(problem))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by lzop 1.04, `lzop -9` if nothing else is said: a text in one block.
    const TEXT: &[u8] = include_bytes!("../fuzz/seeds/unpack/lzo");
    /// 600,000 bytes in three blocks: byte i is i modulo 251. Of a file with a name (`lzop -9 pattern`).
    const THREE_BLOCKS: &[u8] = include_bytes!("../fuzz/seeds/unpack/lzo-three-blocks");
    /// 300 random bytes, which are stored, with `lzop -9 --crc32`.
    const STORED: &[u8] = include_bytes!("../fuzz/seeds/unpack/lzo-stored-crc32");
    /// The text with `lzop -1 -CC`, which writes a second checksum of each block.
    const TWO_CHECKSUMS: &[u8] = include_bytes!("../fuzz/seeds/unpack/lzo-two-checksums");

    /// Where the header of a file without a name has its flags, and its checksum.
    const FLAGS: usize = 17;
    const HEADER_CHECKSUM: usize = 34;
    /// Where the first block of such a file begins.
    const FIRST_BLOCK: usize = HEADER_CHECKSUM + 4;

    fn unpack(packed: &[u8]) -> Result<Vec<u8>, String> {
        let mut unpacker = Unpacker::new(packed).map_err(|error| error.to_string())?;
        let (mut all, mut block) = (Vec::new(), Vec::new());
        while unpacker.next_block(&mut block).map_err(|error| error.to_string())? {
            all.append(&mut block);
        }
        Ok(all)
    }

    /// `packed` with other bytes at `at`, and with the header's checksum that belongs to them.
    fn changed(packed: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
        let mut packed = packed.to_vec();
        packed[at..at + with.len()].copy_from_slice(with);
        let checksum = adler2::adler32_slice(&packed[MAGIC.len()..HEADER_CHECKSUM]);
        packed[HEADER_CHECKSUM..FIRST_BLOCK].copy_from_slice(&checksum.to_be_bytes());
        packed
    }

    #[test]
    fn blocks_of_lzop_are_unpacked_compressed_or_stored_with_either_checksum() {
        let pattern: Vec<u8> = (0..600_000_u32).map(|i| (i % 251) as u8).collect();
        assert!(unpack(THREE_BLOCKS).unwrap() == pattern);
        let stored = unpack(STORED).unwrap();
        assert_eq!(stored.len(), 300);
        assert!(STORED.windows(300).any(|bytes| bytes == stored));
    }

    #[test]
    fn a_changed_byte_is_an_error_wherever_a_checksum_or_the_format_covers_it() {
        for packed in [TEXT, STORED] {
            for at in 0..packed.len() {
                let mut changed = packed.to_vec();
                changed[at] ^= 0x10;
                assert!(unpack(&changed).is_err(), "byte {at} of {}", packed.len());
            }
        }
        let mut changed = TEXT.to_vec();
        changed[HEADER_CHECKSUM] ^= 1;
        assert!(unpack(&changed).unwrap_err().contains("the header has the checksum"));
        let mut changed = STORED.to_vec();
        changed[100] ^= 1;
        assert!(unpack(&changed).unwrap_err().contains("a block has the checksum"));
    }

    #[test]
    fn what_linux_does_not_unpack_is_refused_by_name() {
        let flags = |flags: u32| unpack(&changed(TEXT, FLAGS, &flags.to_be_bytes())).unwrap_err();
        assert!(unpack(&changed(TEXT, FLAGS, &1_u32.to_be_bytes())).is_ok());
        assert!(unpack(TWO_CHECKSUMS).unwrap_err().contains("checksum of each packed block"));
        assert!(flags(0x201).contains("CRC-32 checksum of each packed block"));
        assert!(flags(0x41).contains("an extra field"));
        assert!(flags(0x801).contains("a filter"));
        assert!(flags(0).contains("without checksums"));
        assert!(flags(0x101).contains("two checksums"));
        let method = unpack(&changed(TEXT, FLAGS - 2, &[0x80])).unwrap_err();
        assert!(method.contains("method 128"), "{method}");
        let magic = unpack(&changed(TEXT, 4, &[1])).unwrap_err();
        assert!(magic.contains("begin like"), "{magic}");
    }

    #[test]
    fn sizes_that_linux_refuses_are_errors_before_anything_is_read() {
        let too_large = (BLOCK as u32 + 1).to_be_bytes();
        for (size, packed_size) in [(too_large, [0, 0, 0, 9]), ([0, 0, 0, 9], [0; 4])] {
            let sizes = [size, packed_size].concat();
            let error = unpack(&changed(TEXT, FIRST_BLOCK, &sizes)).unwrap_err();
            assert!(error.contains("LZO has none such"), "{error}");
        }
        let error = unpack(&changed(TEXT, FIRST_BLOCK, &[0, 0, 0, 9, 0, 0, 0, 10])).unwrap_err();
        assert!(error.contains("a block of 10 bytes that unpacks to 9"), "{error}");
    }

    #[test]
    fn the_header_of_an_early_lzop_has_no_level_and_a_shorter_time() {
        let mut early = changed(TEXT, MAGIC.len(), &0x93f_u16.to_be_bytes());
        early.drain(HEADER_CHECKSUM - 5..HEADER_CHECKSUM - 1);
        early.remove(FLAGS - 1);
        let end = HEADER_CHECKSUM - 5;
        let checksum = adler2::adler32_slice(&early[MAGIC.len()..end]);
        early[end..end + 4].copy_from_slice(&checksum.to_be_bytes());
        assert!(unpack(&early).unwrap() == unpack(TEXT).unwrap());
    }
}
