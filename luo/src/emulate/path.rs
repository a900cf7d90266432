//! Finds out whether a path is that of the device.
//!
//! Paths are compared as text, component by component, without a look at the file system:
//! `//dev/./liveupdate` and `liveupdate` in `/dev` are the device, a symbolic link to the device is
//! not. The end of the path is checked first, because that excludes nearly all paths.

use crate::uapi::DEVICE;

/// Whether `path` is that of the device. `directory` returns the directory where a relative path
/// starts; it is called only for a relative path with the right end.
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

/// The components of a path, with `.` and `..` resolved.
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
    fn every_spelling_of_the_path_is_the_device() {
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
    fn similar_paths_are_not_the_device() {
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
    fn a_path_with_another_end_needs_no_directory() {
        assert!(!is_device(b"passwd", || panic!("the directory is not needed")));
        assert!(!is_device(b"liveupdate", || None));
    }
}
