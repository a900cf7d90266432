//! Deterministic changes to an input, like those of a fuzzer.

/// Most bytes of an input.
const LONGEST: usize = 1 << 15;
/// Most changes to one input.
const MOST_CHANGES: u64 = 8;

/// Makes inputs from other inputs. Mutators with the same seed make the same inputs.
#[derive(Debug, Clone)]
pub struct Mutator(u64);

impl Mutator {
    /// A mutator whose choices are determined by `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One of `seeds`, changed in a few places. `seeds` must not be empty.
    pub fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = self.pick(seeds).clone();
        for _ in 0..=self.below(MOST_CHANGES) {
            self.change(&mut input, seeds);
        }
        input.truncate(LONGEST);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len() as u64 + 1) as usize;
        match self.below(8) {
            0 => self.flip_a_bit(input, at),
            1 => self.put_a_number(input, at),
            2 => {
                let byte = self.next() as u8;
                self.put(input, at, &[byte]);
            }
            3 => {
                // Inserts up to 16 equal bytes.
                let more = vec![self.next() as u8; self.below(16) as usize + 1];
                input.splice(at..at, more);
            }
            4 => drop(input.drain(at..self.end_of_a_piece(input.len(), at))),
            5 => {
                let again = input[at..self.end_of_a_piece(input.len(), at)].to_vec();
                let to = self.below(input.len() as u64 + 1) as usize;
                input.splice(to..to, again);
            }
            6 => input.truncate(at),
            _ => {
                let other = self.pick(seeds);
                let from = self.below(other.len() as u64 + 1) as usize;
                let piece = other[from..self.end_of_a_piece(other.len(), from)].to_vec();
                match self.below(2) {
                    0 => self.put(input, at, &piece),
                    _ => drop(input.splice(at..at, piece)),
                }
            }
        }
    }

    fn flip_a_bit(&mut self, input: &mut [u8], at: usize) {
        if let Some(byte) = input.get_mut(at) {
            *byte ^= 1 << self.below(8);
        }
    }

    /// Overwrites bytes with a number near a limit of an integer type, where arithmetic may overflow.
    fn put_a_number(&mut self, input: &mut [u8], at: usize) {
        const BASES: [u64; 9] =
            [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX >> 1];
        let number = self.pick(&BASES).wrapping_add(self.below(3)).wrapping_sub(1);
        let width = 1 << self.below(4);
        match self.below(2) {
            0 => self.put(input, at, &number.to_le_bytes()[..width]),
            _ => self.put(input, at, &number.to_be_bytes()[8 - width..]),
        }
    }

    fn put(&self, input: &mut [u8], at: usize, bytes: &[u8]) {
        input.iter_mut().skip(at).zip(bytes).for_each(|(old, new)| *old = *new);
    }

    /// The end of a piece that starts at `at`. Most pieces are short.
    fn end_of_a_piece(&mut self, length: usize, at: usize) -> usize {
        let longest = 1 << self.below(10);
        length.min(at + self.below(longest) as usize + 1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// A number below `end`. `end` must not be 0.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn inputs_are_the_same_every_time_and_unlike_each_other() {
        let seeds = [b"one seed".to_vec(), vec![], vec![7; 100]];
        let inputs = |seed| {
            let mut mutator = Mutator::new(seed);
            (0..1000).map(|_| mutator.input(&seeds)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(1), inputs(1));
        assert_ne!(inputs(1), inputs(2));
        let different: BTreeSet<_> = inputs(1).into_iter().collect();
        assert!(different.len() > 500, "{} of 1000 differ", different.len());
        assert!(different.iter().any(|input| input.len() > 100));
    }
}
