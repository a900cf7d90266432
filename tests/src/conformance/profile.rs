//! What each system lacks, and what it does otherwise: the reasons in the table of results.

/// What a case needs that not every system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Files that are a kernel's.
    Files,
    /// Files that fail when they are told to.
    Script,
    /// Calls at the same time.
    Threads,
    /// A call that goes on while another is made.
    Background,
    /// Processes and fds of a kernel: exec, read(2) of the device, `/proc`.
    Processes,
    /// A kernel's LUO: its boot, its memory management.
    Kernel,
    /// A loader that uses kexec_load(2).
    OldLoad,
    /// Somebody who sees a kernel that has let go of everything.
    Witness,
    /// The reader and the writer of handover trees.
    Trees,
}

/// What a system does otherwise on purpose, or cannot help.
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
    /// What is done otherwise, and why.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::SessionIsReturned => {
                "A session whose answer cannot be written can be retrieved again. Linux closes it, and \
                 what it holds is lost: a defect that is not copied."
            }
            Self::RefusedNameEndsNextKernel => {
                "A name that is refused when there are exactly 51 sessions leaves an empty block in \
                 Linux's list, over which the next kernel panics (`The incoming tree failed to \
                 initialize properly [-22]`): a defect of 7.3.4. Perennial's host gives every session a name of its own, \
                 and so is refused none."
            }
            Self::SizeIsFrozen => {
                "The case is told for implementations that compare sizes at the switch. Linux freezes \
                 the size of what is preserved: changing it is refused at once (EPERM)."
            }
            Self::SealsStay => {
                "The file itself crosses, with the seals that it has at the switch. Linux makes a new \
                 file, with those that it had when it was preserved."
            }
            Self::NameStays => "A file keeps a name, `memfd:...`. On Linux it comes back as `/`.",
            Self::RegularFiles => {
                "A keeper hands over fds, so any regular file can be preserved. Linux takes memfds only."
            }
            Self::WriteIsNotConnected => {
                "The fd is the end of a socket: writing is answered ENOTCONN, on Linux EINVAL."
            }
            Self::SessionIsSocket => {
                "The fd is the end of a socket, and so `/proc/self/fd` says `socket:[...]`, on Linux \
                 `anon_inode:[luo_session] NAME`."
            }
        }
    }
}

/// A kind of system.
#[derive(Debug)]
pub(crate) struct Profile {
    pub(crate) lacks: &'static [(&'static [Need], &'static str)],
    pub(crate) deviations: &'static [Deviation],
}

impl Profile {
    /// Why it does not have what a case needs, if so.
    pub(crate) fn lacks(&self, need: Need) -> Option<&'static str> {
        let found = self.lacks.iter().find(|(needs, _)| needs.contains(&need));
        found.map(|(_, reason)| *reason)
    }
}

const OF_A_KERNEL: &[Need] = &[Need::Kernel, Need::OldLoad, Need::Witness];
const KERNELS_OWN: &str = "class K: only a kernel has it";
const NOT_PROCESSES: &str = "the device is a library here, which no file layer and no exec see";
const BYTES: &str = "about bytes: told once, of the reader and the writer";

/// The state machine alone.
pub(crate) const MACHINE: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Processes], NOT_PROCESSES),
        (&[Need::Files], "the machine has no files: what a file is, its handlers decide"),
        (&[Need::Threads, Need::Background], "the machine is called by one at a time"),
    ],
    deviations: &[Deviation::SessionIsReturned],
};

/// The keeper.
pub(crate) const KEEPER: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Processes], NOT_PROCESSES),
        (&[Need::Background], "calls take turns: none goes on while another is made"),
        (&[Need::Trees], BYTES),
    ],
    deviations: &[
        Deviation::SessionIsReturned,
        Deviation::SealsStay,
        Deviation::NameStays,
        Deviation::RegularFiles,
    ],
};

/// The pool, in this process or in a machine of its own.
pub(crate) const POOL: Profile = Profile {
    lacks: KEEPER.lacks,
    deviations: &[Deviation::SessionIsReturned, Deviation::NameStays],
};

/// The emulator.
pub(crate) const EMULATOR: Profile = Profile {
    lacks: &[
        (OF_A_KERNEL, KERNELS_OWN),
        (&[Need::Script], "no file of a real process fails when it is told to"),
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

/// Linux.
pub(crate) const KERNEL: Profile = Profile {
    lacks: &[
        (&[Need::Script], "no file of Linux fails when it is told to"),
        (&[Need::Trees], BYTES),
        (&[Need::OldLoad], "nothing in this project can load a kernel by kexec_load(2)"),
        (&[Need::Witness], "nobody is left to see it: the machine goes down meanwhile"),
    ],
    deviations: &[Deviation::RefusedNameEndsNextKernel, Deviation::SizeIsFrozen],
};
