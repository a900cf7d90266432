//! The seccomp filter: selects the system calls of the program that the supervisor gets.
//!
//! A filter sees the arguments as numbers and cannot follow pointers. So the filter sends every
//! call with a path to the supervisor, which reads the path; other calls it selects by their
//! numbers:
//!
//! | call | result |
//! | --- | --- |
//! | open, stat, access and readlink calls, reading extended attributes | the supervisor checks the path |
//! | ioctl of type 0xBA (LUO) or `T` (terminals) | the supervisor checks the fd |
//! | reboot, KEXEC | the supervisor ends the generation |
//! | reboot, any other command | EPERM: the program must not reboot the real machine |
//! | kexec_load, kexec_file_load | returns 0, and loads no kernel |
//! | all other calls, and all calls of a 32-bit program | the kernel executes the call |
//!
//! Type `T` is included because programs call `isatty` on any fd. Ioctls of all other types go to
//! the kernel directly, so that calls such as `KVM_RUN` stay fast. On the device or a session such
//! an ioctl always fails with ENOTTY; Linux checks the low byte first (EINVAL).

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use libc::{c_long, sock_filter};

/// `LINUX_REBOOT_CMD_KEXEC`.
const REBOOT_KEXEC: u32 = 0x4558_4543;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Offsets in `struct seccomp_data`, in bytes. Both architectures are little-endian.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const fn low_half_of_argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Calls whose path the supervisor checks.
const WITH_PATH: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Types of ioctls whose fd the supervisor checks, in their place in the command.
const IOCTL_TYPES: [u32; 2] = [0xba00, (b'T' as u32) << 8];

/// Labels in the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Ioctl,
    Reboot,
    Loaded,
    Notify,
    Allow,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Load(u32),
    And(u32),
    /// Jumps to the label if the loaded value is this one, else goes to the next step.
    JumpIf(u32, Place),
    /// Jumps to the label if the loaded value is not this one, else goes to the next step.
    JumpUnless(u32, Place),
    Return(u32),
    /// A label, not an instruction.
    Here(Place),
}

/// Returns the filter as BPF instructions.
pub(super) fn program() -> Vec<sock_filter> {
    assemble(&steps())
}

