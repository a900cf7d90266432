//! Which guest addresses are cut into which segments.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn problem(slots: &[Slot], segment_bytes: Option<u64>) -> String {
    match Layout::new(slots, segment_bytes) {
        Err(Error::Layout(problem)) => problem,
        other => panic!("{other:?}"),
    }
}

fn slot(guest_base: u64, len: u64) -> Slot {
    Slot { guest_base, len }
}

#[test]
fn segments_cover_every_slot_once_and_in_order() {
    let sizes = [PAGE, MIB, 64 * MIB, 64 * MIB + PAGE, 3 * GIB, 100 * GIB, 16 << 40];
    for len in sizes {
        for segment in [None, Some(len.div_ceil(3).next_multiple_of(PAGE)), Some(len)] {
            let slots = [slot(0, len), slot(len + GIB, len)];
            // The last size in one segment is more than LUO takes: see below.
            let Ok(layout) = Layout::new(&slots, segment) else { continue };
            let mut expected = (0, 0);
            for plan in layout.segments() {
                assert_eq!((plan.slot, plan.offset_in_slot), expected);
                assert!(plan.len > 0 && plan.len <= layout.segment_bytes());
                expected.1 += plan.len;
                if expected.1 == len {
                    expected = (plan.slot + 1, 0);
                } else {
                    assert_eq!(plan.len, layout.segment_bytes(), "only the last is shorter");
                }
            }
            assert_eq!(expected, (2, 0), "{len:#x} in {segment:x?}");
            assert_eq!(layout.total_bytes(), 2 * len);
            assert_eq!(layout.slots(), slots);
        }
    }
}

#[test]
fn a_pc_with_more_than_3_gib_has_a_hole_that_no_segment_spans() {
    let slots = [slot(0, 3 * GIB), slot(4 * GIB, GIB)];
    let layout = Layout::new(&slots, Some(2 * GIB)).unwrap();
    let plans: Vec<_> =
        layout.segments().iter().map(|p| (p.slot, p.offset_in_slot, p.len)).collect();
    assert_eq!(plans, [(0, 0, 2 * GIB), (0, 2 * GIB, GIB), (1, 0, GIB)]);
}

#[test]
fn the_default_is_few_segments_of_whole_huge_pages() {
    for (len, segment_bytes, count) in [
        (PAGE, 64 * MIB, 1),
        (64 * MIB, 64 * MIB, 1),
        (2 * GIB, 64 * MIB, 32),
        (4032 * MIB, 64 * MIB, 63),
        (4032 * MIB + PAGE, 66 * MIB, 62),
        (1 << 40, 1_048_576 * MIB / 63 / (2 * MIB) * (2 * MIB) + 2 * MIB, 63),
    ] {
        let layout = Layout::new(&[slot(0, len)], None).unwrap();
        assert_eq!((layout.segment_bytes(), layout.segments().len()), (segment_bytes, count));
    }
    // Each slot may end in a segment that is not full.
    let many: Vec<Slot> = (0..16).map(|i| slot(i << 40, 64 * MIB * 4 + PAGE)).collect();
    assert!(Layout::new(&many, None).unwrap().segments().len() <= 64);
}

#[test]
fn the_same_numbers_give_the_same_plan() {
    for len in [GIB, 5 * GIB, 300 * GIB + PAGE] {
        let slots = [slot(0, 3 * GIB), slot(4 * GIB, len)];
        let layout = Layout::new(&slots, None).unwrap();
        assert_eq!(Layout::new(layout.slots(), Some(layout.segment_bytes())).unwrap(), layout);
    }
}

#[test]
fn slots_that_cannot_be_are_refused_with_their_numbers() {
    let cases: &[(&[Slot], &str)] = &[
        (&[], "there are 0 slots, not 1 to 16"),
        (&[slot(0, 0)], "slot 0 is empty"),
        (&[slot(0, PAGE), slot(8192, 100)], "slot 1 is 0x64 bytes at 0x2000, not whole pages"),
        (&[slot(100, PAGE)], "slot 0 is 0x1000 bytes at 0x64, not whole pages"),
        (&[slot(u64::MAX - 4095, 8192)], "which ends beyond 64 bits"),
        (
            &[slot(0, 8192), slot(4096, 4096)],
            "slot 1 starts at 0x1000, the one before it ends at 0x2000",
        ),
        (&[slot(8192, 4096), slot(0, 4096)], "slot 1 starts at 0x0, the one before it ends at"),
        (&[slot(0, 1 << 63)], "0x8000000000000000 bytes are more than a process can map"),
        (&[slot(0, 1 << 62), slot(1 << 62, 1 << 62)], "are more than a process can map"),
    ];
    for (slots, expected) in cases {
        let problem = problem(slots, None);
        assert!(problem.contains(expected), "{problem}");
    }
    let seventeen: Vec<Slot> = (0..17).map(|i| slot(i * PAGE, PAGE)).collect();
    assert_eq!(problem(&seventeen, None), "there are 17 slots, not 1 to 16");
}

#[test]
fn segments_that_cannot_be_are_refused_with_their_numbers() {
    let slots = [slot(0, GIB)];
    assert!(problem(&slots, Some(0)).contains("a segment of 0x0 bytes is not whole pages"));
    assert!(problem(&slots, Some(5000)).contains("a segment of 0x1388 bytes is not whole pages"));
    Layout::new(&slots, Some(MIB)).unwrap();
    let many = problem(&slots, Some(MIB - PAGE));
    assert_eq!(many, "segments of 0xff000 bytes make 1029, the most is 1024");
    // Linux mm/memfd_luo.c counts pages in 32 bits.
    let large = [slot(0, PAGE << 32)];
    Layout::new(&large, Some((PAGE << 32) - PAGE)).unwrap();
    let problem = problem(&large, Some(PAGE << 32));
    assert_eq!(problem, "segment 0 has 4294967296 pages, LUO preserves at most 4294967295");
}
