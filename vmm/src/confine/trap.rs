//! Reports a system call that the filter does not allow, and ends the process.
//!
//! The kernel raises SIGSYS in the thread that made the call, in whatever state the thread is: it may hold a
//! lock of the allocator. So the handler only fills a buffer on its stack, sends it and exits.

#![expect(
    unsafe_code,
    reason = "a signal handler makes system calls and reads what the kernel gave it"
)]

use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::OnceLock;

use syscalls::Sysno;

/// Where and how to report a forbidden system call.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// A socket that stays open as long as the process.
    pub socket: RawFd,
    /// What stands before the text in a packet. The text has neither quotation marks nor backslashes.
    pub before: &'static str,
    /// What stands after the text.
    pub after: &'static str,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Exit code of a process that made a forbidden system call: that of a shell for a death by SIGSYS.
const EXIT_CODE: libc::c_int = 128 + libc::SIGSYS;

/// `siginfo_t` of a SIGSYS (Linux include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct SigSys {
    signal: i32,
    errno: i32,
    code: i32,
    _padding: i32,
    address: u64,
    call: i32,
    arch: u32,
}

/// Installs the handler for SIGSYS.
pub(super) fn install(report: Report) -> io::Result<()> {
    // The first report stays, if there is one.
    let _ = REPORT.set(report);
    let handler: extern "C" fn(libc::c_int, *const SigSys, *mut libc::c_void) = on_forbidden_call;
    // SAFETY: a `sigaction` is a C struct for which all zeroes are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the action is initialised, and its handler has the signature that SA_SIGINFO demands and
    // does only what a signal handler may do.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Text of a bounded length, without the allocator.
struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Text {
    fn push(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.push_byte(byte));
    }

    fn push_byte(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        if number >= 10 {
            self.push_number(number / 10);
        }
        self.push_byte(b'0' + (number % 10) as u8);
    }
}

/// Writes what is reported of `call` by the thread called `thread`.
fn describe(report: &Report, call: u32, thread: &[u8]) -> Text {
    let mut text = Text { bytes: [0; 512], len: 0 };
    text.push(report.before);
    text.push("its thread `");
    for byte in thread.iter().take_while(|byte| **byte != 0) {
        let plain = byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\');
        text.push_byte(if plain { *byte } else { b'?' });
    }
    text.push("` made the system call ");
    text.push(Sysno::new(call as usize).map_or("of the number", |call| call.name()));
    text.push(" ");
    text.push_number(call);
    text.push(", which its confinement does not allow");
    text.push(report.after);
    text
}

extern "C" fn on_forbidden_call(_: libc::c_int, info: *const SigSys, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the address of a siginfo_t, which for SIGSYS has this layout.
    let call = unsafe { (*info).call };
    let mut thread = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, which `thread` has.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    if let Some(report) = REPORT.get() {
        let text = describe(report, call.unsigned_abs(), &thread);
        // SAFETY: the buffer is alive and initialised up to its length.
        unsafe { libc::write(report.socket, text.bytes.as_ptr().cast(), text.len) };
    }
    // SAFETY: ends the process without running anything else in it.
    unsafe { libc::_exit(EXIT_CODE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_the_call_and_the_thread() {
        let report = Report { socket: -1, before: "<", after: ">" };
        let said = |call, thread: &[u8]| {
            let Text { bytes, len } = describe(&report, call, thread);
            String::from_utf8(bytes[..len].to_vec()).unwrap()
        };
        assert_eq!(
            said(257, b"vcpu0\0\0"),
            "<its thread `vcpu0` made the system call openat 257, which its confinement does not allow>"
        );
        assert!(
            said(60_000, b"a\"\\\n\0").contains("`a???` made the system call of the number 60000,")
        );
    }
}
