//! The memory map as both boot protocols write it.

/// What a region of the memory map is. The values are E820 types and PVH memory map types alike
/// (ACPI 6.5, table 15.1; Linux `XEN_HVM_MEMMAP_TYPE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable memory.
    Ram = 1,
    /// Not for the operating system.
    Reserved = 2,
}

/// One region of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Size in bytes, not zero.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
}
