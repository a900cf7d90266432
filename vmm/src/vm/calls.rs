//! The system calls of the main thread of a VM's process. It has two lists: one until the machine is built,
//! and a short one from then on, because only after that the guest runs.

use crate::confine::Call;
use crate::confine::calls::{EVENT_LOOP, START_THREADS};
use crate::devices::catalog::KINDS;
use crate::devices::kind::DeviceCalls;
use crate::kvm::calls::{BUILD, SAVE, VCPU, WIRING};
use crate::machine::Machine;

/// Answers the host, and reads and writes the state document.
const MAIN: &[Call] = &[
    // Requests, and the fds that come with them.
    Call::any(libc::SYS_recvmsg),
    // The document's memfd: its length, its bytes.
    Call::any(libc::SYS_fstat),
    Call::any(libc::SYS_statx),
    Call::any(libc::SYS_pread64),
    Call::any(libc::SYS_pwrite64),
];

/// Builds the machine.
const BUILDER: &[Call] = &[
    // Checks the segments of RAM: their kind, length and seals.
    Call::any(libc::SYS_newfstatat),
    Call::any(libc::SYS_fstatfs),
    Call::one_of(
        libc::SYS_fcntl,
        1,
        &[
            libc::F_GETFD as u32,
            libc::F_SETFD as u32,
            libc::F_GETFL as u32,
            libc::F_GET_SEALS as u32,
            libc::F_DUPFD_CLOEXEC as u32,
        ],
    ),
    // Bounds the memory of the search on a disk to boot from. No other process.
    Call::one_of(libc::SYS_prlimit64, 0, &[0]),
    // Reads the kernel, the initramfs and the disk to boot from into the guest's RAM.
    Call::any(libc::SYS_lseek),
    Call::any(libc::SYS_preadv),
    Call::any(libc::SYS_preadv2),
];

/// All calls of all threads of the process, whichever devices its machine will have.
pub fn process() -> Vec<&'static [Call]> {
    let kinds = KINDS.iter().flat_map(|kind| {
        let DeviceCalls { build, thread, registers } = kind.calls;
        thread.iter().copied().chain([build, registers])
    });
    [VCPU, WIRING, SAVE, BUILD, MAIN, BUILDER, EVENT_LOOP, START_THREADS]
        .into_iter()
        .chain(kinds)
        .collect()
}

/// The calls of the main thread while the machine is there: pause, save, sync, resume.
pub fn main(machine: &Machine) -> Vec<&'static [Call]> {
    [MAIN, SAVE, WIRING].into_iter().chain(registers(machine)).collect()
}

/// The calls of the vCPUs' threads.
pub fn vcpus(machine: &Machine) -> Vec<&'static [Call]> {
    [VCPU, WIRING].into_iter().chain(registers(machine)).collect()
}

fn registers(machine: &Machine) -> impl Iterator<Item = &'static [Call]> {
    machine.devices.iter().map(|device| device.options.kind().calls.registers)
}
