//! Access to a thread of the program that waits for an answer: its memory, fds and directory.
//!
//! The thread is found by its ID, which Linux may reuse when the thread is dead and reaped. So a
//! result counts only if the notification still waits afterwards ([`Listener::waits`]). The time of
//! a call does not depend on the number of fds, except that of [`Tracee::has_no_free_fd`], which is
//! called only when a request fails anyway.
//!
//! [`Listener::waits`]: super::notify::Listener::waits
#![expect(unsafe_code, reason = "raw system calls read and write the memory of another process")]

use std::cell::OnceCell;
use std::fs;
use std::os::fd::OwnedFd;

use libc::iovec;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::builtin::decode::Fault;

/// `PIDFD_THREAD`: makes a pidfd of a thread instead of its process (Linux 6.9).
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
/// Size of the longest path that the kernel accepts, in bytes, with its NUL.
const PATH_MAX: usize = 4096;
const PAGE: u64 = 4096;

/// A thread of the program.
#[derive(Debug)]
pub(super) struct Tracee {
    /// The thread ID.
    thread: i32,
    pidfd: OnceCell<OwnedFd>,
}

impl Tracee {
    pub(super) fn new(thread: u32) -> Self {
        Self { thread: thread as i32, pidfd: OnceCell::new() }
    }

