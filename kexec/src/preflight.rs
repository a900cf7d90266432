//! Refuses a live update that would fail or lose preserved memory, before anything is changed.
//!
//! Only certain problems are a reason to refuse. If the running kernel does not tell a fact, the check of
//! that fact is skipped. Whether the image fits is finally decided when it is loaded.

use crate::image::scratch_parameter;
use crate::{CommandLine, Initramfs, Kernel, Running, ScratchArea, Survival, memmap, mib, switch};

/// Why a live update into this image would fail, or lose everything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The running kernel has no KHO.
    #[error(
        "the running kernel {release} cannot hand anything over: KHO is off; cold boot it with `kho=on \
         liveupdate=on`"
    )]
    KhoOffHere {
        /// The running kernel's release.
        release: String,
    },
    /// The running kernel has no LUO.
    #[error(
        "the running kernel {release} has no Live Update Orchestrator; cold boot it with `kho=on \
         liveupdate=on`, or boot another kernel"
    )]
    LuoOffHere {
        /// The running kernel's release.
        release: String,
    },
    /// The next kernel's command line does not switch KHO on.
    #[error(
        "the next kernel would ignore the preserved memory: `kho=on` is missing on its command line"
    )]
    KhoOffThere,
    /// The next kernel's command line does not switch LUO on.
    #[error(
        "the next kernel could not retrieve anything: `liveupdate=on` is missing on its command line"
    )]
    LuoOffThere,
    /// The next kernel would reserve other memory than the running kernel.
    #[error(
        "the next kernel would not find the preserved memory: the running kernel was booted with \
         {here}, the next kernel's command line has {there}; give it the same"
    )]
    OtherMemory {
        /// `memmap=` of the running kernel, in words.
        here: String,
        /// `memmap=` of the next kernel, in words.
        there: String,
    },
    /// The command line is longer than the image accepts.
    #[error(
        "the next kernel accepts a command line of {limit} bytes, this one has {bytes}; shorten it"
    )]
    CommandLineTooLong {
        /// Length of the longest command line that the image accepts, in bytes.
        limit: u64,
        /// Length of the given command line, in bytes.
        bytes: u64,
    },
    /// The kernel or the initramfs does not fit into the scratch areas.
    #[error(
        "the {what} needs {} in one piece, and the scratch areas have no such piece left \
         ({areas}); cold boot with `{remedy}` or larger",
        mib(*bytes)
    )]
    NoRoom {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Memory that it needs, in bytes.
        bytes: u64,
        /// Sizes of the scratch areas, in words.
        areas: String,
        /// A sufficient `kho_scratch=`.
        remedy: String,
    },
}

/// Checks whether preserved memory gets from the running kernel to one with this command line. Returns all problems,
/// not only the first.
pub fn check_survival(
    running: &Running,
    command_line: &CommandLine,
    survival: Survival,
) -> Vec<Refusal> {
    match survival {
        Survival::HandedOver => nothing_handed_over(running, command_line),
        Survival::Reserved => other_memory(running, command_line).into_iter().collect(),
    }
}

/// Checks whether the next kernel accepts the command line, and whether the running kernel has room to load it and
/// its initramfs. Returns all problems, not only the first.
pub fn check_room(
    running: &Running,
    kernel: &Kernel,
    initramfs: Option<&Initramfs>,
    command_line: &CommandLine,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let limit = kernel.command_line_size.saturating_sub(CommandLine::OVERHEAD as u64);
    let bytes = command_line.as_str().len() as u64;
    if bytes > limit {
        refusals.push(Refusal::CommandLineTooLong { limit, bytes });
    }
    // With KHO on, the kernel loads images only into scratch areas, with either kind of survival.
    if let Some(areas) = &running.scratch {
        refusals.extend(no_room(areas, kernel, initramfs));
    }
    refusals
}

/// Returns a refusal if the two kernels do not reserve the same memory.
fn other_memory(running: &Running, command_line: &CommandLine) -> Option<Refusal> {
    let here = memmap::ranges(&running.command_line);
    let there = memmap::ranges(command_line.as_str());
    let refusal =
        || Refusal::OtherMemory { here: memmap::in_words(&here), there: memmap::in_words(&there) };
    (here != there).then(refusal)
}

/// Returns a refusal for each kernel in which KHO or LUO is off.
fn nothing_handed_over(running: &Running, command_line: &CommandLine) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let release = || running.release.clone();
    if running.kho == Some(false) {
        refusals.push(Refusal::KhoOffHere { release: release() });
    } else if !running.luo {
        refusals.push(Refusal::LuoOffHere { release: release() });
    }
    // The next kernel may have KHO and LUO off by default, so both must be switched on explicitly.
    if switch(command_line.as_str(), "kho") != Some(true) {
        refusals.push(Refusal::KhoOffThere);
    }
    if switch(command_line.as_str(), "liveupdate") != Some(true) {
        refusals.push(Refusal::LuoOffThere);
    }
    refusals
}

