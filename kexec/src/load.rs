//! Loading the next kernel (`kexec_file_load`), and unloading it.
//!
//! The kernel holds one image at a time: a successful load replaces it, a failed load leaves it. Dropping
//! a [`LoadedImage`] unloads its image, but never an image that this process loaded later.
#![expect(unsafe_code, reason = "kexec_file_load has no safe wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::{CommandLine, Image, Running};

/// `KEXEC_FILE_UNLOAD` and `KEXEC_FILE_NO_INITRAMFS` of include/uapi/linux/kexec.h.
const UNLOAD: libc::c_ulong = 0x1;
const NO_INITRAMFS: libc::c_ulong = 0x4;

/// The number of the image that this process loaded last. Locked during every load and unload.
static LAST: Mutex<u64> = Mutex::new(0);

/// A loaded kernel, which [`jump`](crate::jump()) can enter. Dropping this unloads it.
#[derive(Debug)]
#[must_use = "dropping a loaded image unloads it"]
pub struct LoadedImage {
    number: u64,
    unloaded: bool,
}

/// Why an image could not be loaded. An image that was loaded before stays loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The command line is longer than the image accepts.
    #[error(
        "cannot load {}: it accepts command lines of {limit} bytes, this one has {bytes}; shorten it",
        kernel.display()
    )]
    CommandLine {
        /// The kernel.
        kernel: PathBuf,
        /// Length of the longest command line that the image accepts, in bytes.
        limit: u64,
        /// Length of the given command line, in bytes.
        bytes: u64,
    },
    /// The running kernel refused to load the image.
    #[error("cannot load {}: {}", kernel.display(), why(*errno, needs, scratch.as_deref()))]
    Load {
        /// The kernel.
        kernel: PathBuf,
        /// The memory that the image needs, in words.
        needs: String,
        /// A sufficient `kho_scratch=`; `None` if the running kernel does not load into scratch areas.
        scratch: Option<String>,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl LoadError {
    /// The kernel's errno; `None` if the kernel was not asked.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::CommandLine { .. } => None,
            Self::Load { errno, .. } => Some(*errno),
        }
    }
}

/// An image could not be unloaded.
#[derive(Debug, thiserror::Error)]
#[error("cannot unload the next kernel: {}", why_not_unloaded(*errno))]
pub struct UnloadError {
    /// The image, which is still loaded.
    pub image: LoadedImage,
    /// The kernel's answer.
    pub errno: Errno,
}

/// Loads `image`, to be started with `command_line`. `running` is the kernel that loads it.
///
/// Needs CAP_SYS_BOOT. Neither file may be open for writing anywhere (a memfd may). Takes as long as it
/// takes to read and copy both files. LUO's sessions may be created before or after.
pub fn load(
    image: &Image,
    command_line: &CommandLine,
    running: &Running,
) -> Result<LoadedImage, LoadError> {
    let limit = image.kernel.command_line_size.saturating_sub(CommandLine::OVERHEAD as u64);
    let bytes = command_line.as_str().len() as u64;
    let kernel = image.kernel.path.clone();
    if bytes > limit {
        return Err(LoadError::CommandLine { kernel, limit, bytes });
    }
    let (initramfs, flags) = match &image.initramfs {
        Some(initramfs) => (initramfs.file.as_raw_fd(), 0),
        None => (-1, NO_INITRAMFS),
    };
    // Without KHO, the kernel loads the image into any free memory, not into scratch areas.
    let scratch = (running.kho == Some(true)).then(|| image.scratch_parameter());
    let text = CString::new(command_line.as_str()).unwrap_or_default();
    let mut last = last_number();
    kexec_file_load(image.kernel.file.as_raw_fd(), initramfs, &text, flags)
        .map_err(|errno| LoadError::Load { kernel, needs: image.needs(), scratch, errno })?;
    *last += 1;
    Ok(LoadedImage { number: *last, unloaded: false })
}

/// Locks the number of the last image, even if a thread panicked while it held the lock: the number is
/// changed in one step.
fn last_number() -> MutexGuard<'static, u64> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LoadedImage {
    /// Unloads the image, as dropping it does. Errors if that failed.
    pub fn unload(mut self) -> Result<(), UnloadError> {
        match self.unload_now() {
            Ok(()) => Ok(()),
            Err(errno) => Err(UnloadError { image: self, errno }),
        }
    }

    fn unload_now(&mut self) -> Result<(), Errno> {
        let last = last_number();
        if *last == self.number && !self.unloaded {
            kexec_file_load(-1, -1, c"", UNLOAD | NO_INITRAMFS)?;
        }
        self.unloaded = true;
        Ok(())
    }
}

impl Drop for LoadedImage {
    fn drop(&mut self) {
        // An image that stays loaded does no harm: only an explicit kexec enters it.
        let _ = self.unload_now();
    }
}

