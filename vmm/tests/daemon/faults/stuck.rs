//! A thread of the host that is stuck in the kernel, on a file server that does not answer, when systemd stops the host.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

use super::service::{Evidence, PATIENCE, Service, VMS};
use super::store::{assert_all_go_on, restart_with, start};

/// A file system whose server takes every request and answers none but the first, so that no signal ends a process that
/// waits for it. Dropping this ends the waits.
struct DeadServer {
    target: PathBuf,
    requests: Receiver<()>,
}

impl DeadServer {
    /// Mounts the file system on a new directory. `None`, and a line, if that is not allowed.
    fn mount(target: PathBuf) -> Option<Self> {
        fs::create_dir(&target).unwrap();
        let Ok(mut device) = File::options().read(true).write(true).open("/dev/fuse") else {
            eprintln!("skipped: no /dev/fuse");
            return None;
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        if let Err(errno) =
            mount("dead", &target, "fuse", MountFlags::empty(), Some(options.as_c_str()))
        {
            eprintln!("skipped: cannot mount a file system: {errno}");
            return None;
        }
        let (request, requests) = channel();
        thread::spawn(move || {
            // The kernel refuses to fill a shorter buffer.
            let mut buffer = vec![0; 1 << 16];
            let count = device.read(&mut buffer).unwrap();
            device.write_all(&answer_to_init(&buffer[..count])).unwrap();
            // Errors when the file system is unmounted.
            while device.read(&mut buffer).is_ok() {
                let _ = request.send(());
            }
        });
        Some(Self { target, requests })
    }

    /// Waits until somebody waits for the server.
    fn is_asked(&self) {
        self.requests.recv_timeout(PATIENCE).unwrap();
    }
}

impl Drop for DeadServer {
    fn drop(&mut self) {
        unmount(&self.target, UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
    }
}

/// The answer to FUSE_INIT (Linux `include/uapi/linux/fuse.h`): `fuse_out_header` and `fuse_init_out`, whose first
/// words are the version of the protocol.
fn answer_to_init(request: &[u8]) -> Vec<u8> {
    let unique = &request[8..16];
    let mut answer = 80_u32.to_le_bytes().to_vec();
    answer.extend([0; 4]);
    answer.extend(unique);
    answer.extend([7_u32, 31].map(u32::to_le_bytes).concat());
    answer.resize(80, 0);
    answer
}

/// Starts a host under systemd, and lets a thread of it wait for a server that is dead. Returns what the guests' memory
/// said before.
fn stuck() -> Option<(Service, DeadServer, [Evidence; 2])> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root, who mounts file systems");
        return None;
    }
    let mut service = start("")?;
    let dead = DeadServer::mount(service.path().join("dead"))?;
    let kernel = dead.target.join("kernel");
    restart_with(&mut service, |text| {
        text + &format!("[[vm]]\nname = \"three\"\nmemory = \"size=1G\"\nkernel = {kernel:?}\n")
    });
    let before = VMS.map(|name| service.counts_on(name));
    let mut boots = service.begin(&["boot", "three"]);
    thread::spawn(move || boots.wait());
    dead.is_asked();
    Some((service, dead, before))
}

/// Whether another host could lock what says that a host runs.
fn is_lock_free(directory: &Path) -> bool {
    let lock = File::open(directory.join("lock")).unwrap();
    flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()
}

#[test]
fn no_guest_is_paused_for_a_stop_while_a_thread_of_the_host_is_stuck() {
    let Some((mut service, dead, before)) = stuck() else { return };
    service.signal(Signal::TERM);
    service.wait_for_words("this host is still opening the files of VM `three`");
    assert_all_go_on(&service, before);
    let before = VMS.map(|name| service.counts_on(name));
    drop(dead);
    service.start_again();
    assert_all_go_on(&service, before);
    assert!(!service.logs().contains("all the same"), "{}", service.logs());
}

#[test]
fn a_second_signal_lets_a_host_leave_whose_thread_is_stuck() {
    let Some((mut service, dead, before)) = stuck() else { return };
    service.signal(Signal::TERM);
    service.wait_for_words("this host is still opening the files of VM `three`");
    assert!(!is_lock_free(service.path()));
    service.signal(Signal::TERM);
    service.wait_for_words("the VMs go into the fd store all the same");
    // Its process cannot be reaped, and has what the next host needs no more.
    while !is_lock_free(service.path()) {
        assert!(service.lives(), "{}", service.logs());
        thread::yield_now();
    }
    assert!(service.lives(), "{}", service.logs());
    VMS.iter().for_each(|name| assert!(service.is_still_kept(name), "{name}"));
    drop(dead);
    service.start_again();
    assert_all_go_on(&service, before);
}
