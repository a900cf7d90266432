//! What depends on the processor architecture: address map, boot protocols, tables for the guest.

pub mod x86_64;
