//! What each system lacks, and where it deviates from Linux on purpose, with the reasons that the table
//! of results prints.

/// A feature that a case needs and not every system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Real files of a kernel.
    Files,
    /// Scripted files, whose handlers fail on request.
    Script,
    /// Calls from several threads at the same time.
    Threads,
    /// A call that continues in the background during other calls.
    Background,
    /// Real processes and fds: exec, read(2) of the device, `/proc`.
    Processes,
    /// The kernel's own LUO, with its boot and memory management.
    Kernel,
    /// A loader that uses kexec_load(2).
    OldLoad,
    /// An observer that still runs after the kernel has frozen all sessions for the switch.
    Witness,
    /// Direct access to the encoder and decoder of handover trees.
    Trees,
}

/// A known deviation of a system from the case, intended or unavoidable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Deviation {
    /// Case 130.
    SessionIsReturned,
    /// Case 53.
    RefusedNameEndsNextKernel,
    /// Case 100.
    SizeIsFrozen,
    /// Case 118.
    SealsStay,
    /// Case 152.
    NameStays,
    /// Cases 68 and 72.
    RegularFiles,
    /// Case 10.
    WriteIsNotConnected,
    /// Case 54.
    SessionIsSocket,
}

impl Deviation {
    /// The deviation and its reason, for the table of results.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::SessionIsReturned => {
                "If RETRIEVE_SESSION cannot write its answer, the session can be retrieved again. \
                 Linux closes the session, and its files are lost: a defect that the built-in LUO \
                 does not copy."
            }
            Self::RefusedNameEndsNextKernel => {
                "A name that Linux refuses when exactly 51 sessions exist leaves an empty block in \
                 its list, and the next kernel panics (`The incoming tree failed to initialize \
                 properly [-22]`): a defect of 7.3.4. Perennial's host never uses a name twice, so \
                 none is refused."
            }
            Self::SizeIsFrozen => {
                "The case describes implementations that compare sizes at the switch. Linux \
                 freezes the size of a preserved file: changing it fails at once (EPERM)."
            }
            Self::SealsStay => {
                "The file itself is carried over, with its seals at the switch. Linux creates a \
                 new file, with the seals that the file had when it was preserved."
            }
            Self::NameStays => {
                "A memfd keeps its name, `memfd:...`. On Linux its name after the switch is `/`."
            }
            Self::RegularFiles => {
                "A keeper hands over fds, so it can preserve any regular file. Linux preserves \
                 only memfds."
            }
            Self::WriteIsNotConnected => {
                "The fd is one end of a socket: a write fails with ENOTCONN, on Linux with EINVAL."
            }
            Self::SessionIsSocket => {
                "The fd is one end of a socket, so its link in `/proc/self/fd` is `socket:[...]`, \
                 on Linux `anon_inode:[luo_session] NAME`."
            }
        }
    }
}

/// The missing features and the deviations of a kind of system.
#[derive(Debug)]
pub(crate) struct Profile {
    pub(crate) lacks: &'static [(&'static [Need], &'static str)],
    pub(crate) deviations: &'static [Deviation],
}

impl Profile {
    /// Why the system lacks a feature. `None` if the system has it.
    pub(crate) fn lacks(&self, need: Need) -> Option<&'static str> {
        let found = self.lacks.iter().find(|(needs, _)| needs.contains(&need));
        found.map(|(_, reason)| *reason)
    }
}

const OF_A_KERNEL: &[Need] = &[Need::Kernel, Need::OldLoad, Need::Witness];
const KERNELS_OWN: &str = "class K: tests the boot and memory management of a kernel";
const NOT_PROCESSES: &str = "the device is a library here, without a kernel's file layer and exec";
const BYTES: &str = "tests bytes: runs once, on the encoder and the decoder";

/// The state machine, without files and processes.
pub(crate) const MACHINE: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Processes], NOT_PROCESSES),
        (&[Need::Files], "the state machine has no real files; its handlers define the files"),
        (&[Need::Threads, Need::Background], "only one caller at a time can use the state machine"),
    ],
    deviations: &[Deviation::SessionIsReturned],
};

/// The keeper.
pub(crate) const KEEPER: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Processes], NOT_PROCESSES),
        (&[Need::Background], "calls are serialized: none continues in the background"),
        (&[Need::Trees], BYTES),
    ],
    deviations: &[
        Deviation::SessionIsReturned,
        Deviation::SealsStay,
        Deviation::NameStays,
        Deviation::RegularFiles,
    ],
};

/// The pool, in this process or in a QEMU machine.
pub(crate) const POOL: Profile = Profile {
    lacks: KEEPER.lacks,
    deviations: &[Deviation::SessionIsReturned, Deviation::NameStays],
};

/// The emulator.
pub(crate) const EMULATOR: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Script], "files of a real process cannot fail on request"),
        (&[Need::Trees], BYTES),
    ],
    deviations: &[
        Deviation::SessionIsReturned,
        Deviation::SealsStay,
        Deviation::NameStays,
        Deviation::WriteIsNotConnected,
        Deviation::SessionIsSocket,
    ],
};

/// The LUO of Linux.
pub(crate) const KERNEL: Profile = Profile {
    lacks: &[
        (&[Need::Script], "files of Linux cannot fail on request"),
        (&[Need::Trees], BYTES),
        (&[Need::OldLoad], "nothing in this project can load a kernel by kexec_load(2)"),
        (&[Need::Witness], "no process is left to observe it: the machine shuts down meanwhile"),
    ],
    deviations: &[Deviation::RefusedNameEndsNextKernel, Deviation::SizeIsFrozen],
};
