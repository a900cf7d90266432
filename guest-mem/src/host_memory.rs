//! How much memory the host has available.

use crate::Error;

/// Returns the bytes that are available without swapping: `MemAvailable` in the text of
/// `/proc/meminfo`, which counts free memory and caches that can be dropped (Linux
/// `Documentation/filesystems/proc.rst`).
pub fn available_bytes(meminfo: &str) -> Result<u64, Error> {
    let unreadable = |why: &str| Error::Meminfo(why.to_owned());
    let value = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .ok_or_else(|| unreadable("/proc/meminfo has no MemAvailable"))?;
    let mut words = value.split_ascii_whitespace();
    match (words.next().map(str::parse::<u64>), words.next(), words.next()) {
        (Some(Ok(kibibytes)), Some("kB"), None) => kibibytes
            .checked_mul(1024)
            .ok_or_else(|| unreadable("MemAvailable does not fit 64 bits of bytes")),
        _ => Err(Error::Meminfo(format!("MemAvailable is `{}`, not a number of kB", value.trim()))),
    }
}
