//! The pool of a host that is a daemon: PID 1 mounts it in both kernels, and fills it in the first. The machine has one if
//! its kernel's command line reserves memory for it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::mount::{MountFlags, mount};

use super::init::Problem;
use super::{DATA, SCRATCH};
use crate::pool::{IMAGE, PATH};

const DEVICE: &str = "/dev/pmem0";
/// The start of the parameter that reserves the memory.
const PARAMETER: &str = "memmap=";
const PIECE: usize = 1 << 20;

/// Mounts the pool, if the machine has one. `is_first`: whether it is empty.
pub(super) fn set_up(is_first: bool) -> Result<(), Problem> {
    if !is_in_use()? {
        return Ok(());
    }
    if is_first {
        fill()?;
    }
    fs::create_dir_all(PATH)?;
    Ok(mount(DEVICE, PATH, "ext4", MountFlags::empty(), c"dax=always")?)
}

/// The parameter that the next kernel's LUO needs.
pub(super) fn parameter() -> io::Result<String> {
    let kernel = fs::read_to_string("/proc/cmdline")?;
    let pool = kernel.split_whitespace().find(|word| word.starts_with(PARAMETER));
    Ok(pool.unwrap_or(SCRATCH).to_owned())
}

/// The line in `[host]` about the pool, if the machine has one.
pub(super) fn line() -> io::Result<String> {
    Ok(if is_in_use()? { format!("pool = \"{PATH}\"\n") } else { String::new() })
}

/// Whether the machine has one.
pub(super) fn is_in_use() -> io::Result<bool> {
    Ok(parameter()?.starts_with(PARAMETER))
}

/// Copies the image of the empty pool. The memory is zero, and so is most of the image.
fn fill() -> Result<(), Problem> {
    let (mut image, device) =
        (File::open(format!("{DATA}/{IMAGE}"))?, File::options().write(true).open(DEVICE)?);
    let (mut piece, mut at) = (vec![0; PIECE], 0);
    loop {
        let count = image.read(&mut piece)?;
        if count == 0 {
            return Ok(device.sync_all()?);
        }
        if piece[..count].iter().any(|byte| *byte != 0) {
            device.write_all_at(&piece[..count], at)?;
        }
        at += count as u64;
    }
}
