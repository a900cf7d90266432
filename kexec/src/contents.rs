//! What a kernel has built in, found in its image: the versions of its handover formats, its configuration if it
//! carries it (`CONFIG_IKCONFIG`), and strings that only certain code has.
//!
//! A kernel that does not run yet can be asked in no other way. Strings are a heuristic: what is not found is
//! unknown, never absent. Only a configuration proves that something is missing.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};

use flate2::bufread::GzDecoder;
use memchr::memmem;

use crate::Kernel;
use crate::abi::Abi;
use crate::archive::At;
use crate::compression::{Compression, Limited};

/// Most bytes of an unpacked kernel.
const MOST_UNPACKED: u64 = 1 << 30;
/// Most bytes of a kernel's configuration, compressed and unpacked.
const MOST_PACKED_CONFIG: usize = 1 << 20;
const MOST_CONFIG: u64 = 4 << 20;
/// The texts around the compressed configuration (kernel/configs.c).
const CONFIG_START: &[u8] = b"IKCFG_ST";
const CONFIG_END: &[u8] = b"IKCFG_ED";

/// Why the contents of a kernel are not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContentsError {
    /// The kernel is compressed in an unknown way, or not at all.
    #[error("it is compressed with an unknown method")]
    Compression,
    /// The kernel's file cannot be read, or its compressed part is damaged.
    #[error("it cannot be unpacked")]
    Unpack(#[from] io::Error),
}

/// What a kernel has built in.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    /// The versions of the handover formats.
    pub abi: Abi,
    /// The kernel's configuration, if it carries it: `CONFIG_X` and its value.
    config: Option<BTreeMap<String, String>>,
    /// Which of the searched strings it has.
    strings: Vec<&'static str>,
}

/// A part of a kernel that can be built in, a module, or missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its symbol in the kernel's configuration, with `CONFIG_`.
    pub symbol: &'static str,
    /// A string that only a kernel with the part built in contains; empty if none is known. At most
    /// [`Part::LONGEST_STRING`] bytes.
    pub string: &'static str,
}

impl Part {
    /// Most bytes of [`Part::string`].
    pub const LONGEST_STRING: usize = 64;
}

/// Where a kernel has a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Built in.
    BuiltIn,
    /// In a module.
    Module,
    /// Nowhere.
    Absent,
    /// Not known.
    Unknown,
}

impl Contents {
    /// Unpacks `kernel` in pieces and searches it, among other things for the strings of `parts`.
    pub fn of(kernel: &Kernel, parts: &[Part]) -> Result<Self, ContentsError> {
        Self::search(kernel, parts, false)
    }

    /// As [`Contents::of`], but only as far as needed to know that all `parts` are built in.
    pub fn of_parts(kernel: &Kernel, parts: &[Part]) -> Result<Self, ContentsError> {
        Self::search(kernel, parts, true)
    }

    fn search(kernel: &Kernel, parts: &[Part], only_parts: bool) -> Result<Self, ContentsError> {
        let (offset, length) = kernel.payload;
        let payload = |length| At { file: &kernel.file, position: offset }.take(length);
        let mut magic = Vec::new();
        payload(length.min(Compression::MAGIC_BYTES as u64)).read_to_end(&mut magic)?;
        let compression = Compression::of(&magic);
        // The build appends the unpacked size to the payload, except with gzip, which has it by itself.
        let length = match compression {
            Some(Compression::Gzip) => length,
            _ => length.saturating_sub(4),
        };
        let payload = BufReader::with_capacity(1 << 18, payload(length));
        let unpacked = compression.ok_or(ContentsError::Compression)?.unpack(payload)?;
        Ok(Self::of_reader(Limited::new(unpacked, MOST_UNPACKED), parts, only_parts)?)
    }

