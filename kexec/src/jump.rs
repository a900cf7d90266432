//! The jump: enters the loaded kernel.
//!
//! `reboot(LINUX_REBOOT_CMD_KEXEC)` first freezes LUO's sessions, for which it waits for every LUO call
//! in progress, then shuts down devices and CPUs and enters the loaded kernel. A failure up to and
//! including the freeze leaves everything as it was (kernel/kexec_core.c, `kernel_kexec`).

use rustix::io::Errno;
use rustix::system::{RebootCommand, reboot};

use crate::LoadedImage;

/// The next kernel was not entered. Nothing has changed: the sessions are usable and the image, which is
/// returned here, is still loaded.
#[derive(Debug, thiserror::Error)]
#[error("cannot enter the next kernel: {}", why(*errno))]
pub struct JumpError {
    /// The image, still loaded.
    pub image: LoadedImage,
    /// The kernel's answer.
    pub errno: Errno,
}

/// Enters the loaded kernel. **Returns only if that failed.**
///
/// No destructor runs and no file system is synced. A session survives only if a living process holds it
/// open at this moment. Needs CAP_SYS_BOOT in the initial user namespace, and the initial pid namespace.
pub fn jump(image: LoadedImage) -> JumpError {
    let errno = match reboot(RebootCommand::Kexec) {
        Err(errno) => errno,
        Ok(()) => Errno::CANCELED,
    };
    JumpError { image, errno }
}

fn why(errno: Errno) -> String {
    let known = match errno {
        Errno::BUSY => "another kexec call is in progress; try again",
        Errno::INVAL => {
            "no kernel is loaded any more, or this process is not in the initial pid namespace"
        }
        Errno::PERM => "not permitted: CAP_SYS_BOOT is missing",
        Errno::AGAIN => "the running kernel could not complete the handover; try again",
        Errno::NOSPC => "the running kernel could not record what is to be handed over",
        Errno::CANCELED => "reboot(2) returned success without entering it",
        _ => "",
    };
    if known.is_empty() { errno.to_string() } else { known.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_errno_has_a_sentence_of_its_own() {
        let sentences: BTreeSet<String> =
            (1..=133).map(|number| why(Errno::from_raw_os_error(number))).collect();
        assert_eq!(sentences.len(), 133);
        assert!(why(Errno::XDEV).contains("Invalid cross-device link"));
    }
}