    /// Reads memory. Errors if not all bytes can be read.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let length = bytes.len();
        if self.read_some(address, bytes) == Ok(length) { Ok(()) } else { Err(Fault) }
    }

    fn read_some(&self, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
        let local = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let remote = iovec { iov_base: address as *mut _, iov_len: bytes.len() };
        // SAFETY: `local` is one buffer that this process may write; the kernel checks `remote`.
        let result = unsafe {
            libc::process_vm_readv(self.thread, &raw const local, 1, &raw const remote, 1, 0)
        };
        usize::try_from(result).map_err(|_| last_errno())
    }

    /// Writes memory. Errors if the thread itself could not write it.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let local = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = iovec { iov_base: address as *mut _, iov_len: bytes.len() };
        // SAFETY: `local` is only read; `remote` is memory of another process, and the kernel
        // checks it.
        let result = unsafe {
            libc::process_vm_writev(self.thread, &raw const local, 1, &raw const remote, 1, 0)
        };
        if usize::try_from(result) == Ok(bytes.len()) { Ok(()) } else { Err(Fault) }
    }

    /// Errors if this process may not read the memory of the thread. `Ok` also if the thread is
    /// dead.
    pub(super) fn reachable(&self) -> Result<(), Errno> {
        match self.read_some(0, &mut [0]) {
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => Err(errno),
            _ => Ok(()),
        }
    }

    /// Reads the path at `address`. `None` if the memory cannot be read or the path is too long;
    /// the kernel then answers the call with the right errno.
    pub(super) fn path(&self, address: u64) -> Option<Vec<u8>> {
        const CHUNK: usize = 256;
        let mut path = Vec::new();
        let mut chunk = [0; CHUNK];
        while path.len() < PATH_MAX {
            let at = address.checked_add(path.len() as u64)?;
            // A read must not cross a page boundary: the page behind the NUL may not be mapped.
            let in_page = (PAGE - at % PAGE) as usize;
            let chunk = &mut chunk[..in_page.min(CHUNK)];
            self.read(at, chunk).ok()?;
            if let Some(end) = chunk.iter().position(|byte| *byte == 0) {
                path.extend(&chunk[..end]);
                return Some(path);
            }
            path.extend(&*chunk);
        }
        None
    }

    /// Returns the directory where a relative path starts: `fd`, or the working directory.
    pub(super) fn directory(&self, fd: i32) -> Option<Vec<u8>> {
        use std::os::unix::ffi::OsStringExt;
        let link = match fd {
            libc::AT_FDCWD => format!("/proc/{}/cwd", self.thread),
            fd => format!("/proc/{}/fd/{fd}", self.thread),
        };
        Some(fs::read_link(link).ok()?.into_os_string().into_vec())
    }

    /// Returns a new reference to the file behind an fd of the thread.
    pub(super) fn file(&self, fd: i32) -> Result<OwnedFd, Errno> {
        // A negative number is never an fd.
        if fd < 0 {
            return Err(Errno::BADF);
        }
        let pidfd = match self.pidfd.get() {
            Some(pidfd) => pidfd,
            None => {
                let opened = self.open_pidfd()?;
                self.pidfd.get_or_init(|| opened)
            }
        };
        pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty())
    }

    fn open_pidfd(&self) -> Result<OwnedFd, Errno> {
        let thread = Pid::from_raw(self.thread).ok_or(Errno::SRCH)?;
        match pidfd_open(thread, PidfdFlags::from_bits_retain(PIDFD_THREAD)) {
            // Linux before 6.9 only has pidfds of processes.
            Err(Errno::INVAL) => pidfd_open(self.process()?, PidfdFlags::empty()),
            opened => opened,
        }
    }

    /// Returns the process of the thread.
    fn process(&self) -> Result<Pid, Errno> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.thread));
        let status = status.map_err(|_| Errno::SRCH)?;
        let id = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        id.and_then(|id| id.trim().parse().ok()).and_then(Pid::from_raw).ok_or(Errno::SRCH)
    }

    /// Whether all fds below the process's limit are open.
    pub(super) fn has_no_free_fd(&self) -> bool {
        let Some(limit) = self.fd_limit() else { return false };
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.thread)) else { return false };
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        numbers.filter(|number: &u64| *number < limit).count() as u64 >= limit
    }

    fn fd_limit(&self) -> Option<u64> {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.thread)).ok()?;
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The current thread.
    fn here() -> Tracee {
        Tracee::new(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned())
    }

    fn address<T: ?Sized>(value: &T) -> u64 {
        std::ptr::from_ref(value).addr() as u64
    }

    #[test]
    fn memory_is_read_and_written_at_its_address() {
        let (tracee, mut memory) = (here(), [1, 2, 3, 4]);
        let at = address(&memory);
        tracee.write(at + 1, &[7, 8]).unwrap();
        tracee.read(at, &mut memory).unwrap();
        // Read through the kernel, because the compiler may assume that `memory` is unchanged.
        let mut copy = [0; 4];
        tracee.read(at, &mut copy).unwrap();
        assert_eq!(copy, memory);
        assert_eq!(tracee.read(0, &mut copy), Err(Fault));
        assert_eq!(tracee.write(0, &copy), Err(Fault));
        assert_eq!(tracee.reachable(), Ok(()));
    }

    #[test]
    fn a_path_ends_at_its_nul() {
        let tracee = here();
        for length in [0, 1, 255, 256, 257, 4000, PATH_MAX - 1] {
            let text = [vec![b'x'; length], vec![0], vec![b'y'; 300]].concat();
            let path = tracee.path(address(&*text));
            assert_eq!(path.map(|path| path.len()), Some(length));
        }
        let endless = vec![b'x'; 3 * PATH_MAX];
        assert_eq!(tracee.path(address(&*endless)), None);
        assert_eq!(tracee.path(0), None);
    }

    #[test]
    fn a_thread_has_the_process_and_the_files_of_its_process() {
        let (tracee, null) = (here(), fs::File::open("/dev/null").unwrap());
        assert_eq!(tracee.process().unwrap(), rustix::process::getpid());
        let found = fs::File::from(tracee.file(null.as_raw_fd()).unwrap());
        assert!(found.metadata().unwrap().file_type() == null.metadata().unwrap().file_type());
        for number in [-1, i32::MAX] {
            assert_eq!(tracee.file(number).unwrap_err(), Errno::BADF);
        }
        assert!(!tracee.has_no_free_fd());
    }

    #[test]
    fn a_dead_thread_has_no_memory_and_no_files() {
        let tracee = Tracee::new(i32::MAX.cast_unsigned());
        assert_eq!(tracee.read(0x1000, &mut [0]), Err(Fault));
        assert_eq!(tracee.file(0).unwrap_err(), Errno::SRCH);
        assert_eq!(tracee.reachable(), Ok(()));
        assert!(!tracee.has_no_free_fd());
    }
}
