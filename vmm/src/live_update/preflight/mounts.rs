//! What this host has mounted, beside what the next host's configuration mounts.

use std::fs;
use std::path::Path;

use crate::config::Config;

/// What to do about a difference.
pub(super) const REMEDY: &str = "give the next host the same `mounts` in its configuration";

/// The mounts of this host, as `/proc/mounts` has them.
pub(super) fn mounted(root: &Path) -> String {
    fs::read_to_string(root.join("proc/self/mounts")).unwrap_or_default()
}

/// Compares what holds a path of this host, whose `/proc/mounts` is `mounted`, with what would hold a path of the next
/// host. Returns a clause about the difference. `None` if it is the same.
pub(super) fn differ(
    (path, mounted): (&Path, &str),
    (next_path, next): (&Path, &Config),
) -> Option<String> {
    let here = mounted.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let source = words.next()?;
        Some((source, Path::new(words.next()?)))
    });
    let here = deepest(here, path)?;
    let there = next.host.mounts.iter();
    let there = there.map(|mount| (mount.source.as_str(), mount.target.as_path()));
    match deepest(there, next_path) {
        // The root of the running host, which is its initramfs.
        None if here.1 == Path::new("/") => {
            Some("is in this host's initramfs, whose contents are lost".to_owned())
        }
        None => Some(format!("is on {} here, and the next host mounts nothing there", here.0)),
        Some((source, target)) => {
            let is_same = source == here.0
                && path.strip_prefix(here.1).ok() == next_path.strip_prefix(target).ok();
            let target = target.display();
            (!is_same).then(|| {
                format!("is on {} here, and the next host mounts {source} on {target}", here.0)
            })
        }
    }
}

/// The last mount whose target is the deepest one above `path`.
fn deepest<'a>(
    mounts: impl Iterator<Item = (&'a str, &'a Path)>,
    path: &Path,
) -> Option<(&'a str, &'a Path)> {
    let above = mounts.filter(|(_, target)| path.starts_with(target));
    above.max_by_key(|(_, target)| target.components().count())
}
