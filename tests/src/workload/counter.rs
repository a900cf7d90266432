//! A counter that detects a change of a vCPU's registers.
//!
//! With each step the counter also advances a linear congruential generator and a floating-point sum.
//! Both have closed forms, so after any number of steps the thread can check whether integer and vector
//! registers kept their values, even if the thread was interrupted or paused or the host's kernel was
//! replaced meanwhile.

const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;
const SEED: u64 = 0x5045_5245_4e4e_4941;

/// The counter of one thread, with the generator and the sum.
#[derive(Debug, Clone, PartialEq)]
pub struct Counter {
    steps: u64,
    generator: u64,
    /// Half the number of steps, exact up to 2^53 steps.
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
            // Without `black_box` the compiler could compute the closed form itself.
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

    /// Whether generator and sum have the values that follow from the number of steps.
    pub fn is_consistent(&self) -> bool {
        self.generator == generator_after(self.steps) && self.sum == self.steps as f64 / 2.0
    }
}

/// The generator's value after `steps` steps, computed by repeated squaring of the affine map.
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