    /// Searches an unpacked kernel: all of it, or `only_parts`.
    fn of_reader(mut reader: impl Read, parts: &[Part], only_parts: bool) -> io::Result<Self> {
        /// Bytes of a piece that are searched again with the next piece, so that a string across two pieces is
        /// found: at least the longest string, a byte before it and one after it.
        const OVERLAP: usize = Part::LONGEST_STRING + 2;
        const PIECE: usize = 1 << 18;
        let mut contents = Self::default();
        let mut config = PackedConfig::default();
        let mut wanted: Vec<&Part> = parts.iter().collect();
        let mut buffer = Vec::with_capacity(OVERLAP + PIECE);
        loop {
            let before = buffer.len();
            let read = reader.by_ref().take(PIECE as u64).read_to_end(&mut buffer)?;
            contents.abi.collect(&buffer);
            wanted.retain(|part| {
                let string = part.string.as_bytes();
                let is_found = !string.is_empty() && memmem::find(&buffer, string).is_some();
                if is_found {
                    contents.strings.push(part.string);
                }
                !is_found
            });
            config.collect(&buffer, before);
            if read == 0 || (only_parts && wanted.is_empty()) {
                contents.config = config.unpack();
                return Ok(contents);
            }
            buffer.drain(..buffer.len().saturating_sub(OVERLAP));
        }
    }

    /// Whether it is known which parts the kernel lacks.
    pub fn has_config(&self) -> bool {
        self.config.is_some()
    }

    /// Says where the kernel has a part, which must be among those that it was searched for.
    pub fn presence(&self, part: Part) -> Presence {
        match &self.config {
            Some(config) => match config.get(part.symbol).map(String::as_str) {
                Some("y") => Presence::BuiltIn,
                Some("m") => Presence::Module,
                _ => Presence::Absent,
            },
            None if self.strings.contains(&part.string) => Presence::BuiltIn,
            None => Presence::Unknown,
        }
    }
}

/// The compressed configuration within a kernel, as it is found piece by piece.
#[derive(Default)]
struct PackedConfig {
    /// `None` before its start.
    bytes: Option<Vec<u8>>,
    is_complete: bool,
}

impl PackedConfig {
    /// Searches a piece, the first `known` bytes of which were in the last one.
    fn collect(&mut self, piece: &[u8], known: usize) {
        if self.is_complete {
            return;
        }
        let new = match &mut self.bytes {
            Some(bytes) => {
                bytes.extend_from_slice(&piece[known..]);
                bytes
            }
            None => {
                let Some(start) = memmem::find(piece, CONFIG_START) else { return };
                self.bytes.insert(piece[start + CONFIG_START.len()..].to_vec())
            }
        };
        if let Some(end) = memmem::find(new, CONFIG_END) {
            new.truncate(end);
            self.is_complete = true;
        } else if new.len() > MOST_PACKED_CONFIG {
            // The text stands somewhere else, too.
            self.bytes = None;
            self.is_complete = true;
        }
    }

