//! Makes requests whose argument ends at an unmapped page.
#![expect(unsafe_code, reason = "mappings, and ioctls of any kind")]

use std::arch::asm;
use std::os::fd::RawFd;
use std::ptr;

use libc::{c_int, c_void};
use luo::Errno;

use crate::conformance::system::{Argument, Place};

const PAGE: usize = 4096;

fn check(result: c_int) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Pages that are followed by an inaccessible page.
struct Arena {
    start: *mut c_void,
    pages: usize,
}

impl Arena {
    fn new(bytes: usize) -> Result<Self, Errno> {
        Self::with(bytes, 0)
    }

    fn with(bytes: usize, flags: c_int) -> Result<Self, Errno> {
        let pages = bytes.div_ceil(PAGE) + 1;
        let (rw, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let flags = flags | private | libc::MAP_ANONYMOUS;
        // SAFETY: this creates a new mapping at a free address.
        let start = unsafe { libc::mmap(ptr::null_mut(), (pages + 1) * PAGE, rw, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Errno::NOMEM);
        }
        let this = Self { start, pages };
        this.protect(pages, 1, libc::PROT_NONE)?;
        Ok(this)
    }

    fn protect(&self, page: usize, pages: usize, protection: c_int) -> Result<(), Errno> {
        let at = self.start.wrapping_byte_add(page * PAGE);
        // SAFETY: the pages belong to this mapping, and nothing refers to them.
        check(unsafe { libc::mprotect(at, pages * PAGE, protection) })
    }

    /// The address `bytes` before the inaccessible page.
    fn before_end(&self, bytes: usize) -> *mut u8 {
        self.start.wrapping_byte_add(self.pages * PAGE - bytes).cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, (self.pages + 1) * PAGE) };
    }
}

/// Makes a request and returns the contents of its argument afterwards. EUCLEAN if the request failed
/// and still changed its argument.
pub(super) fn ioctl(fd: RawFd, command: u32, argument: Argument) -> Result<Vec<u8>, Errno> {
    let Argument { bytes: sent, place } = argument;
    let mut bytes = sent.clone();
    let arena = Arena::new(bytes.len() + 1)?;
    let there = match place {
        Place::Null => 0,
        Place::CutAfter(length) => bytes.len().min(length),
        _ => bytes.len(),
    };
    let address = match place {
        Place::Null => ptr::null_mut(),
        Place::Unaligned => arena.before_end(there + 1),
        _ => arena.before_end(there),
    };
    if there > 0 {
        // SAFETY: the arena has room for more than these bytes before its end.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address, there) };
    }
    if place == Place::ReadOnly {
        arena.protect(0, arena.pages, libc::PROT_READ)?;
    }
    // SAFETY: the argument is in the arena or inaccessible; the kernel checks for the latter.
    let result = check(unsafe { libc::ioctl(fd, command as _, address) });
    if there > 0 {
        // SAFETY: the same bytes, which are readable for every place.
        unsafe { ptr::copy_nonoverlapping(address, bytes.as_mut_ptr(), there) };
    }
    match result {
        Err(_) if bytes != sent => Err(Errno::UCLEAN),
        result => result.map(|()| bytes),
    }
}

/// Makes a request by the system call entry of 32-bit programs (`int 0x80`), which 64-bit programs can
/// use too.
pub(super) fn ioctl32(fd: RawFd, command: u32, bytes: &[u8]) -> Result<i64, Errno> {
    const SYS_IOCTL: i32 = 54;
    let arena = Arena::with(bytes.len(), libc::MAP_32BIT)?;
    let address = arena.before_end(bytes.len());
    // SAFETY: the arena has room for these bytes before its end.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address, bytes.len()) };
    let mut result = SYS_IOCTL;
    // SAFETY: the kernel changes rax and memory of the arena, and in some versions r8 to r11. rbx,
    // which the compiler wants for itself, has its value again afterwards.
    unsafe {
        asm!(
            "xchg rbx, {fd}",
            "int 0x80",
            "xchg rbx, {fd}",
            fd = inout(reg) i64::from(fd) => _,
            inout("eax") result,
            in("ecx") command,
            in("edx") address.addr() as u32,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result >= 0 { Ok(result.into()) } else { Err(Errno::from_raw_os_error(-result)) }
}
