//! The machine's kernels, from inside: loads the next kernel, enters it, and counts the kernels so far.

use std::fs;
use std::path::{Path, PathBuf};

use kexec::{CommandLine, Image, LoadedImage, Running};
use luo::Errno;
use rustix::system::{RebootCommand, reboot};

use crate::conformance::system::{Load, Next};

/// Mount point of the machine's data disk.
pub(super) const DATA: &str = "/data";
/// The directories on the data disk, each with a kernel.
pub(super) const SIDES: [&str; 2] = ["a", "b"];
pub(super) const KERNEL: &str = "bzImage";
pub(super) const INITRAMFS: &str = "initramfs";
/// An initramfs that is larger than the scratch area.
pub(super) const LARGE_INITRAMFS: &str = "large-initramfs";

/// The kernel parameter that counts the switches since the machine was reset.
pub(super) const GENERATION: &str = "conformance.generation";

/// The kernel parameter that switches LUO on or off.
const LUO: &str = "liveupdate";

/// The value of a parameter on this kernel's command line.
pub(super) fn word(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    let mut words = line.split_whitespace().filter_map(|word| word.split_once('='));
    words.rfind(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

/// Number of switches since the machine was reset.
pub(super) fn generation() -> u64 {
    word(GENERATION).and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Number of live updates that led to this kernel: one less than in the handover that it will write
/// (`struct luo_ser` in KHO's debugfs). 0 for a kernel without LUO.
pub(crate) fn liveupdate_number() -> u64 {
    let handover = fs::read("/sys/kernel/debug/kho/out/sub_fdts/LUO").unwrap_or_default();
    let number = handover.get(8..16).and_then(|field| field.try_into().ok());
    number.map_or(0, |number| u64::from_le_bytes(number) - 1)
}

/// The next kernel's command line: this kernel's, with the generation advanced and LUO on or off.
fn command_line(luo: bool) -> Result<CommandLine, Errno> {
    let line = fs::read_to_string("/proc/cmdline").map_err(|_| Errno::IO)?;
    let is_own = |word: &&str| {
        let name = word.split('=').next().unwrap_or(word);
        name != GENERATION && !(name == LUO && has_luo())
    };
    let mut words: Vec<&str> = line.split_whitespace().filter(is_own).collect();
    let generation = format!("{GENERATION}={}", generation() + 1);
    words.push(&generation);
    if has_luo() {
        words.push(if luo { "liveupdate=on" } else { "liveupdate=off" });
    }
    CommandLine::new(&words.join(" ")).map_err(|_| Errno::INVAL)
}

/// Whether this machine's kernels have LUO, on or off.
fn has_luo() -> bool {
    word(LUO).is_some()
}

/// The directory of the side that does not run. A reset starts side `a`; each switch changes the side.
fn other_side() -> PathBuf {
    let side = if generation().is_multiple_of(2) { SIDES[1] } else { SIDES[0] };
    Path::new(DATA).join(side)
}

fn load_next(luo: bool) -> Result<LoadedImage, Errno> {
    load_with(&other_side().join(INITRAMFS), luo)
}

fn load_with(initramfs: &Path, luo: bool) -> Result<LoadedImage, Errno> {
    let image = Image::open(&other_side().join(KERNEL), Some(initramfs));
    let image = image.inspect_err(|error| eprintln!("{error}")).map_err(|_| Errno::NOEXEC)?;
    let running = Running::read(Path::new("/")).map_err(|_| Errno::IO)?;
    kexec::load(&image, &command_line(luo)?, &running)
        .map_err(|error| error.errno().unwrap_or(Errno::INVAL))
}

/// Loads a kernel for kexec as the case needs it. [`Load::Next`] stays loaded after this returns.
pub(crate) fn load(how: Load) -> Result<(), Errno> {
    match how {
        Load::Next => load_next(true).map(std::mem::forget),
        Load::TooLarge => load_with(&Path::new(DATA).join(LARGE_INITRAMFS), true).map(drop),
        // Dropping the loaded image unloads it.
        Load::Nothing => load_next(true).map(drop),
    }
}

fn is_loaded() -> bool {
    fs::read_to_string("/sys/kernel/kexec/loaded")
        .or_else(|_| fs::read_to_string("/sys/kernel/kexec_loaded"))
        .is_ok_and(|text| text.trim() == "1")
}

/// Leaves this kernel; returns only if that failed, with the errno. Loads the next kernel unless one is
/// loaded already.
pub(crate) fn enter(next: Next) -> Errno {
    let loaded = match next {
        Next::Kernel if is_loaded() => Ok(()),
        Next::Kernel => load(Load::Next),
        Next::WithoutLuo => load_next(false).map(std::mem::forget),
        Next::Reset => Ok(()),
    };
    let command = match next {
        Next::Kernel | Next::WithoutLuo => RebootCommand::Kexec,
        Next::Reset => RebootCommand::Restart,
    };
    match loaded.and_then(|()| reboot(command)) {
        Err(errno) => errno,
        Ok(()) => Errno::CANCELED,
    }
}
