//! A thread of the program that waits for an answer: its memory, its fds, its directory.
//!
//! All of it is found by the thread's number, which means something else once the thread is dead
//! and reaped: what is read here counts only if the notification still waits afterwards. Nothing here
//! depends on how many fds there are, except [`Tracee::has_no_free_fd`], which is only asked when a
//! call fails anyway.
#![expect(unsafe_code, reason = "another process's memory is read and written by raw calls")]

use std::cell::OnceCell;
use std::fs;
use std::os::fd::OwnedFd;

use libc::iovec;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::builtin::decode::Fault;

/// `PIDFD_THREAD`: a pidfd of a thread, not of its process (Linux 6.9).
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
/// Longest path that the kernel takes, with its NUL.
const PATH_MAX: usize = 4096;
const PAGE: u64 = 4096;

/// A thread of the program.
#[derive(Debug)]
pub(super) struct Tracee {
    thread: i32,
    pidfd: OnceCell<OwnedFd>,
}

impl Tracee {
    pub(super) fn new(thread: u32) -> Self {
        Self { thread: thread as i32, pidfd: OnceCell::new() }
    }

    /// Reads memory, all of it or none.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let length = bytes.len();
        if self.read_some(address, bytes) == Ok(length) { Ok(()) } else { Err(Fault) }
    }

    fn read_some(&self, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
        let local = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let remote = iovec { iov_base: address as *mut _, iov_len: bytes.len() };
        // SAFETY: `local` is one buffer that we may write; `remote` is checked by the kernel.
        let result = unsafe {
            libc::process_vm_readv(self.thread, &raw const local, 1, &raw const remote, 1, 0)
        };
        usize::try_from(result).map_err(|_| last_errno())
    }

    /// Writes memory that the thread itself could write.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let local = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = iovec { iov_base: address as *mut _, iov_len: bytes.len() };
        // SAFETY: `local` is only read; `remote` is another process's memory, checked by the kernel.
        let result = unsafe {
            libc::process_vm_writev(self.thread, &raw const local, 1, &raw const remote, 1, 0)
        };
        if usize::try_from(result) == Ok(bytes.len()) { Ok(()) } else { Err(Fault) }
    }

    /// Whether this process may read that one's memory at all. `Ok` if it is gone.
    pub(super) fn reachable(&self) -> Result<(), Errno> {
        match self.read_some(0, &mut [0]) {
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => Err(errno),
            _ => Ok(()),
        }
    }

    /// The path at `address`; `None` if it is no path, and the kernel will say what it is.
    pub(super) fn path(&self, address: u64) -> Option<Vec<u8>> {
        const CHUNK: usize = 256;
        let mut path = Vec::new();
        let mut chunk = [0; CHUNK];
        while path.len() < PATH_MAX {
            let at = address.checked_add(path.len() as u64)?;
            // Not over the end of a page: what is behind the NUL may not be there.
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

    /// The directory that a relative path starts in: that of `fd`, or the thread's own.
    pub(super) fn directory(&self, fd: i32) -> Option<Vec<u8>> {
        use std::os::unix::ffi::OsStringExt;
        let link = match fd {
            libc::AT_FDCWD => format!("/proc/{}/cwd", self.thread),
            fd => format!("/proc/{}/fd/{fd}", self.thread),
        };
        Some(fs::read_link(link).ok()?.into_os_string().into_vec())
    }

    /// Another reference to the file behind an fd.
    pub(super) fn file(&self, fd: i32) -> Result<OwnedFd, Errno> {
        // What is no fd needs no look at the process.
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
            // An older kernel has pidfds of processes only.
            Err(Errno::INVAL) => pidfd_open(self.process()?, PidfdFlags::empty()),
            opened => opened,
        }
    }

    fn process(&self) -> Result<Pid, Errno> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.thread));
        let status = status.map_err(|_| Errno::SRCH)?;
        let id = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        id.and_then(|id| id.trim().parse().ok()).and_then(Pid::from_raw).ok_or(Errno::SRCH)
    }

    /// Whether every fd below the limit of the process is open.
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

    /// A thread of this process, as seen from another one of it.
    fn here() -> Tracee {
        Tracee::new(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned())
    }

    fn address<T: ?Sized>(value: &T) -> u64 {
        std::ptr::from_ref(value).addr() as u64
    }

    #[test]
    fn memory_is_read_and_written_where_it_is() {
        let (tracee, mut memory) = (here(), [1, 2, 3, 4]);
        let at = address(&memory);
        tracee.write(at + 1, &[7, 8]).unwrap();
        tracee.read(at, &mut memory).unwrap();
        // Read back through the kernel, whatever the compiler knows of it.
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
    fn a_thread_belongs_to_its_process() {
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
    fn a_thread_that_is_gone_has_nothing() {
        let tracee = Tracee::new(i32::MAX.cast_unsigned());
        assert_eq!(tracee.read(0x1000, &mut [0]), Err(Fault));
        assert_eq!(tracee.file(0).unwrap_err(), Errno::SRCH);
        assert_eq!(tracee.reachable(), Ok(()));
        assert!(!tracee.has_no_free_fd());
    }
}
