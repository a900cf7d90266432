//! A count that notices when a vCPU's registers were not kept.
//!
//! Beside the count itself run a linear congruential generator and a floating-point sum. Both have
//! closed forms, so after each stretch the thread can tell whether integer and vector registers
//! still hold what they held, however often the thread was interrupted, paused or moved to another
//! kernel in between.

const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;
const SEED: u64 = 0x5045_5245_4e4e_4941;

/// The count of one thread, with what must go along with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Counter {
    steps: u64,
    generator: u64,
    /// Twice as many halves as steps: exact up to 2^53.
    sum: f64,
}

impl Default for Counter {
    fn default() -> Self {
        Self { steps: 0, generator: SEED, sum: 0.0 }
    }
}

impl Counter {
    /// Takes `steps` steps.
    pub fn run(&mut self, steps: u64) {
        let (mut generator, mut sum) = (self.generator, self.sum);
        for _ in 0..steps {
            generator = generator.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
            // Hidden, or the compiler computes the closed form itself.
            generator = std::hint::black_box(generator);
            sum = std::hint::black_box(sum) + 0.5;
        }
        self.generator = generator;
        self.sum = sum;
        self.steps += steps;
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Whether generator and sum are what they must be after this many steps.
    pub fn is_consistent(&self) -> bool {
        self.generator == generator_after(self.steps) && self.sum == self.steps as f64 / 2.0
    }
}

/// The generator after `steps` steps, by squaring the affine map.
fn generator_after(mut steps: u64) -> u64 {
    let (mut multiplier, mut increment) = (MULTIPLIER, INCREMENT);
    let mut state = SEED;
    while steps > 0 {
        if steps & 1 == 1 {
            state = state.wrapping_mul(multiplier).wrapping_add(increment);
        }
        increment = increment.wrapping_mul(multiplier.wrapping_add(1));
        multiplier = multiplier.wrapping_mul(multiplier);
        steps >>= 1;
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_left_alone_is_consistent_after_any_stretch() {
        let mut counter = Counter::default();
        for stretch in [0, 1, 2, 3, 64, 1000, 65_537] {
            counter.run(stretch);
            assert!(counter.is_consistent(), "after {}", counter.steps());
        }
        assert_eq!(counter.steps(), 66_607);
    }

    #[test]
    fn a_changed_register_of_either_kind_is_noticed() {
        let mut counter = Counter::default();
        counter.run(1000);
        for changed in [
            Counter { steps: 999, ..counter.clone() },
            Counter { generator: counter.generator ^ 1, ..counter.clone() },
            Counter { sum: counter.sum + 0.5, ..counter.clone() },
            Counter { sum: f64::NAN, ..counter.clone() },
        ] {
            assert!(!changed.is_consistent(), "{changed:?}");
        }
    }
}
