//! The tap: an Ethernet interface of the host whose other end is a file descriptor
//! (Linux Documentation/networking/tuntap.rst).
//!
//! The host opens one file descriptor for each pair of queues, by name; the device reads and writes
//! frames, each behind a header ([`header`]), and makes the kernel do the work that
//! the guest's driver has negotiated. The kernel forgets these settings when the tap is closed: a host that opens the
//! tap again after a live update makes all of them again.

#![expect(unsafe_code, reason = "the tap's ioctls, and guest memory that the kernel reads")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vm_memory::VolatileSlice;

use super::header;
use crate::devices::interface::Request;

/// Flags of the tap: Ethernet frames, with only the header in front of them.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Switches the carrier of a tap: `_IOW('T', 226, int)` (include/uapi/linux/if_tun.h; since Linux 5.0).
pub(super) const TUNSETCARRIER: u32 = 0x4004_54e2;

/// One more than the most pieces of guest memory that a frame can be read into (`UIO_MAXIOV`).
pub(super) const PIECES_MAX: usize = 1024;

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    /// Whether it is a tap. Tests and fuzz targets use sockets instead.
    real: bool,
    /// Whether it is a macvtap, whose end the kernel does not report.
    ends_silently: bool,
}

/// Makes the newly opened `/dev/net/tun` a queue of the tap `name`. The kernel creates the tap if it
/// does not exist, and puts a free number in the place of `%d`. `several`: whether the tap can have more than one queue.
/// Returns the tap's name.
pub(super) fn attach(tun: &File, name: &str, several: bool) -> io::Result<String> {
    let flags = FLAGS | if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = Request::new(name, &(flags as u16).to_ne_bytes());
    request.send(tun, libc::TUNSETIFF)?;
    Ok(request.name())
}

/// Returns the name of the interface that a tap's fd is attached to, and the flags with which it was opened. Errors
/// if it is not a tap's.
pub(super) fn identify(fd: impl AsFd) -> io::Result<(String, i32)> {
    let mut request = Request::new("", &[]);
    request.send(fd, libc::TUNGETIFF)?;
    let flags = i32::from(request.u16());
    Ok((request.name(), flags))
}

/// Makes the kernel use a queue of a tap again that the last process may have detached. Does nothing if the queue
/// is in use.
pub(super) fn reattach(fd: impl AsFd) {
    let flags = libc::IFF_ATTACH_QUEUE as u16;
    let _ = Request::new("", &flags.to_ne_bytes()).send(fd, libc::TUNSETQUEUE);
}

