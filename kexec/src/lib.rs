//! kexec.