const PAGE: u64 = 4096;
/// Lowest physical address at which kexec loads an initramfs (`MIN_INITRD_LOAD_ADDR`).
const MIN_INITRAMFS_ADDRESS: u64 = 0x100_0000;

/// Returns a refusal if the image does not fit into the scratch areas. Places kernel and initramfs as the
/// running kernel would: each in the first area that has room, as high as possible. Ignores the few pages
/// of boot parameters and purgatory.
fn no_room(
    areas: &[ScratchArea],
    kernel: &Kernel,
    initramfs: Option<&Initramfs>,
) -> Option<Refusal> {
    let refusal = |what, bytes| {
        let sizes: Vec<String> =
            areas.iter().map(|area| area.size).filter(|size| *size > 0).map(mib).collect();
        let areas = if sizes.is_empty() { "there are none".to_owned() } else { sizes.join(", ") };
        Refusal::NoRoom { what, bytes, areas, remedy: scratch_parameter(kernel, initramfs) }
    };
    let mut free: Vec<(u64, u64)> =
        areas.iter().map(|area| (area.start, area.start.saturating_add(area.size))).collect();
    let Kernel { init_size, lowest_address, alignment, .. } = *kernel;
    if place(&mut free, init_size, lowest_address, alignment).is_none() {
        return Some(refusal("kernel", init_size));
    }
    let initramfs = initramfs?;
    match place(&mut free, initramfs.size, MIN_INITRAMFS_ADDRESS, PAGE) {
        Some(_) => None,
        None => Some(refusal("initramfs", initramfs.size)),
    }
}