fn steps() -> Vec<Step> {
    let number = |number: c_long| number as u32;
    let mut steps = vec![Step::Load(ARCH), Step::JumpUnless(ARCHITECTURE, Place::Allow)];
    steps.push(Step::Load(NUMBER));
    steps.push(Step::JumpIf(number(libc::SYS_ioctl), Place::Ioctl));
    steps.extend(WITH_PATH.iter().map(|call| Step::JumpIf(number(*call), Place::Notify)));
    steps.push(Step::JumpIf(number(libc::SYS_reboot), Place::Reboot));
    #[cfg(target_arch = "x86_64")]
    steps.push(Step::JumpIf(number(libc::SYS_kexec_load), Place::Loaded));
    steps.push(Step::JumpIf(number(libc::SYS_kexec_file_load), Place::Loaded));
    steps.push(Step::Return(libc::SECCOMP_RET_ALLOW));

    steps.extend([Step::Here(Place::Ioctl), Step::Load(low_half_of_argument(1))]);
    steps.push(Step::And(0xff00));
    steps.extend(IOCTL_TYPES.map(|kind| Step::JumpIf(kind, Place::Notify)));
    steps.extend([Step::Here(Place::Allow), Step::Return(libc::SECCOMP_RET_ALLOW)]);

    steps.extend([Step::Here(Place::Reboot), Step::Load(low_half_of_argument(2))]);
    steps.push(Step::JumpIf(REBOOT_KEXEC, Place::Notify));
    steps.push(Step::Return(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    steps.extend([Step::Here(Place::Loaded), Step::Return(libc::SECCOMP_RET_ERRNO)]);
    steps.extend([Step::Here(Place::Notify), Step::Return(libc::SECCOMP_RET_USER_NOTIF)]);
    steps
}

fn assemble(steps: &[Step]) -> Vec<sock_filter> {
    let address_of = |place: Place| {
        let before = steps.iter().take_while(|step| !matches!(step, Step::Here(p) if *p == place));
        before.filter(|step| !matches!(step, Step::Here(_))).count()
    };
    let mut instructions: Vec<sock_filter> = Vec::new();
    for step in steps {
        // All jumps go forward and the filter is short, so the distance fits in a byte.
        let next = instructions.len() + 1;
        let distance = |place| u8::try_from(address_of(place) - next).unwrap_or(u8::MAX);
        let jump = BPF_JMP | BPF_JEQ | BPF_K;
        let (code, k, jt, jf) = match *step {
            Step::Load(offset) => (BPF_LD | BPF_W | BPF_ABS, offset, 0, 0),
            Step::And(mask) => (BPF_ALU | BPF_AND | BPF_K, mask, 0, 0),
            Step::JumpIf(value, place) => (jump, value, distance(place), 0),
            Step::JumpUnless(value, place) => (jump, value, 0, distance(place)),
            Step::Return(action) => (BPF_RET | BPF_K, action, 0, 0),
            Step::Here(_) => continue,
        };
        instructions.push(sock_filter { code: code as u16, jt, jf, k });
    }
    instructions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel does, and returns its action for a call.
    fn verdict(architecture: u32, number: c_long, arguments: [u64; 6]) -> u32 {
        let mut data = [&(number as u32).to_le_bytes()[..], &architecture.to_le_bytes()].concat();
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let program = program();
        let (mut at, mut loaded) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let bytes = data[k as usize..][..4].try_into().unwrap();
                    loaded = u32::from_le_bytes(bytes);
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => loaded &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if loaded == k { jt } else { jf });
                }
                code if code == BPF_RET | BPF_K => return k,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn native(number: c_long, arguments: [u64; 6]) -> u32 {
        verdict(ARCHITECTURE, number, arguments)
    }

    #[test]
    fn calls_with_a_path_go_to_the_supervisor() {
        for call in WITH_PATH {
            assert_eq!(native(*call, [0; 6]), libc::SECCOMP_RET_USER_NOTIF, "{call}");
        }
        for call in [libc::SYS_read, libc::SYS_close, libc::SYS_fstat, libc::SYS_execve] {
            assert_eq!(native(call, [0; 6]), libc::SECCOMP_RET_ALLOW, "{call}");
        }
    }

    #[test]
    fn only_ioctls_of_two_types_go_to_the_supervisor() {
        let ioctl = |command| native(libc::SYS_ioctl, [0, command, 0, 0, 0, 0]);
        for command in [0xba00, 0xba43, 0xbaff, 0xc048_ba00, 0x5401, 0xffff_ffff_0000_ba00] {
            assert_eq!(ioctl(command), libc::SECCOMP_RET_USER_NOTIF, "{command:#x}");
        }
        for command in [0xae80, 0, 0xba, 0x00ba_0000, 0x8910] {
            assert_eq!(ioctl(command), libc::SECCOMP_RET_ALLOW, "{command:#x}");
        }
    }

    #[test]
    fn the_real_machine_is_not_rebooted_and_loads_no_kernel() {
        let reboot = |command| native(libc::SYS_reboot, [0, 0, command, 0, 0, 0]);
        assert_eq!(reboot(u64::from(REBOOT_KEXEC)), libc::SECCOMP_RET_USER_NOTIF);
        for command in [0x0123_4567, 0xcdef_0123, 0x4321_fedc, 0, 0x89ab_cdef] {
            assert_eq!(reboot(command), libc::SECCOMP_RET_ERRNO | 1, "{command:#x}");
        }
        assert_eq!(native(libc::SYS_kexec_file_load, [0; 6]), libc::SECCOMP_RET_ERRNO);
    }

    #[test]
    fn calls_of_a_32_bit_program_go_to_the_kernel() {
        const I386: u32 = 0x4000_0003;
        for call in WITH_PATH {
            assert_eq!(verdict(I386, *call, [0; 6]), libc::SECCOMP_RET_ALLOW);
        }
    }
}
