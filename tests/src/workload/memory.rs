//! Memory that is filled with a pattern, and then continuously verified and changed.
//!
//! Every word of a page is computed from the page's number and its generation, and the generations are
//! stored separately from the pages. This detects damaged pages, and also pages that were lost, swapped,
//! or replaced by an older version.

use std::ops::Range;

/// Words of 64 bits in a page of 4 KiB.
pub const WORDS: usize = 512;

/// Each pass gives one page in this many a new generation.
const CHANGED_IN: usize = 16;

/// The pages, their generations, and the position of the verification.
#[derive(Debug)]
pub struct Memory {
    words: Vec<u64>,
    generations: Vec<u32>,
    passes: u64,
    next: usize,
}

/// The result of verifying some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Number of pages without their pattern. Each is written again, so that it counts once.
    pub errors: u64,
    /// Complete passes so far.
    pub passes: u64,
}

impl Memory {
    /// Allocates `pages` pages and fills them all.
    pub fn new(pages: usize) -> Self {
        let mut memory =
            Self { words: vec![0; pages * WORDS], generations: vec![0; pages], passes: 0, next: 0 };
        for page in 0..pages {
            memory.write(page);
        }
        memory
    }

    /// Verifies the next `pages` pages and changes some of them. After the last page the first follows.
    pub fn verify(&mut self, pages: usize) -> Verified {
        let mut errors = 0;
        for _ in 0..pages.min(self.generations.len()) {
            let page = self.next;
            if !self.holds(page) {
                errors += 1;
                self.write(page);
            } else if (page + self.passes as usize).is_multiple_of(CHANGED_IN) {
                self.generations[page] = self.generations[page].wrapping_add(1);
                self.write(page);
            }
            self.next += 1;
            if self.next == self.generations.len() {
                self.next = 0;
                self.passes += 1;
            }
        }
        Verified { errors, passes: self.passes }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    /// Where its pages lie in the address space of this process.
    pub fn addresses(&self) -> Range<usize> {
        let start = self.words.as_ptr() as usize;
        start..start + self.bytes()
    }

    fn holds(&self, page: usize) -> bool {
        let mut expected = first_word(page, self.generations[page]);
        self.words[page * WORDS..][..WORDS].iter().all(|word| {
            let same = *word == expected;
            expected = expected.wrapping_add(STEP);
            same
        })
    }

    fn write(&mut self, page: usize) {
        let mut value = first_word(page, self.generations[page]);
        for word in &mut self.words[page * WORDS..][..WORDS] {
            *word = value;
            value = value.wrapping_add(STEP);
        }
    }
}

/// Odd, so that 512 consecutive words of a page are all different.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The first word of a page: a hash of page number and generation (the finalizer of SplitMix64).
fn first_word(page: usize, generation: u32) -> u64 {
    let mut x = (page as u64) << 32 | u64::from(generation);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // Never zero, because lost memory reads as zeroes.
    (x ^ (x >> 31)) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_left_alone_verifies_pass_after_pass_while_it_changes() {
        let mut memory = Memory::new(40);
        let before = memory.words.clone();
        for pass in 1..=20 {
            assert_eq!(memory.verify(40), Verified { errors: 0, passes: pass });
        }
        assert_ne!(memory.words, before);
    }

    #[test]
    fn one_flipped_bit_anywhere_in_a_page_is_one_error_once() {
        for word in [0, 1, 255, WORDS - 1] {
            let mut memory = Memory::new(3);
            memory.words[WORDS + word] ^= 1 << 63;
            assert_eq!(memory.verify(3).errors, 1, "word {word}");
            assert_eq!(memory.verify(3).errors, 0);
        }
    }

    #[test]
    fn a_zeroed_page_a_swapped_page_and_an_older_page_are_errors() {
        let mut memory = Memory::new(4);
        memory.words[..WORDS].fill(0);
        assert_eq!(memory.verify(4).errors, 1);

        let mut memory = Memory::new(4);
        let (low, high) = memory.words.split_at_mut(2 * WORDS);
        low[..WORDS].swap_with_slice(&mut high[..WORDS]);
        assert_eq!(memory.verify(4).errors, 2);

        let mut memory = Memory::new(1);
        let old = memory.words.clone();
        assert_eq!(memory.verify(1).errors, 0);
        assert_ne!(memory.words, old, "page 0 changes in pass 0");
        memory.words = old;
        assert_eq!(memory.verify(1).errors, 1);
    }

    #[test]
    fn no_page_at_all_verifies_nothing_and_never_ends_a_pass() {
        assert_eq!(Memory::new(0).verify(10), Verified { errors: 0, passes: 0 });
    }
}
