//! Which paths mean the device.
//!
//! A path is compared by its words, not by what the file system makes of it: `//dev/./liveupdate` and
//! `liveupdate` in `/dev` are the device, a symbolic link to it is not. The check comes first
//! that answers almost every path at once: how it ends.

use crate::uapi::DEVICE;

/// Whether `path` means the device. `directory` says in which directory a relative path starts, and
/// is only asked for one that could.
pub(super) fn is_device(path: &[u8], directory: impl FnOnce() -> Option<Vec<u8>>) -> bool {
    let ends_right = path.ends_with(b"liveupdate");
    if !ends_right {
        return false;
    }
    if path.starts_with(b"/") {
        return words(path) == words(DEVICE.as_bytes());
    }
    directory().is_some_and(|directory| {
        let whole = [&directory[..], b"/", path].concat();
        words(&whole) == words(DEVICE.as_bytes())
    })
}

/// The names on the way, with `.` and `..` resolved.
fn words(path: &[u8]) -> Vec<&[u8]> {
    let mut words = Vec::new();
    for word in path.split(|byte| *byte == b'/') {
        match word {
            b"" | b"." => {}
            b".." => drop(words.pop()),
            word => words.push(word),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(directory: &str, path: &str) -> bool {
        is_device(path.as_bytes(), || Some(directory.into()))
    }

    #[test]
    fn every_way_to_write_the_path_is_the_device() {
        for path in [
            "/dev/liveupdate",
            "//dev//liveupdate",
            "/dev/./liveupdate",
            "/dev/../dev/liveupdate",
            "/../dev/liveupdate",
        ] {
            assert!(from("/nowhere", path), "{path}");
        }
        for (directory, path) in [
            ("/dev", "liveupdate"),
            ("/dev", "./liveupdate"),
            ("/", "dev/liveupdate"),
            ("/dev/shm", "../liveupdate"),
            ("/home", "../dev/liveupdate"),
        ] {
            assert!(from(directory, path), "{path} in {directory}");
        }
    }

    #[test]
    fn what_only_looks_like_the_path_is_not_the_device() {
        for path in [
            "",
            "/",
            "/dev",
            "/dev/liveupdate/",
            "/dev/liveupdate2",
            "/dev/xliveupdate",
            "/dev/liveupdate/.",
            "/x/dev/liveupdate",
            "/liveupdate",
            "/DEV/liveupdate",
        ] {
            assert!(!from("/", path), "{path}");
        }
        assert!(!from("/tmp", "liveupdate"));
        assert!(!from("/dev", "dev/liveupdate"));
    }

    #[test]
    fn a_path_that_cannot_be_it_needs_no_directory() {
        assert!(!is_device(b"passwd", || panic!("nobody should ask")));
        assert!(!is_device(b"liveupdate", || None));
    }
}
