//! Tests of a table of vectors: the guest writes the table, the function signals vectors.

use proptest::prelude::*;

use super::*;
use crate::kvm::interrupts::fake::{FakeWires, REFUSED};

const ON: u16 = CONTROL_ENABLE;
const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x41 };

fn msix(count: u16) -> (Msix, Arc<FakeWires>) {
    let wires = Arc::new(FakeWires::default());
    (Msix::new(count, wires.clone()).unwrap(), wires)
}

/// Writes the entry of `vector` as Linux does: message, then vector control.
fn set(msix: &mut Msix, vector: u64, message: MsiMessage, masked: bool) {
    let at = vector * ENTRY_SIZE;
    msix.write_table(at, &(message.address as u32).to_le_bytes());
    msix.write_table(at + 4, &((message.address >> 32) as u32).to_le_bytes());
    msix.write_table(at + 8, &message.data.to_le_bytes());
    msix.write_table(at + 12, &u32::from(masked).to_le_bytes());
}

fn read<const N: usize>(msix: &Msix, at: u64) -> [u8; N] {
    let mut data = [0xff; N];
    msix.read_table(at, &mut data);
    data
}

fn pending(msix: &Msix, at: u64) -> u64 {
    let mut data = [0xff; 8];
    msix.read_pending(at, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn a_new_table_is_off_and_masked() {
    let (msix, wires) = msix(3);
    assert_eq!((msix.vectors(), msix.control()), (3, 2));
    for vector in 0..3 {
        assert_eq!(read(&msix, 16 * vector), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }
    assert_eq!(wires.route(0), None);
}

#[test]
fn the_table_takes_words_of_32_and_64_bits_and_nothing_else() {
    let (mut msix, _) = msix(2);
    msix.write_table(16, &0x1122_3344_5566_7788u64.to_le_bytes());
    msix.write_table(24, &0xffff_ffff_99aa_bbccu64.to_le_bytes());
    assert_eq!(read(&msix, 16), 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(read(&msix, 24), 0x0000_0001_99aa_bbccu64.to_le_bytes(), "one bit can be written");
    msix.write_table(20, &[1, 2, 3, 4]);
    assert_eq!(read(&msix, 16), 0x0403_0201_5566_7788u64.to_le_bytes());
    let before = msix.save();
    for (at, len) in [(16, 1), (16, 2), (16, 3), (18, 4), (20, 8), (17, 1), (28, 8), (32, 4)] {
        msix.write_table(at, &[0x5a; 8][..len]);
        assert_eq!(msix.save(), before, "{len} bytes at {at}");
    }
}

#[test]
fn reads_behind_the_table_or_across_entries_see_ones() {
    let (msix, _) = msix(2);
    assert_eq!(read(&msix, 32), [0xff; 4]);
    assert_eq!(read(&msix, 12), [0xff; 8]);
    assert_eq!(read(&msix, u64::MAX), [0xff; 8]);
}

#[test]
fn a_vector_gets_its_route_when_it_can_fire() {
    let (mut msix, wires) = msix(2);
    set(&mut msix, 0, MESSAGE, false);
    assert_eq!(wires.route(0), None, "MSI-X is off");
    msix.set_control(ON | CONTROL_FUNCTION_MASK);
    assert_eq!(wires.route(0), None, "the function is masked");
    msix.set_control(ON);
    assert_eq!((wires.route(0), wires.route(1)), (Some(MESSAGE), None));
    msix.signal(0);
    msix.signal(1);
    assert_eq!((wires.taken(0), wires.taken(1)), (1, 0));
    msix.signal(2);
    msix.signal(0xffff);
    assert_eq!(pending(&msix, 0), 2);
}

#[test]
fn the_next_interrupt_goes_to_a_changed_message() {
    let (mut msix, wires) = msix(1);
    msix.set_control(ON);
    set(&mut msix, 0, MESSAGE, false);
    let other = MsiMessage { address: 0xfee0_2000, data: 0x42 };
    // Linux moves an interrupt to another CPU under the mask.
    msix.write_table(12, &1u32.to_le_bytes());
    msix.signal(0);
    set(&mut msix, 0, other, true);
    assert_eq!((wires.route(0), wires.taken(0)), (Some(MESSAGE), 0));
    msix.write_table(12, &0u32.to_le_bytes());
    assert_eq!((wires.route(0), wires.taken(0)), (Some(other), 1), "not lost by the move");
}

#[test]
fn a_refused_message_has_no_route_and_does_not_affect_other_vectors() {
    let (mut msix, wires) = msix(3);
    for vector in [0, 2] {
        set(&mut msix, vector, MESSAGE, false);
    }
    set(&mut msix, 1, MsiMessage { address: REFUSED, data: 0 }, false);
    msix.set_control(ON);
    assert_eq!([0, 1, 2].map(|index| wires.route(index)), [Some(MESSAGE), None, Some(MESSAGE)]);
    // A good message replaced by a refused one loses its route.
    set(&mut msix, 0, MsiMessage { address: REFUSED, data: 0 }, false);
    assert_eq!(wires.route(0), None);
    set(&mut msix, 1, MESSAGE, false);
    assert_eq!(wires.route(1), Some(MESSAGE));
}

#[test]
fn signals_while_msix_is_off_are_dropped() {
    let (mut msix, wires) = msix(1);
    set(&mut msix, 0, MESSAGE, false);
    msix.signal(0);
    msix.set_control(ON);
    assert_eq!((wires.taken(0), pending(&msix, 0)), (0, 0));
}

#[test]
fn pending_bits_are_found_beyond_the_first_word() {
    let (mut before, _) = msix(130);
    before.set_control(ON);
    for vector in [0, 63, 64, 129] {
        before.signal(vector);
    }
    let (mut after, wires) = msix(130);
    after.restore(before.save()).unwrap();
    for msix in [&before, &after] {
        assert_eq!(pending(msix, 0), 1 << 63 | 1);
        assert_eq!(pending(msix, 8), 1);
        assert_eq!(pending(msix, 16), 2);
        assert_eq!(pending(msix, 24), 0);
        assert_eq!(pending(msix, 15), 0x200, "at any byte");
    }
    for vector in [64, 65] {
        set(&mut after, vector, MESSAGE, false);
    }
    assert_eq!((wires.taken(64), wires.taken(65)), (1, 0));
    assert_eq!(pending(&after, 8), 0);
}

#[test]
fn a_restored_table_has_its_routes_and_has_fired_nothing() {
    let (mut before, _) = msix(2);
    before.set_control(ON);
    before.signal(0);
    set(&mut before, 1, MESSAGE, false);
    let state = before.save();
    let (mut after, wires) = msix(2);
    after.restore(state.clone()).unwrap();
    assert_eq!(after.save(), state);
    assert_eq!((wires.route(0), wires.route(1)), (None, Some(MESSAGE)));
    assert_eq!((wires.taken(0), wires.taken(1)), (0, 0));
    after.deliver();
    assert_eq!(wires.taken(0), 0, "it is masked");
    set(&mut after, 0, MESSAGE, false);
    assert_eq!(wires.taken(0), 1);
}

#[test]
fn a_table_of_another_size_is_refused_with_both() {
    let (before, _) = msix(2);
    let (mut after, _) = msix(3);
    let error = after.restore(before.save()).unwrap_err().to_string();
    assert_eq!(error, "the saved function has 2 MSI-X vectors, this one has 3");
    assert_eq!(after.save(), msix(3).0.save(), "a refused state changes nothing");
}

/// What a table of three vectors holds, and how often each of them has fired since the last look, by the
/// specification.
#[derive(Default)]
struct Model {
    enabled: bool,
    function_masked: bool,
    entries: [[u8; 16]; 3],
    pending: [bool; 3],
    fired: [u64; 3],
}

impl Model {
    fn is_masked(&self, vector: usize) -> bool {
        !self.enabled || self.function_masked || self.entries[vector][12] & 1 != 0
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let (vector, start) = ((at / 16) as usize, (at % 16) as usize);
        if matches!(data.len(), 4 | 8) && at.is_multiple_of(data.len() as u64) && vector < 3 {
            let entry = &mut self.entries[vector];
            entry[start..start + data.len()].copy_from_slice(data);
            // One bit of the vector control can be written.
            entry[12] &= 1;
            entry[13..].fill(0);
            self.deliver();
        }
    }

    fn signal(&mut self, vector: usize) {
        if self.enabled && vector < 3 {
            self.pending[vector] = true;
            // A vector that cannot fire now stays pending until it is unmasked.
            if !self.is_masked(vector) {
                self.pending[vector] = false;
                self.fired[vector] += 1;
            }
        }
    }

    fn deliver(&mut self) {
        for vector in 0..3 {
            if self.pending[vector] && !self.is_masked(vector) {
                self.pending[vector] = false;
                self.fired[vector] += 1;
            }
        }
    }

    /// The message of a vector that can fire, if the machine takes it.
    fn message(&self, vector: usize) -> Option<MsiMessage> {
        let word = u128::from_le_bytes(self.entries[vector]);
        let message = MsiMessage { address: word as u64, data: (word >> 64) as u32 };
        (message.address != REFUSED).then_some(message)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    /// Accesses of every width, also where there is nothing; signals while vectors are masked; updates in between.
    #[test]
    fn a_table_does_what_the_specification_says_whatever_its_guest_does(
        acts in prop::collection::vec((
            0u8..10,
            prop_oneof![4 => 0u64..48, 2 => (0u64..3).prop_map(|v| 16 * v + 12), 1 => 48u64..0x1000],
            1usize..=8,
            prop_oneof![Just(0u64), Just(1), Just(REFUSED), Just(0x41_fee0_1000), any::<u64>()],
        ), 0..100)
    ) {
        let (mut msix, mut wires) = msix(3);
        let mut model = Model::default();
        model.entries.iter_mut().for_each(|entry| entry[12] = 1);
        for (what, at, len, value) in acts {
            let aligned = at / 4 * 4;
            let mut data = value.to_le_bytes()[..len].to_vec();
            match what {
                0 => {
                    msix.write_table(at, &data);
                    model.write(at, &data);
                }
                1..4 => {
                    let data = &value.to_le_bytes()[..if what == 1 { 8 } else { 4 }];
                    msix.write_table(aligned, data);
                    model.write(aligned, data);
                }
                4 => {
                    msix.read_table(at, &mut data);
                    let start = (at % 16) as usize;
                    let entry = model.entries.get((at / 16) as usize);
                    match entry.and_then(|entry| entry.get(start..start + len)) {
                        Some(bytes) => prop_assert_eq!(&data, bytes),
                        None => prop_assert_eq!(&data, &value.to_le_bytes()[..len], "left alone"),
                    }
                }
                5 => {
                    msix.read_pending(at, &mut data);
                    let bits = (0..3).map(|v| u8::from(model.pending[v]) << v).sum::<u8>();
                    let expected: Vec<u8> =
                        (0..len as u64).map(|n| if at + n == 0 { bits } else { 0 }).collect();
                    prop_assert_eq!(data, expected);
                }
                6 => {
                    let control = value as u16 & 1 << 14 | u16::from(value & 7 != 0) << 15;
                    msix.set_control(control);
                    (model.enabled, model.function_masked) =
                        (control & 1 << 15 != 0, control & 1 << 14 != 0);
                    model.deliver();
                }
                7 | 8 => {
                    msix.signal(at as u16 % 5);
                    model.signal(usize::from(at as u16 % 5));
                }
                _ => {
                    let state = msix.save();
                    (msix, wires) = self::msix(3);
                    msix.restore(state.clone()).unwrap();
                    prop_assert_eq!(msix.save(), state);
                    msix.deliver();
                }
            }
            prop_assert_eq!([0, 1, 2].map(|vector| wires.taken(vector)), model.fired);
            model.fired = [0; 3];
            for vector in (0..3).filter(|vector| !model.is_masked(*vector)) {
                prop_assert_eq!(wires.route(vector), model.message(vector));
            }
        }
    }
}
