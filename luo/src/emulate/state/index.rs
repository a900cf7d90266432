//! The index of a state directory, as a text of one form.
//!
//! ```text
//! perennial-luo-state-v1
//! number 2
//! tree 412 bytes sum 1f3a77c0
//! memfd 3 size 4096 position 0 seals 1 mode 777 sum 9d2b1c44
//! end sum 5e0a83f1
//! ```
//!
//! Sums are CRC-32; the last one is of all lines before it. What is read is written again and has to
//! give the same bytes, so that every cut and every flipped bit is an error.

use std::collections::BTreeMap;
use std::fmt;

use rustix::fs::SealFlags;

const FORMAT: &str = "perennial-luo-state-v1";

/// One file. Contents stand in the order of the entries, each at the start of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) position: u64,
    pub(crate) seals: SealFlags,
    /// Permission bits.
    pub(crate) mode: u32,
    /// See [`super::contents`].
    pub(crate) sum: u32,
}

/// What is in a state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Index {
    /// Of the live update.
    pub(crate) number: u64,
    pub(crate) tree_bytes: u64,
    pub(crate) tree_sum: u32,
    /// By the number that the tree has for them.
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

    /// Reads an index; says what is wrong with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
        match text.lines().next() {
            Some(FORMAT) => {}
            found => {
                let found = found.unwrap_or_default().escape_default();
                return Err(format!("it is `{found}`, this build knows `{FORMAT}`"));
            }
        }
        let index = Self::parse_lines(text).ok_or("a line of it cannot be read")?;
        if index.to_string() != text {
            return Err("it is not as it was written".to_owned());
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
                // Whether it is right is seen when the index is written again.
                "end" => {}
                _ => return None,
            }
        }
        Some(index)
    }

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
