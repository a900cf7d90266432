//! x86-64 machines: memory map, kernel loading, ACPI tables, CPUID, MSRs, and the host's TSC.
//!
//! Nothing here makes a KVM call except [`cpuid::supported`] and [`msr::indices_to_save`], which ask
//! what the host offers, and [`boot`], which gives a fresh vCPU its first registers.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod e820;
pub mod layout;
pub mod msr;
pub mod registers;
pub mod tsc;
