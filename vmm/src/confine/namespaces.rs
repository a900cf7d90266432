//! Namespaces of the process alone: no mounts but an empty root, no network interface, no System V IPC, a
//! user namespace in which no user is mapped.
//!
//! The PID namespace is made by the host when it starts the process, because a process cannot enter one.

#![expect(unsafe_code, reason = "rustix counts unshare as unsafe")]

use std::io;

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
};
use rustix::process::{chdir, chroot, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::Record;

/// Enters namespaces other than a user namespace, which needs CAP_SYS_ADMIN.
pub(super) fn enter_all_but_user(record: &mut Record) {
    if record.note("mount namespace", enter(UnshareFlags::NEWNS)) {
        record.note("empty root directory", empty_root());
    }
    enter_others(record);
}

/// As [`enter_all_but_user`], but with the mounts of the host.
pub(super) fn enter_all_but_user_with_root(record: &mut Record) {
    if record.note("mount namespace", enter(UnshareFlags::NEWNS)) {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        record.note("private mounts", mount_change("/", private));
    }
    enter_others(record);
}

fn enter_others(record: &mut Record) {
    record.note("network namespace", enter(UnshareFlags::NEWNET));
    record.note("IPC namespace", enter(UnshareFlags::NEWIPC));
    record.note("UTS namespace", enter(UnshareFlags::NEWUTS));
    if std::process::id() != 1 {
        let why = io::Error::other("the host could not make one");
        record.note("PID namespace", Err(why));
    }
}

/// Enters a user namespace. Returns whether the kernel allowed it.
pub(super) fn enter_user(record: &mut Record) -> bool {
    record.note("user namespace", enter(UnshareFlags::NEWUSER))
}

fn enter(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: only UnshareFlags::FILES is unsafe, and it is not used.
    unsafe { unshare_unsafe(flags) }
}

/// A directory that every host has, and on which this process may mount.
const PLACE: &str = "/proc";

/// Replaces the root of this mount namespace by a directory that is empty, read-only, and that only the user
/// who mounts it may search.
fn empty_root() -> Result<(), Errno> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount("none", PLACE, "tmpfs", flags, c"size=4k,nr_inodes=1,mode=100")?;
    chdir(PLACE)?;
    match pivot_root(".", ".") {
        // The old root now lies on the new one.
        Ok(()) => unmount(".", UnmountFlags::DETACH)?,
        // The root is the initramfs, which cannot be replaced, only covered (pivot_root(2)).
        Err(Errno::INVAL) => {
            mount_move(".", "/")?;
            chroot(".")?;
        }
        Err(errno) => return Err(errno),
    }
    chdir("/")
}