/// Takes `size` bytes, at `lowest` or higher, out of the first of the `free` pieces with room for them.
/// Returns their address.
fn place(free: &mut Vec<(u64, u64)>, size: u64, lowest: u64, alignment: u64) -> Option<u64> {
    let size = size.next_multiple_of(PAGE);
    for index in 0..free.len() {
        let (start, end) = free[index];
        let Some(highest) = end.checked_sub(size) else { continue };
        let taken = highest & !(alignment - 1);
        if taken >= start.max(lowest) {
            free.splice(index..=index, [(start, taken), (taken + size, end)]);
            return Some(taken);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::Image;
    use crate::image::tests::{bzimage, file};

    fn check(running: &Running, image: &Image, line: &CommandLine) -> Result<(), Vec<Refusal>> {
        check_for(running, image, line, Survival::HandedOver)
    }

    fn check_for(
        running: &Running,
        image: &Image,
        line: &CommandLine,
        survival: Survival,
    ) -> Result<(), Vec<Refusal>> {
        let Image { kernel, initramfs } = image;
        let mut refusals = check_survival(running, line, survival);
        refusals.extend(check_room(running, kernel, initramfs.as_ref(), line));
        if refusals.is_empty() { Ok(()) } else { Err(refusals) }
    }

    const MIB: u64 = 1 << 20;

    /// A kernel that needs 15 MiB at 16 MiB or higher, and an initramfs of `initramfs` bytes.
    fn image(initramfs: u64) -> (TempDir, Image) {
        let (dir, kernel) = file(&bzimage(&[7; 64]));
        let path = dir.path().join("initramfs");
        std::fs::write(&path, b"070701").unwrap();
        let mut image = Image::open(&kernel, Some(&path)).unwrap();
        image.initramfs.as_mut().unwrap().size = initramfs;
        (dir, image)
    }

    fn running(areas: &[(u64, u64)]) -> Running {
        let areas =
            areas.iter().map(|(start, size)| ScratchArea { start: start * MIB, size: size * MIB });
        Running {
            release: "7.3.4-a".to_owned(),
            version: String::new(),
            command_line: String::new(),
            kexec_loaded: Some(false),
            luo: true,
            kho: Some(true),
            scratch: Some(areas.collect()),
        }
    }

    fn live() -> CommandLine {
        CommandLine::for_live_update("quiet").unwrap()
    }

    #[test]
    fn a_live_update_without_problems_is_not_refused() {
        let (_dir, image) = image(10 * MIB);
        assert_eq!(check(&running(&[(64, 16), (128, 64)]), &image, &live()), Ok(()));
        let mut silent = running(&[]);
        (silent.scratch, silent.kho, silent.kexec_loaded) = (None, None, None);
        assert_eq!(check(&silent, &image, &live()), Ok(()), "what is unknown is no reason");
    }

    #[test]
    fn a_handover_that_is_off_on_either_side_is_refused() {
        let (_dir, image) = image(MIB);
        let mut here = running(&[(64, 64)]);
        here.luo = false;
        let release = "7.3.4-a".to_owned();
        let refused = check(&here, &image, &live()).unwrap_err();
        assert_eq!(refused, [Refusal::LuoOffHere { release: release.clone() }]);
        here.kho = Some(false);
        let refused = check(&here, &image, &CommandLine::new("quiet").unwrap()).unwrap_err();
        assert_eq!(
            refused,
            [Refusal::KhoOffHere { release }, Refusal::KhoOffThere, Refusal::LuoOffThere]
        );
        let off = CommandLine::new("kho=on liveupdate=on liveupdate=off").unwrap();
        let refused = check(&running(&[(64, 64)]), &image, &off).unwrap_err();
        assert_eq!(refused, [Refusal::LuoOffThere]);
    }

    #[test]
    fn reserved_memory_must_be_the_same_on_both_sides_and_needs_no_handover() {
        let (_dir, image) = image(MIB);
        let mut here = running(&[]);
        (here.luo, here.kho, here.scratch) = (false, Some(false), None);
        let check = |here: &Running, there: &str| {
            check_for(here, &image, &CommandLine::new(there).unwrap(), Survival::Reserved)
        };
        assert_eq!(check(&here, "quiet"), Ok(()), "a device of its own needs no `memmap=`");
        here.command_line = "console=ttyS0 memmap=1G!1G".to_owned();
        assert_eq!(check(&here, "memmap=1024M!0x40000000 quiet"), Ok(()));
        for (there, named) in [
            ("quiet", "no `memmap=`"),
            ("memmap=1G!2G", "`memmap=1G!2G`"),
            ("memmap=1G$1G", "`memmap=1G$1G`"),
            ("memmap=1G!1G memmap=1G!3G", "`memmap=1G!1G,1G!3G`"),
        ] {
            let refused = check(&here, there).unwrap_err();
            let text = refused[0].to_string();
            assert!(refused.len() == 1 && text.contains(named), "{text}");
            assert!(text.contains("booted with `memmap=1G!1G`"), "{text}");
        }
    }

    #[test]
    fn an_image_without_room_is_refused_with_sizes_and_a_remedy() {
        let (_dir, image) = image(50 * MIB);
        for (areas, what) in [
            (&[][..], "kernel"),
            (&[(64, 14)], "kernel"),
            (&[(64, 8), (128, 8)], "kernel"),
            // An area below 16 MiB cannot be used: the kernel's lowest address is 16 MiB.
            (&[(0, 16)], "kernel"),
            (&[(64, 64)], "initramfs"),
            (&[(64, 16), (128, 49)], "initramfs"),
            // The kernel goes into the first area that has room for it.
            (&[(64, 50), (128, 16)], "initramfs"),
        ] {
            let refused = check(&running(areas), &image, &live()).unwrap_err();
            let [Refusal::NoRoom { what: found, remedy, .. }] = &refused[..] else {
                panic!("{areas:?}: {refused:?}");
            };
            assert_eq!((*found, remedy.as_str()), (what, "kho_scratch=16M,96M,0"), "{areas:?}");
        }
        for areas in [&[(64, 66)][..], &[(64, 16), (128, 50)]] {
            assert_eq!(check(&running(areas), &image, &live()), Ok(()), "{areas:?}");
        }
    }

    #[test]
    fn a_command_line_longer_than_the_image_takes_is_refused() {
        let (_dir, mut image) = image(MIB);
        image.kernel.command_line_size = 25 + 31;
        let refused = check(&running(&[(64, 64)]), &image, &live()).unwrap_err();
        assert_eq!(refused, [Refusal::CommandLineTooLong { limit: 25, bytes: 26 }]);
    }

    proptest! {
        #[test]
        fn placed_pieces_lie_within_the_free_pieces_and_do_not_overlap(
            areas in prop::collection::vec((0_u64..1 << 40, 0_u64..1 << 30), 0..4),
            sizes in prop::collection::vec((1_u64..1 << 29, 0_u32..22), 0..6),
        ) {
            let mut at = 0;
            let mut free: Vec<(u64, u64)> = areas.iter().map(|(gap, size)| {
                let start = at + gap;
                at = start + size;
                (start, at)
            }).collect();
            for (size, shift) in sizes {
                let before: u64 = free.iter().map(|(start, end)| end - start).sum();
                let alignment = 4096 << (shift / 2);
                let whole = size.next_multiple_of(PAGE);
                let pieces = free.clone();
                let placed = place(&mut free, size, 1 << 24, alignment);
                let after: u64 = free.iter().map(|(start, end)| end - start).sum();
                prop_assert_eq!(before - after, placed.map_or(0, |_| whole));
                if let Some(at) = placed {
                    prop_assert!(at % alignment == 0 && at >= 1 << 24);
                    prop_assert!(pieces.iter().any(|(s, e)| *s <= at && at + whole <= *e));
                }
                prop_assert!(free.is_sorted());
            }
        }
    }
}
