//! The index of a state directory, a text file.
//!
//! ```text
//! perennial-luo-state-v1
//! number 2
//! tree 412 bytes sum 1f3a77c0
//! memfd 3 size 4096 position 0 seals 1 mode 777 sum 9d2b1c44
//! end sum 5e0a83f1
//! ```
//!
//! Sums are CRC-32; the last sum covers all lines before it. A parsed index is formatted again and
//! must give the same bytes, so every truncation and every flipped bit is an error.

use std::collections::BTreeMap;
use std::fmt;

use rustix::fs::SealFlags;

const FORMAT: &str = "perennial-luo-state-v1";

/// One preserved memfd. The memory file has the contents in the order of the entries, each at a
/// page boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Size in bytes.
    pub(crate) size: u64,
    /// File position in bytes.
    pub(crate) position: u64,
    pub(crate) seals: SealFlags,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Checksum of the contents; see [`super::contents`].
    pub(crate) sum: u32,
}

/// The contents of a state directory: a live update, its tree and its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Index {
    /// Number of the live update.
    pub(crate) number: u64,
    pub(crate) tree_bytes: u64,
    pub(crate) tree_sum: u32,
    /// The files, by their numbers in the tree.
    pub(crate) files: BTreeMap<u64, Entry>,
}

impl Index {
    /// An index without files.
    pub(crate) fn new(number: u64, tree: &[u8]) -> Self {
        let (tree_bytes, tree_sum) = (tree.len() as u64, crc32fast::hash(tree));
        Self { number, tree_bytes, tree_sum, files: BTreeMap::new() }
    }

    pub(crate) fn tree_name(&self) -> String {
        format!("tree-{}.dtb", self.number)
    }

    pub(crate) fn memory_name(&self) -> String {
        format!("memory-{}", self.number)
    }

    /// Parses an index. The error says what is wrong.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())?;
        match text.lines().next() {
            Some(FORMAT) => {}
            found => {
                let found = found.unwrap_or_default().escape_default();
                return Err(format!("its format is `{found}`, this build knows `{FORMAT}`"));
            }
        }
        let index = Self::parse_lines(text).ok_or("it has a line that cannot be parsed")?;
        if index.to_string() != text {
            return Err("its lines were changed after it was written".to_owned());
        }
        Ok(index)
    }

    fn parse_lines(text: &str) -> Option<Self> {
        let words = |line: &'_ str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut index = Self { number: 0, tree_bytes: 0, tree_sum: 0, files: BTreeMap::new() };
        for line in text.lines().skip(1) {
            let words = words(line);
            let word = |at: usize| words.get(at).map(String::as_str);
            match word(0)? {
                "number" => index.number = word(1)?.parse().ok()?,
                "tree" => {
                    index.tree_bytes = word(1)?.parse().ok()?;
                    index.tree_sum = hexadecimal(word(4)?)?;
                }
                "memfd" => {
                    let entry = Entry {
                        size: word(3)?.parse().ok()?,
                        position: word(5)?.parse().ok()?,
                        seals: SealFlags::from_bits_retain(hexadecimal(word(7)?)?),
                        mode: u32::from_str_radix(word(9)?, 8).ok()?,
                        sum: hexadecimal(word(11)?)?,
                    };
                    index.files.insert(word(1)?.parse().ok()?, entry);
                }
                // `parse` checks this line when it formats the index again.
                "end" => {}
                _ => return None,
            }
        }
        Some(index)
    }

    /// Formats all lines but the last.
    fn lines(&self) -> String {
        let Self { number, tree_bytes, tree_sum, files } = self;
        let head =
            format!("{FORMAT}\nnumber {number}\ntree {tree_bytes} bytes sum {tree_sum:08x}\n");
        let line = |(number, entry): (&u64, &Entry)| {
            let Entry { size, position, seals, mode, sum } = entry;
            let seals = seals.bits();
            format!(
                "memfd {number} size {size} position {position} seals {seals:x} mode {mode:o} sum {sum:08x}\n"
            )
        };
        files.iter().map(line).fold(head, |all, line| all + &line)
    }
}

fn hexadecimal(word: &str) -> Option<u32> {
    u32::from_str_radix(word, 16).ok()
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        let sum = crc32fast::hash(lines.as_bytes());
        writeln!(f, "{lines}end sum {sum:08x}")
    }
}
