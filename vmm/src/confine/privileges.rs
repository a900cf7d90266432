//! What the kernel grants to a process by itself: its user and groups, capabilities, limits, open files.

#![expect(unsafe_code, reason = "close_range has no safe form: files may be in use")]

use std::io;
use std::os::fd::RawFd;

use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, getrlimit, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::Record;

/// Most open files: several for each queue of each device.
const FILES: u64 = 4096;
/// Most threads, together with those of io_uring.
const THREADS: u64 = 1024;

/// Closes all open files from fd `first` on. Call at the start of the process, when nothing of it uses one.
pub fn close_all_files_from(first: RawFd) -> io::Result<()> {
    let first = first.unsigned_abs();
    // SAFETY: by the contract of this function no code of the process owns one of these files.
    match unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the limits of the process, as hard limits.
pub(super) fn limit_resources(record: &mut Record) {
    let limit = |resource, most: u64| {
        let now = getrlimit(resource);
        let most = now.maximum.map_or(most, |now| now.min(most));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
    };
    // A core dump has the guest's memory.
    record.note("limit of core dumps", limit(Resource::Core, 0));
    record.note("limit of open files", limit(Resource::Nofile, FILES));
}

/// Changes to the user and the group `id`, without any other group.
pub(super) fn change_user(id: u32, record: &mut Record) {
    let change = || -> rustix::io::Result<()> {
        let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
        // Counts the threads of this user, so only a user that nothing else runs as has this limit.
        let most = Rlimit { current: Some(THREADS), maximum: Some(THREADS) };
        setrlimit(Resource::Nproc, most)?;
        bound_capabilities()?;
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
        // The capabilities go with the user.
        set_thread_res_uid(user, user, user)
    };
    record.note("a user of its own", change());
}

/// Empties the bounding set, out of which exec(2) could grant capabilities again.
fn bound_capabilities() -> rustix::io::Result<()> {
    for capability in CapabilitySet::all() {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Has the kernel kill this process when the thread that is its parent ends. Call after all changes of users and
/// capabilities: each of them cancels this.
pub(super) fn end_with_parent() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Gives up all capabilities, in whichever user namespace, and the means to get some by exec(2). Also
/// prevents that other processes of the same user read this process's memory.
pub(super) fn drop_capabilities(record: &mut Record) {
    // In a new user namespace the process may empty the bounding set; without one it has no right to.
    let _ = bound_capabilities();
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    // Kernels before 4.3 have no ambient capabilities.
    let _ = clear_ambient_capability_set();
    record.note("no capabilities", set_capabilities(None, none));
    record.note("no new privileges", set_no_new_privs(true));
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    record.note("memory hidden from other processes", hidden);
}