impl Tap {
    /// Takes over an fd that the host has opened, and makes the kernel use the 12-byte header. Errors if the
    /// fd is not a tap.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let asked = Request::new("", &[]).send(&file, libc::TUNGETIFF);
        let real = match asked {
            Ok(()) => true,
            Err(_) if cfg!(any(test, fuzzing)) => false,
            Err(error) => return Err(error),
        };
        let ends_silently = real && !is_tun(&file)?;
        let tap = Self { file, real, ends_silently };
        if real {
            let len = header::LEN as libc::c_int;
            // SAFETY: a tap's fd; the ioctl reads one int.
            done(unsafe {
                libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len)
            })?;
        }
        Ok(tap)
    }

    /// Sets which offloads (`libc::TUN_F_*`) frames from the tap may have from now on.
    pub(super) fn set_offload(&self, offload: libc::c_uint) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        let offload = libc::c_ulong::from(offload);
        // SAFETY: a tap's fd; the ioctl takes a number and touches no memory.
        done(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) })
    }

    /// Makes the kernel use this queue of the tap, or stop using it. Errors if the queue is already in that
    /// state, or the tap has only one queue.
    pub(super) fn set_queue(&self, used: bool) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        Request::new("", &(flags as u16).to_ne_bytes()).send(&self.file, libc::TUNSETQUEUE)
    }

    /// Connects the tap with the host's network, or disconnects it as if its cable were pulled: the host's kernel
    /// and bridge see it too. Errors on a macvtap, which has no such switch.
    pub(super) fn set_carrier(&self, on: bool) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        let on = libc::c_int::from(on);
        // SAFETY: a tap's fd; the ioctl reads one int.
        done(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETCARRIER.into(), &raw const on) })
    }

    /// The error of a tap of which epoll reports an error: it is gone. `None` if it is no tap.
    pub(super) fn reported_error(&self) -> Option<io::Error> {
        self.real.then(|| io::Error::from_raw_os_error(libc::EBADFD))
    }

    /// Whether the kernel says nothing when this tap is deleted: a macvtap then takes all frames as before, and
    /// epoll reports no error of it (Linux drivers/net/tap.c).
    pub(super) fn ends_silently(&self) -> bool {
        self.ends_silently
    }

    /// Errors if the interface of a tap that ends silently is gone.
    pub(super) fn check(&self) -> io::Result<()> {
        match Request::new("", &[]).send(&self.file, libc::TUNGETIFF) {
            // What a tap answers to a read.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                Err(io::Error::from_raw_os_error(libc::EBADFD))
            }
            done => done,
        }
    }

    /// A file of another kind that is treated as a tap.
    #[cfg(test)]
    pub(super) fn pretended(fd: OwnedFd) -> Self {
        Self { file: fd.into(), real: true, ends_silently: false }
    }

    /// Reads one frame with its header; the part beyond `bytes` is lost. Errors with `WouldBlock` if there is
    /// no frame.
    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(bytes)
    }

    /// Reads one frame with its header, first into `front` and then into places in guest memory, fewer than
    /// [`PIECES_MAX`]; the part beyond them is lost. Errors with `WouldBlock` if there is no frame.
    pub(super) fn read_into(
        &self,
        front: &mut [u8],
        rest: &[VolatileSlice<'_>],
    ) -> io::Result<usize> {
        let guards: Vec<_> =
            rest.iter().map(|slice| (slice.ptr_guard_mut(), slice.len())).collect();
        let mut pieces = Vec::with_capacity(1 + guards.len());
        pieces.push(libc::iovec { iov_base: front.as_mut_ptr().cast(), iov_len: front.len() });
        pieces.extend(
            guards
                .iter()
                .map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: *len }),
        );
        let (fd, count) = (self.file.as_raw_fd(), pieces.len() as libc::c_int);
        // SAFETY: the pieces are `front`, which outlives the call, and slices of guest memory, which stay mapped while
        // the guards live. The kernel only writes. The guest may write there at the same time, which harms only itself.
        let read = unsafe { libc::readv(fd, pieces.as_ptr(), count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Sends one frame, which is in several pieces of guest memory.
    pub(super) fn write(
        &self,
        mut header: [u8; header::LEN],
        frame: &[VolatileSlice<'_>],
    ) -> io::Result<()> {
        let guards: Vec<_> = frame.iter().map(|slice| (slice.ptr_guard(), slice.len())).collect();
        let mut pieces = Vec::with_capacity(1 + guards.len());
        pieces.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
        pieces.extend(guards.iter().map(|(guard, len)| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: *len,
        }));
        let (fd, count) = (self.file.as_raw_fd(), pieces.len() as libc::c_int);
        // SAFETY: the pieces are the header, which outlives the call, and slices of guest memory, which
        // stay mapped while the guards live. The kernel only reads. The guest may write there at the
        // same time; the kernel copies the frame before it reads the frame's contents.
        match unsafe { libc::writev(fd, pieces.as_ptr(), count) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether the fd was opened from `/dev/net/tun`, which has a fixed number (Linux Documentation/admin-guide/devices.txt).
/// A macvtap has a device file of its own.
fn is_tun(fd: impl AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstat(fd)?.st_rdev == rustix::fs::makedev(10, 200))
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
