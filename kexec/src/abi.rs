//! Finds out which versions of the handover formats a kernel knows, from the strings in its image.
//!
//! If the next kernel has another version of KHO's format, it silently drops everything that is handed
//! over; with another version of LUO's format it panics; with another version of the memfd format it
//! cannot open `/dev/liveupdate` until the next boot. Kernels compare versions as whole strings
//! (`kho-v4`, `luo-v5`, `memfd-v2` in Linux 7.3). A kernel that does not run yet can be asked in no other
//! way. Searching for strings is a heuristic, but it prevents the loss of everything.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use memchr::memmem;

use crate::status::KHO;

/// The versions of the handover formats that a kernel knows, as far as they could be found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abi {
    /// Versions of KHO's format, such as `kho-v4`.
    pub kho: BTreeSet<String>,
    /// Versions of the format of LUO's sessions, such as `luo-v5`.
    pub luo: BTreeSet<String>,
    /// Versions of the format of a preserved memfd, such as `memfd-v2`.
    pub memfd: BTreeSet<String>,
}

/// A format that the running kernel writes and the next one does not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the running kernel hands over in {}, the next one reads {}: {consequence}",
    list(here),
    list(there)
)]
pub struct Difference {
    /// Versions that the running kernel writes.
    pub here: BTreeSet<String>,
    /// Versions that the next kernel reads.
    pub there: BTreeSet<String>,
    /// What a live update would lead to.
    pub consequence: &'static str,
}

fn list(versions: &BTreeSet<String>) -> String {
    let versions: Vec<String> = versions.iter().map(|version| format!("`{version}`")).collect();
    if versions.is_empty() { "none".to_owned() } else { versions.join(" or ") }
}

/// Returns the formats that the running kernel (`here`) writes and the next kernel (`there`) does not
/// read. A format whose version in the running kernel is unknown counts as equal.
pub fn differences(here: &Abi, there: &Abi) -> Vec<Difference> {
    [
        (&here.kho, &there.kho, "everything that is preserved would be dropped silently"),
        (&here.luo, &there.luo, "it would panic"),
        (&here.memfd, &there.memfd, "nothing that is preserved could be retrieved"),
    ]
    .into_iter()
    .filter(|(here, there, _)| !here.is_empty() && here.is_disjoint(there))
    .map(|(here, there, consequence)| Difference {
        here: here.clone(),
        there: there.clone(),
        consequence,
    })
    .collect()
}

/// Returns the versions that the running kernel shows in debugfs below `root`. Sets stay empty where it
/// shows nothing.
pub fn of_running(root: &Path) -> Abi {
    let kho = root.join(KHO);
    let mut abi = Abi::default();
    // The incoming tree exists after a kexec, the outgoing one after a cold boot. The incoming tree has
    // this kernel's version too, because the kernel checked it at boot.
    for tree in ["out/fdt", "in/fdt", "out/sub_fdts/LUO"] {
        if let Ok(bytes) = fs::read(kho.join(tree)) {
            abi.collect(&bytes);
        }
    }
    abi
}

impl Abi {
    /// Adds every string in `bytes` that is `kho-v`, `luo-v` or `memfd-v` with a number and a NUL.
    pub(crate) fn collect(&mut self, bytes: &[u8]) {
        for (prefix, versions) in [
            (&b"kho-v"[..], &mut self.kho),
            (b"luo-v", &mut self.luo),
            (b"memfd-v", &mut self.memfd),
        ] {
            versions.extend(versions_in(bytes, prefix));
        }
    }
}

/// Finds every string of `prefix`, one to four digits and a NUL that is not the end of a longer string.
fn versions_in<'a>(bytes: &'a [u8], prefix: &'a [u8]) -> impl Iterator<Item = String> + 'a {
    memmem::find_iter(bytes, prefix).filter_map(move |start| {
        let preceded = start > 0 && bytes[start - 1].is_ascii_graphic();
        let digits = bytes[start + prefix.len()..].iter();
        let digits = digits.take_while(|byte| byte.is_ascii_digit()).count();
        let end = start + prefix.len() + digits;
        let whole = !preceded && (1..=4).contains(&digits) && bytes.get(end) == Some(&0);
        whole.then(|| String::from_utf8_lossy(&bytes[start..end]).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(versions: &[&str]) -> BTreeSet<String> {
        versions.iter().map(|version| (*version).to_owned()).collect()
    }

    fn abi(kho: &[&str], luo: &[&str], memfd: &[&str]) -> Abi {
        Abi { kho: set(kho), luo: set(luo), memfd: set(memfd) }
    }

    #[test]
    fn whole_strings_are_found_and_parts_of_others_are_not() {
        let mut found = Abi::default();
        found.collect(b"\0kho-v4\0 luo-v5\0\xffmemfd-v2\0memfd-v10\0");
        assert_eq!(found, abi(&["kho-v4"], &["luo-v5"], &["memfd-v10", "memfd-v2"]));
        let mut found = Abi::default();
        found.collect(b"xkho-v4\0kho-v\0kho-v4xluo-v5 memfd-v99999\0/luo-v5\0kho-v4");
        assert_eq!(found, Abi::default());
    }

    #[test]
    fn only_known_versions_that_the_next_kernel_does_not_read_are_differences() {
        let here = abi(&["kho-v4"], &["luo-v5"], &[]);
        assert_eq!(differences(&here, &abi(&["kho-v4"], &["luo-v5", "luo-v6"], &[])), []);
        assert_eq!(differences(&Abi::default(), &Abi::default()), []);
        let found = differences(&here, &abi(&["kho-v4"], &["luo-v6"], &["memfd-v2"]));
        let [difference] = &found[..] else { panic!("{found:?}") };
        let sentence = difference.to_string();
        assert!(sentence.contains("`luo-v5`") && sentence.contains("`luo-v6`"), "{sentence}");
        assert!(sentence.contains("panic"), "{sentence}");
        assert_eq!(differences(&here, &Abi::default()).len(), 2);
    }

    #[test]
    fn the_versions_of_a_running_kernel_are_read_where_it_shows_them() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(of_running(root.path()), Abi::default());
        let kho = root.path().join(KHO);
        fs::create_dir_all(kho.join("out/sub_fdts")).unwrap();
        fs::write(kho.join("out/sub_fdts/LUO"), b"luo-v5\0\0\x01\0\0\0\0\0\0\0").unwrap();
        assert_eq!(of_running(root.path()), abi(&[], &["luo-v5"], &[]));
        fs::create_dir_all(kho.join("in")).unwrap();
        fs::write(kho.join("in/fdt"), b"\xd0\x0d\xfe\xed\0\0\0\x07kho-v4\0\0").unwrap();
        assert_eq!(of_running(root.path()), abi(&["kho-v4"], &["luo-v5"], &[]));
    }
}
