//! Stops khugepaged while guest RAM is being preserved.
//!
//! khugepaged copies small pages of a file into a huge page and replaces them in the file by the huge
//! page. It checks the reference count of each small page first, but also replaces a page that is pinned
//! after this check: `memfd_pin_folios`, with which LUO preserves a memfd, does not check again whether
//! the pinned page is still part of the file (Linux 7.3.4, `collapse_file` in mm/khugepaged.c). LUO then
//! hands over the old pages, and the guest's later writes are lost. Pages that are already pinned when
//! khugepaged checks them are safe.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::huge_pages::{chosen, failed};

/// Directory of the settings in sysfs.
const DIRECTORY: &str = "kernel/mm/transparent_hugepage";
/// The settings that give khugepaged work, in `DIRECTORY` and in each `hugepages-*` directory below it.
/// When all of them switch it off, the kernel ends khugepaged's thread and waits for the end.
const SETTINGS: [&str; 2] = ["enabled", "shmem_enabled"];
/// The values that switch khugepaged off, or leave the decision to the setting one level above.
const IDLE: [&str; 3] = ["never", "deny", "inherit"];

/// khugepaged is stopped. Dropping this writes the previous settings back.
#[derive(Debug)]
#[must_use = "khugepaged runs again as soon as this is dropped"]
pub struct KhugepagedStopped {
    /// The files that were changed, each with the value to write back.
    before: Vec<(PathBuf, String)>,
}

impl KhugepagedStopped {
    /// Stops khugepaged through the settings in the sysfs mounted at `sysfs` (`/sys`). Does nothing on a
    /// kernel without huge pages.
    pub fn stop(sysfs: &Path) -> Result<Self, Error> {
        let mut this = Self { before: Vec::new() };
        for path in settings(&sysfs.join(DIRECTORY)) {
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(|source| failed("read", &path, source))?,
            };
            let Some(word) = chosen(&text) else {
                let problem = format!("`{}` names no setting", text.trim());
                return Err(failed("read", &path, io::Error::other(problem)));
            };
            if !IDLE.contains(&word) {
                let word = word.to_owned();
                fs::write(&path, "never")
                    .map_err(|source| failed("write `never` to", &path, source))?;
                this.before.push((path, word));
            }
        }
        Ok(this)
    }
}

impl Drop for KhugepagedStopped {
    fn drop(&mut self) {
        for (path, word) in &self.before {
            // A setting that cannot be written back only makes guests slower: their pages stay small.
            let _ = fs::write(path, word);
        }
    }
}

fn settings(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let sizes = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = sizes.filter(|entry| entry.file_name().to_string_lossy().starts_with("hugepages-"));
    let directories = [directory.to_owned()].into_iter().chain(sizes.map(|entry| entry.path()));
    directories.flat_map(|directory| SETTINGS.map(|setting| directory.join(setting)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs() -> (tempfile::TempDir, PathBuf) {
        let sysfs = tempfile::tempdir().unwrap();
        let directory = sysfs.path().join(DIRECTORY);
        fs::create_dir_all(directory.join("hugepages-64kB")).unwrap();
        fs::write(directory.join("enabled"), "always [madvise] never\n").unwrap();
        let shmem = "always within_size [advise] never deny force\n";
        fs::write(directory.join("shmem_enabled"), shmem).unwrap();
        let size = directory.join("hugepages-64kB");
        fs::write(size.join("enabled"), "[always] inherit madvise never\n").unwrap();
        fs::write(size.join("shmem_enabled"), "always [inherit] within_size advise never\n")
            .unwrap();
        (sysfs, directory)
    }

    #[test]
    fn every_setting_says_never_until_the_end() {
        let (sysfs, directory) = sysfs();
        let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
        let stopped = KhugepagedStopped::stop(sysfs.path()).unwrap();
        assert_eq!(read("enabled"), "never");
        assert_eq!(read("shmem_enabled"), "never");
        assert_eq!(read("hugepages-64kB/enabled"), "never");
        assert!(read("hugepages-64kB/shmem_enabled").contains("[inherit]"));
        drop(stopped);
        assert_eq!(read("enabled"), "madvise");
        assert_eq!(read("shmem_enabled"), "advise");
        assert_eq!(read("hugepages-64kB/enabled"), "always");
    }

    #[test]
    fn what_was_changed_before_an_error_is_changed_back() {
        let (sysfs, directory) = sysfs();
        fs::write(directory.join("shmem_enabled"), "no brackets").unwrap();
        let error = KhugepagedStopped::stop(sysfs.path()).unwrap_err().to_string();
        assert!(error.contains("shmem_enabled"), "{error}");
        assert_eq!(fs::read_to_string(directory.join("enabled")).unwrap(), "madvise");
    }

    #[test]
    fn a_kernel_without_huge_pages_has_nothing_to_stop() {
        let nothing = tempfile::tempdir().unwrap();
        let stopped = KhugepagedStopped::stop(nothing.path()).unwrap();
        assert!(stopped.before.is_empty());
    }
}
