//! The file systems of `[host]` that could not be mounted when the host started, such as on a disk that came late. They
//! are tried again before a VM boots or is restored, because its disks may be there.

use std::io;
use std::time::Duration;

use super::init::{self, MountError};
use crate::causes::chain;
use crate::config::Mount;
use crate::guests::elsewhere::Elsewhere;

/// How long a mount may take before the host goes on without it.
const WITHIN: Duration = Duration::from_secs(5);

/// A file system that is not mounted.
pub(super) struct Unmounted {
    mount: Mount,
    why: String,
    /// An attempt that was late.
    late: Option<Elsewhere<Result<(), MountError>>>,
}

impl Unmounted {
    pub(super) fn new(mount: Mount, error: &MountError) -> Self {
        Self { mount, why: chain(error).join(": "), late: None }
    }

    /// Why it is not mounted.
    pub(super) fn why(&self) -> &str {
        &self.why
    }

    /// Tries again to mount it, in a thread that nobody waits for longer than `within`: a device or a server may hang.
    /// Returns whether it is mounted now.
    fn try_again(&mut self, within: Duration) -> bool {
        // One that is late was waited for already.
        let within = if self.late.is_some() { Duration::ZERO } else { within };
        let (source, target) = (&self.mount.source, self.mount.target.display());
        let attempt = self.late.take().map_or_else(|| begin(&self.mount), Ok);
        let attempt = match attempt {
            Ok(attempt) => attempt,
            Err(error) => {
                self.why = format!("cannot mount {source} on {target} again: {error}");
                tracing::warn!("{}", self.why);
                return false;
            }
        };
        match attempt.wait_for(within) {
            Some(Ok(Ok(()))) => {
                tracing::info!("{source} is mounted on {target} now");
                return true;
            }
            Some(Ok(Err(error))) => self.why = chain(&error).join(": "),
            Some(Err(panicked)) => {
                self.why = format!("cannot mount {source} on {target} again: {panicked}");
            }
            None => {
                self.why = format!("{source} is still being mounted on {target}");
                self.late = Some(attempt);
            }
        }
        tracing::warn!("{}", self.why);
        false
    }
}

/// Begins to try again to mount it.
fn begin(mount: &Mount) -> io::Result<Elsewhere<Result<(), MountError>>> {
    let what = format!("mounting {} on {}", mount.source, mount.target.display());
    let mount = mount.clone();
    Elsewhere::begin("mount", what, move || init::mount_again(&mount))
}

/// Tries all of them again. Forgets those that are mounted now.
pub(super) fn try_again(unmounted: &mut Vec<Unmounted>) {
    unmounted.retain_mut(|mount| !mount.try_again(WITHIN));
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::path::Path;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Instant;

    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;
    use crate::guests::answers::readable;

    /// Gives this thread, and those that it starts, mounts of their own. Returns whether that is allowed.
    #[expect(unsafe_code, reason = "unshare")]
    fn have_own_mounts() -> bool {
        // SAFETY: only the mounts of this thread become its own.
        let own = unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        own.and_then(|()| mount_change("/", private)).is_ok()
    }

    /// A mount that fails until the directory `late` is there.
    fn overlay(directory: &Path) -> Mount {
        let lower = |name: &str| directory.join(name).display().to_string();
        Mount {
            source: "late".to_owned(),
            target: directory.join("target"),
            fs: "overlay".to_owned(),
            options: format!("lowerdir={}:{}", lower("late"), lower("there")),
            format_from: None,
        }
    }

    #[test]
    fn what_was_not_there_at_the_start_is_mounted_when_it_is() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("there")).unwrap();
        let mount = overlay(directory.path());
        let target = mount.target.clone();
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let done = thread::spawn(move || {
            if !known.contains("overlay") || !have_own_mounts() {
                eprintln!("SKIPPED: needs root and the file system overlay");
                return;
            }
            let mut unmounted: Vec<_> = init::mount_all(&[mount], false, true)
                .into_iter()
                .map(|(mount, error)| Unmounted::new(mount, &error))
                .collect();
            assert_eq!(unmounted.len(), 1);
            for _ in 0..2 {
                try_again(&mut unmounted);
                assert!(unmounted[0].why().contains("overlay"), "{}", unmounted[0].why());
                // What is written there would be lost with the kernel.
                fs::write(target.join("a file"), "").unwrap_err();
            }
            let late = directory.path().join("late");
            fs::create_dir(&late).unwrap();
            fs::write(late.join("disk"), "contents").unwrap();
            try_again(&mut unmounted);
            assert!(unmounted.is_empty());
            assert_eq!(fs::read(target.join("disk")).unwrap(), b"contents");
        });
        done.join().unwrap();
    }

    #[test]
    fn a_mount_that_hangs_is_waited_for_once_and_not_started_twice() {
        let directory = tempfile::tempdir().unwrap();
        let mount = overlay(directory.path());
        let (sender, wait) = channel();
        let wait = move || wait.recv().unwrap();
        let attempt = Elsewhere::begin("mount", "mounting late".to_owned(), wait).unwrap();
        let mut unmounted = Unmounted { mount, why: String::new(), late: Some(attempt) };
        assert!(!unmounted.try_again(Duration::ZERO));
        assert!(unmounted.why().contains("still being mounted"), "{}", unmounted.why());
        sender.send(Ok(())).unwrap();
        let attempt = unmounted.late.as_ref().unwrap();
        readable(&[attempt.as_fd()], Instant::now() + Duration::from_secs(600));
        assert!(unmounted.try_again(WITHIN), "the answer of the first attempt counts");
    }
}