fn kexec_file_load(
    kernel: RawFd,
    initramfs: RawFd,
    command_line: &CStr,
    flags: libc::c_ulong,
) -> Result<(), Errno> {
    let bytes = command_line.to_bytes_with_nul();
    // SAFETY: the kernel checks the two fds and reads their files and `bytes` during the call only; it
    // keeps no reference to them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel,
            initramfs,
            bytes.len(),
            bytes.as_ptr(),
            flags,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn why(errno: Errno, needs: &str, scratch: Option<&str>) -> String {
    let known = match errno {
        Errno::ADDRNOTAVAIL => {
            return match scratch {
                Some(scratch) => format!(
                    "no scratch area of the running kernel has room for it ({needs}); cold boot with \
                     `{scratch}` or larger"
                ),
                None => format!(
                    "the running kernel has no free memory for it in one piece ({needs}), as memory \
                     that `memmap=` reserves is not used for it; reserve less"
                ),
            };
        }
        Errno::NOEXEC => {
            "the running kernel does not accept it: it is built for another architecture, for 32-bit \
             firmware, or without the 5-level paging that is in use"
        }
        Errno::KEYREJECTED => {
            "its signature does not fit any key that the running kernel trusts; sign it, or enroll \
             the key"
        }
        Errno::NOKEY => "it is signed with a key that the running kernel does not have; enroll it",
        Errno::NODATA => {
            "it is not signed, and the running kernel loads only signed kernels; sign it"
        }
        Errno::BADMSG => "its signature is damaged; sign it again",
        Errno::PERM => {
            "not permitted: CAP_SYS_BOOT is missing, kernel.kexec_load_disabled is set, \
             kernel.kexec_load_limit_reboot is used up, or the kernel is locked down and this one \
             not signed"
        }
        Errno::BUSY => "another kexec call is in progress; try again",
        Errno::NOMEM => "there is not enough free memory for a copy of it; free some",
        Errno::TXTBSY => "the kernel or the initramfs is open for writing; close it first",
        Errno::INVAL => "the running kernel refuses the files, their sizes or the command line",
        Errno::FBIG => "the kernel or the initramfs is too big (2 GiB)",
        Errno::NOSYS => "the running kernel is built without kexec_file_load",
        Errno::ACCESS => "a security policy forbids it; allow this program to load kernels",
        _ => "",
    };
    if known.is_empty() { errno.to_string() } else { known.to_owned() }
}

fn why_not_unloaded(errno: Errno) -> String {
    let known = match errno {
        Errno::PERM => {
            "not permitted: CAP_SYS_BOOT is missing, kernel.kexec_load_disabled is set, or \
             kernel.kexec_load_limit_reboot is used up"
        }
        Errno::BUSY => "another kexec call is in progress; try again",
        Errno::NOSYS => "the running kernel is built without kexec_file_load",
        _ => "",
    };
    if known.is_empty() { errno.to_string() } else { known.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::image::tests::{bzimage, file};

    fn refused(errno: Errno) -> LoadError {
        LoadError::Load {
            kernel: "/boot/next".into(),
            needs: "the kernel takes 15 MiB".to_owned(),
            scratch: Some("kho_scratch=16M,32M,0".to_owned()),
            errno,
        }
    }

    /// A value for an image that was never loaded.
    fn nothing_loaded() -> LoadedImage {
        LoadedImage { number: 0, unloaded: true }
    }

    #[test]
    fn every_errno_has_a_sentence_of_its_own_that_names_the_kernel() {
        let mut load = BTreeSet::new();
        let mut unload = BTreeSet::new();
        for number in 1..=133 {
            let errno = Errno::from_raw_os_error(number);
            let sentence = refused(errno).to_string();
            assert!(sentence.contains("/boot/next"), "{sentence}");
            assert!(!sentence.contains("  ") && !sentence.contains('\n'), "{sentence}");
            assert!(load.insert(sentence.clone()), "{sentence} is said twice");
            let sentence = UnloadError { image: nothing_loaded(), errno }.to_string();
            assert!(unload.insert(sentence.clone()), "{sentence} is said twice");
        }
    }

    #[test]
    fn an_image_without_room_names_its_sizes_and_the_remedy() {
        let sentence = refused(Errno::ADDRNOTAVAIL).to_string();
        assert!(sentence.contains("15 MiB"), "{sentence}");
        assert!(sentence.contains("`kho_scratch=16M,32M,0`"), "{sentence}");
        // A kernel without KHO knows no scratch areas.
        let LoadError::Load { kernel, needs, errno, .. } = refused(Errno::ADDRNOTAVAIL) else {
            panic!("{sentence}")
        };
        let sentence = LoadError::Load { kernel, needs, scratch: None, errno }.to_string();
        assert!(sentence.contains("15 MiB") && sentence.contains("`memmap=`"), "{sentence}");
        assert!(!sentence.contains("scratch"), "{sentence}");
    }

    #[test]
    fn an_errno_without_a_sentence_falls_back_to_the_system_text() {
        assert!(refused(Errno::XDEV).to_string().contains("Invalid cross-device link"));
    }

    #[test]
    fn a_command_line_that_the_image_does_not_take_never_reaches_the_kernel() {
        let mut bytes = bzimage(&[7; 64]);
        bytes[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
        let (_dir, path) = file(&bytes);
        let image = Image::open(&path, None).unwrap();
        let long = CommandLine::new(&"x".repeat(225)).unwrap();
        let expected = LoadError::CommandLine { kernel: path, limit: 224, bytes: 225 };
        let running = Running {
            release: String::new(),
            version: String::new(),
            command_line: String::new(),
            kexec_loaded: None,
            luo: false,
            kho: None,
            scratch: None,
        };
        assert_eq!(load(&image, &long, &running).unwrap_err(), expected);
    }
}
