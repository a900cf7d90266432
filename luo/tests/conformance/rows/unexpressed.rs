//! Cases that are not told here, and why.

const VFS: &str = "the kernel's file layer answers it, before any driver";
const KERNEL: &str = "only a real kernel does it: boot, memory management, or a destroyed machine";
const FILES: &str = "it is about a kind of file, which its handler decides: told with the handler";
const THREADS: &str = "the machine is called by one at a time: told with what serves many";
const PROCESS: &str = "it needs a real process";

/// Numbers and reasons.
pub(crate) const UNEXPRESSED: &[(&[u16], &str)] = &[
    (&[10, 36, 54], VFS),
    (
        &[
            11, 12, 15, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 98, 99, 108, 109, 110, 111, 112,
            119, 122, 136, 137, 151, 154, 155, 156, 157,
        ],
        KERNEL,
    ),
    (&[70, 71, 72, 77, 86, 97, 100, 118, 147, 148, 149, 150, 152, 160], FILES),
    (&[58, 82, 121, 173, 174, 175, 176, 177, 178, 179], THREADS),
    (&[106], PROCESS),
];
