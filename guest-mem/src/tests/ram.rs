//! Mapped segments, and the proof that their pages stay in their frames.

use super::*;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

fn map(name: &str) -> GuestRam {
    let layout = layout();
    GuestRam::map(&layout, segments(name, &layout)).unwrap()
}

/// The lines of `/proc/self/maps` about memfds called `name`.
fn mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(&format!("/memfd:{name} "))).count()
}

#[test]
fn each_slot_is_one_range_of_the_host_with_its_segments_side_by_side() {
    let ram = map("side-by-side");
    let slots: Vec<MappedSlot> = ram.slots().collect();
    assert_eq!((slots[0].guest_base, slots[0].len), (0, 2 * HUGE_PAGE + PAGE));
    assert_eq!((slots[1].guest_base, slots[1].len), (4 * HUGE_PAGE, HUGE_PAGE + PAGE));
    assert_eq!(slots.len(), ram.memory().num_regions());
    for (slot, region) in slots.iter().zip(ram.memory().iter()) {
        assert!(slot.host_address.is_multiple_of(HUGE_PAGE), "huge pages fit");
        assert_eq!(region.as_ptr() as u64, slot.host_address);
        assert_eq!((region.start_addr().0, region.len()), (slot.guest_base, slot.len));
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut expected: Vec<String> = Vec::new();
    for plan in layout().segments() {
        let start = slots[plan.slot].host_address + plan.offset_in_slot;
        expected.push(format!("{start:x}-{:x} rw-s", start + plan.len));
    }
    for range in &expected {
        assert!(maps.lines().any(|line| line.starts_with(range)), "{range} in {maps}");
    }
}

#[test]
fn a_write_across_the_border_of_two_segments_is_in_both() {
    let ram = map("border");
    ram.memory().write_slice(b"abcdefgh", GuestAddress(HUGE_PAGE - 3)).unwrap();
    let mut bytes = [0; 3];
    ram.segments()[0].file().read_exact_at(&mut bytes, HUGE_PAGE - 3).unwrap();
    assert_eq!(&bytes, b"abc");
    let mut bytes = [0; 5];
    ram.segments()[1].file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"defgh");
    // And the other way round.
    ram.segments()[4].file().write_all_at(b"xy", 0).unwrap();
    let value: [u8; 4] = ram.memory().read_obj(GuestAddress(5 * HUGE_PAGE - 2)).unwrap();
    assert_eq!(&value, b"\0\0xy");
}

#[test]
fn the_hole_and_what_lies_behind_the_end_are_not_memory() {
    let ram = map("hole");
    for at in [2 * HUGE_PAGE + PAGE, 4 * HUGE_PAGE - 1, 5 * HUGE_PAGE + PAGE, u64::MAX] {
        ram.memory().write_obj(1u8, GuestAddress(at)).unwrap_err();
    }
    let last = 5 * HUGE_PAGE + PAGE - 1;
    ram.memory().write_obj(1u8, GuestAddress(last)).unwrap();
    ram.memory().write_obj(1u16, GuestAddress(last)).unwrap_err();
}

#[test]
fn mapping_touches_nothing_and_a_read_of_the_guest_touches_its_segment() {
    let ram = map("untouched");
    let touched = |ram: &GuestRam| -> Vec<bool> {
        ram.segments().iter().map(|segment| is_touched(segment).unwrap()).collect()
    };
    assert_eq!(touched(&ram), [false; 5]);
    let _: u8 = ram.memory().read_obj(GuestAddress(HUGE_PAGE)).unwrap();
    assert_eq!(touched(&ram), [false, true, false, false, false]);
    ram.memory().write_obj(1u8, GuestAddress(4 * HUGE_PAGE)).unwrap();
    assert_eq!(touched(&ram), [false, true, false, true, false]);
}

#[test]
fn ram_that_is_taken_back_is_the_same_ram() {
    let before = map("taken-back");
    let places = [0, HUGE_PAGE + 5, 2 * HUGE_PAGE, 4 * HUGE_PAGE + 9, 5 * HUGE_PAGE + PAGE - 1];
    for (value, at) in (1u8..).zip(places) {
        before.memory().write_obj(value, GuestAddress(at)).unwrap();
    }
    let blocks: Vec<u64> = before.segments().iter().map(allocated).collect();
    let fds: Vec<OwnedFd> = before.segments().iter().map(reopen).collect();
    drop(before);

    let layout = layout();
    let back = fds.into_iter().zip(layout.segments()).enumerate();
    let back = back.map(|(index, (fd, plan))| check_segment(index, fd, plan.len).unwrap());
    let after = GuestRam::map(&layout, back.collect()).unwrap();
    assert_eq!(after.segments().iter().map(allocated).collect::<Vec<_>>(), blocks);
    for (value, at) in (1u8..).zip(places) {
        assert_eq!(after.memory().read_obj::<u8>(GuestAddress(at)).unwrap(), value);
    }
    assert_eq!(after.segments().iter().map(allocated).collect::<Vec<_>>(), blocks);
}