    /// Returns the configuration; `None` if there is no complete one.
    fn unpack(self) -> Option<BTreeMap<String, String>> {
        let bytes = self.bytes.filter(|_| self.is_complete)?;
        let mut text = Vec::new();
        GzDecoder::new(&bytes[..]).take(MOST_CONFIG).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        let settings = text.lines().filter_map(|line| line.split_once('='));
        let settings = settings.filter(|(symbol, _)| symbol.starts_with("CONFIG_"));
        let settings: BTreeMap<_, _> =
            settings.map(|(symbol, value)| (symbol.to_owned(), value.to_owned())).collect();
        (!settings.is_empty()).then_some(settings)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;

    use flate2::write::GzEncoder;

    use super::*;
    use crate::image::tests::{bzimage, file};

    const KVM: Part = Part { symbol: "CONFIG_KVM", string: "kvm-vcpu:%d" };
    const EXT4: Part = Part { symbol: "CONFIG_EXT4_FS", string: "EXT4-fs" };
    const XFS: Part = Part { symbol: "CONFIG_XFS_FS", string: "" };

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn of_payload(payload: &[u8]) -> Result<Contents, ContentsError> {
        let (_dir, path) = file(&bzimage(payload));
        Contents::of(&Kernel::open(&path).unwrap(), &[KVM, EXT4, XFS])
    }

    fn of_bytes(bytes: &[u8]) -> Contents {
        Contents::of_reader(bytes, &[KVM, EXT4, XFS], false).unwrap()
    }

    #[test]
    fn the_search_for_parts_alone_ends_when_all_are_found() {
        let (first, second) =
            (b"EXT4-fs kvm-vcpu:%d\0", [vec![0; 1 << 20], b"\0luo-v5\0".to_vec()].concat());
        let mut reader = first.chain(&second[..]);
        let contents = Contents::of_reader(&mut reader, &[KVM, EXT4], true).unwrap();
        assert_eq!(contents.presence(KVM), Presence::BuiltIn);
        assert!(contents.abi.luo.is_empty() && reader.read(&mut [0; 8]).unwrap() > 0);
        let contents = Contents::of_reader(&mut first.chain(&second[..]), &[XFS], true).unwrap();
        assert!(
            !contents.abi.luo.is_empty(),
            "a part without a string shows in a configuration only"
        );
    }

    fn set(versions: &[&str]) -> BTreeSet<String> {
        versions.iter().map(|version| (*version).to_owned()).collect()
    }

    fn with_config(config: &str) -> Vec<u8> {
        [b"IKCFG_ST", &gzip(config.as_bytes())[..], b"IKCFG_ED"].concat()
    }

    #[test]
    fn a_string_across_two_pieces_is_found() {
        for shift in 0..16 {
            let mut bytes = vec![0; (1 << 18) - shift];
            bytes.extend_from_slice(b"\0memfd-v2\0EXT4-fs");
            let contents = of_bytes(&bytes);
            assert_eq!(contents.abi.memfd, set(&["memfd-v2"]), "{shift}");
            assert_eq!(contents.presence(EXT4), Presence::BuiltIn, "{shift}");
        }
    }

    #[test]
    fn versions_and_strings_are_found_in_a_compressed_kernel() {
        let kernel = [vec![1; 1 << 19], b"\0kho-v4\0luo-v5\0 kvm-vcpu:%d\0".to_vec()].concat();
        let contents = of_payload(&gzip(&kernel)).unwrap();
        assert_eq!(
            (contents.abi.kho.clone(), contents.abi.luo.clone()),
            (set(&["kho-v4"]), set(&["luo-v5"]))
        );
        assert_eq!(contents.presence(KVM), Presence::BuiltIn);
        assert_eq!(contents.presence(EXT4), Presence::Unknown, "not found is not absent");
        assert_eq!(contents.presence(XFS), Presence::Unknown);
        assert!(!contents.has_config());
    }

    #[test]
    fn a_size_that_the_build_appends_is_no_part_of_the_kernel() {
        for name in ["gzip", "bzip2", "lzma", "xz", "lzo", "lz4", "zstd"] {
            let path = format!("{}/fuzz/seeds/unpack/{name}", env!("CARGO_MANIFEST_DIR"));
            let packed = std::fs::read(path).unwrap();
            let payload = [packed, 0x02_0000_u32.to_le_bytes().to_vec()].concat();
            let found = of_payload(&payload);
            assert!(found.is_ok(), "{name}: {found:?}");
        }
    }

    #[test]
    fn an_unknown_compression_is_told_and_a_damaged_one_is_an_error() {
        let unknown = of_payload(&[7; 64]).unwrap_err();
        assert!(matches!(unknown, ContentsError::Compression), "{unknown}");
        let mut damaged = gzip(&[1; 4096]);
        damaged.truncate(20);
        assert!(matches!(of_payload(&damaged), Err(ContentsError::Unpack(_))));
    }

    #[test]
    fn the_configuration_within_a_kernel_proves_presence_and_absence() {
        let config = "# a comment\nCONFIG_KVM=m\nCONFIG_EXT4_FS=y\n# CONFIG_XFS_FS is not set\n";
        for shift in [0, (1 << 18) - 4, (1 << 18) - 40] {
            let bytes = [vec![3; shift], with_config(config)].concat();
            let contents = of_bytes(&bytes);
            assert!(contents.has_config(), "{shift}");
            assert_eq!(contents.presence(KVM), Presence::Module);
            assert_eq!(contents.presence(EXT4), Presence::BuiltIn);
            assert_eq!(contents.presence(XFS), Presence::Absent);
        }
    }

    #[test]
    fn a_configuration_that_is_damaged_or_has_no_end_is_none() {
        let whole = with_config("CONFIG_KVM=y\n");
        assert!(of_bytes(&whole).has_config());
        for bad in [&whole[..whole.len() - 1], b"IKCFG_STIKCFG_ED", b"IKCFG_STxxxxIKCFG_ED"] {
            assert!(!of_bytes(bad).has_config());
        }
        let endless = [b"IKCFG_ST".to_vec(), vec![5; 3 << 20], b"IKCFG_ED".to_vec()].concat();
        assert!(!of_bytes(&endless).has_config());
    }
}