#[test]
fn page_frames_are_the_same_however_often_ram_is_mapped() {
    let before = map("frames");
    before.memory().write_obj(1u8, GuestAddress(0)).unwrap();
    let digest = |ram: &GuestRam| {
        let mut digest = FrameDigest::default();
        ram.segments().iter().try_for_each(|segment| digest.add(segment)).map(|()| digest)
    };
    let expected = match digest(&before) {
        Ok(digest) => digest,
        Err(error @ Error::FramesHidden) => return eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(expected.pages, layout().total_bytes() / PAGE);
    assert!(before.segments().iter().all(|s| allocated(s) == s.len()), "holes are filled");
    assert_eq!(digest(&before).unwrap(), expected);
    let fds: Vec<OwnedFd> = before.segments().iter().map(reopen).collect();
    drop(before);
    let layout = layout();
    let back = fds.into_iter().zip(layout.segments());
    let back = back.map(|(fd, plan)| check_segment(0, fd, plan.len).unwrap()).collect();
    let after = GuestRam::map(&layout, back).unwrap();
    assert_eq!(digest(&after).unwrap(), expected, "not a page has moved");

    // A copy: the same bytes in other frames.
    let copy = map("frames-copy");
    copy.memory().write_obj(1u8, GuestAddress(0)).unwrap();
    let copied = digest(&copy).unwrap();
    assert_eq!(copied.pages, expected.pages);
    assert_ne!(copied.hash, expected.hash);
    // One segment alone.
    let first = FrameDigest::of(&after.segments()[0]).unwrap();
    assert_eq!(first.pages, HUGE_PAGE / PAGE);
}

#[test]
fn a_segment_is_digested_to_its_end_however_long_it_is() {
    // Longer than the window that is mapped at a time.
    let segment = create_segment("long", 32 * HUGE_PAGE + PAGE).unwrap();
    let digest = match FrameDigest::of(&segment) {
        Ok(digest) => digest,
        Err(error @ Error::FramesHidden) => return eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(digest.pages, 32 * HUGE_PAGE / PAGE + 1);
    assert_eq!(allocated(&segment), segment.len(), "the last page as well");
    assert_eq!(FrameDigest::of(&segment).unwrap(), digest);
}

#[test]
fn segments_that_are_not_the_layouts_are_refused_with_both_sides() {
    let layout = layout();
    let mut few = segments("refused", &layout);
    few.pop();
    let error = GuestRam::map(&layout, few).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "the layout has 5 segments, 4 were given");
    let mut swapped = segments("refused", &layout);
    swapped.swap(1, 2);
    let error = GuestRam::map(&layout, swapped).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "segment 1: it has 4096 bytes, the layout says 2097152");
    assert_eq!(mappings("refused"), 0, "nothing stays mapped");
}

#[test]
fn a_slot_larger_than_the_address_space_is_an_error_that_names_it() {
    let slots = [Slot { guest_base: PAGE, len: 1 << 47 }];
    let layout = Layout::new(&slots, Some(15 << 40)).unwrap();
    let error = GuestRam::map(&layout, segments("huge", &layout)).map(drop).unwrap_err();
    let expected = "cannot reserve 140737488355328 bytes of address space for the slot at 0x1000";
    assert_eq!(error.to_string(), expected);
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn dropped_ram_is_unmapped_unless_somebody_still_uses_it() {
    let ram = map("dropped");
    assert_eq!(mappings("dropped"), 5);
    drop(ram);
    assert_eq!(mappings("dropped"), 0);

    let ram = map("used");
    ram.memory().write_obj(7u8, GuestAddress(HUGE_PAGE)).unwrap();
    let memory = ram.memory().clone();
    drop(ram);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(HUGE_PAGE)).unwrap(), 7);
}

#[test]
fn ram_is_left_out_of_core_dumps_and_asks_for_huge_pages() {
    let ram = map("advised");
    if let Some(error) = ram.advice_failure() {
        return eprintln!("skipped: the kernel takes no advice: {error}");
    }
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut flags = Vec::new();
    let mut ours = false;
    for line in smaps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(line) if ours => flags.push(line.to_owned()),
            None if line.contains("-s ") => ours = line.contains("/memfd:advised "),
            None if line.split(' ').next().is_some_and(|w| w.contains('-')) => ours = false,
            _ => {}
        }
    }
    assert_eq!(flags.len(), 5);
    for line in &flags {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        assert!(words.contains(&"dd") && words.contains(&"hg"), "{line}");
    }
}

#[test]
fn holes_are_filled_with_huge_pages_around_what_the_guest_has_written() {
    let len = 4 * HUGE_PAGE;
    let layout = Layout::new(&[Slot { guest_base: 0, len }], Some(len)).unwrap();
    let ram = GuestRam::map(&layout, segments("filled", &layout)).unwrap();
    let at = GuestAddress(HUGE_PAGE + 5);
    ram.memory().write_obj(7u8, at).unwrap();
    let segment = &ram.segments()[0];
    assert!(allocated(segment) < len);
    for _ in 0..2 {
        fill_holes(segment).unwrap();
        assert_eq!(allocated(segment), len);
        assert_eq!(ram.memory().read_obj::<u8>(at).unwrap(), 7);
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(len - 1)).unwrap(), 0);
    }
    match HugePages::read(Path::new("/sys")) {
        Ok(setting) if setting.shmem.gives_huge_pages() => {}
        other => return eprintln!("skipped: no huge pages here ({other:?})"),
    }
    // A huge page is mapped whole by one access.
    let pages = (0..4).map(|page| GuestAddress(page * HUGE_PAGE));
    pages.for_each(|page| assert!(ram.memory().read_obj::<u8>(page).is_ok()));
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, mapping) = smaps.split_once("/memfd:filled ").unwrap();
    let huge = mapping.lines().find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
    assert_eq!(huge.split_whitespace().nth(1), Some("8192"), "{huge}");
}
