//! The first registers of the vCPUs of a machine that boots.
//!
//! The first vCPU starts at the kernel's entry point, in the mode that the boot protocol requires.
//! The others wait for INIT and SIPI, as KVM creates them. All get the settings that firmware
//! makes.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::{Entry, Protocol};
use super::layout;
use super::msr::{self, Msr};
use crate::kvm::{Attempt, KvmError};

/// CR0: protected mode, extension type (always set), paging.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled, and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;
/// Page table entry: present, writable; in a directory, a large page.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
/// The boot page tables map this many GiB one to one, which includes every boot structure.
const MAPPED_GIB: u64 = 4;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;

/// Selectors, as Linux's protocol names them: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Offsets in the LAPIC's page, and the delivery modes (Intel SDM 3A, 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0b111 << 8;
const DELIVERY_NMI: u32 = 0b100 << 8;

/// The first registers of a vCPU could not be set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetUpError {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// An MSR could not be written.
    #[error(transparent)]
    Msr(#[from] msr::WriteError),
    /// The boot tables could not be written.
    #[error("cannot write the boot tables to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Sets the first registers of vCPU `id`, whose CPUID must be set.
pub fn set_up_boot_vcpu(
    vcpu: &VcpuFd,
    id: u32,
    entry: &Entry,
    memory: &GuestMemoryMmap,
) -> Result<(), SetUpError> {
    msr::write(vcpu, &MSRS)?;
    let mut lapic = vcpu.get_lapic().attempt("read the LAPIC")?;
    connect_pins(&mut lapic);
    vcpu.set_lapic(&lapic).attempt("set the LAPIC")?;
    // The state after FNINIT, with SSE's default control word.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).attempt("set the floating point registers")?;
    if id == 0 {
        let sregs = vcpu.get_sregs().attempt("read the special registers")?;
        let sregs = match entry.protocol {
            Protocol::Linux64 => {
                write_page_tables(memory)?;
                long_mode(sregs)
            }
            Protocol::Pvh => protected_mode(sregs),
        };
        write_gdt(memory, &sregs)?;
        vcpu.set_sregs(&sregs).attempt("set the special registers")?;
        vcpu.set_regs(&regs(entry)).attempt("set the general registers")?;
    }
    Ok(())
}

const MSRS: [Msr; 2] = [
    // Linux uses fast `rep movsb` if this bit is set.
    Msr { index: msr::IA32_MISC_ENABLE, data: msr::MISC_ENABLE_FAST_STRING },
    // All memory is write-back unless a page table says otherwise, as firmware would set it.
    Msr { index: msr::MTRR_DEF_TYPE, data: msr::MTRR_WRITE_BACK },
];

/// Connects the LAPIC's pins as firmware does: the PICs to LINT0, NMI to LINT1.
fn connect_pins(lapic: &mut kvm_lapic_state) {
    for (offset, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *register = byte as _;
        }
    }
}

fn regs(entry: &Entry) -> kvm_regs {
    let regs = kvm_regs { rflags: RFLAGS, rip: entry.rip, ..Default::default() };
    match entry.protocol {
        // The protocol requires no stack. This one is in the unused memory below the zero page.
        Protocol::Linux64 => {
            let stack = layout::ZERO_PAGE.0;
            kvm_regs { rsi: layout::ZERO_PAGE.0, rsp: stack, rbp: stack, ..regs }
        }
        Protocol::Pvh => kvm_regs { rbx: layout::PVH_START_INFO.0, ..regs },
    }
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        // A 64-bit code segment has the default size bit clear (Intel SDM 3A, 5.2.1).
        db: (!long).into(),
        s: 1,
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}

/// Returns a task segment: type 11, busy 32-bit or 64-bit. VM entry on Intel requires one.
fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

fn with_segments(mut sregs: kvm_sregs, long: bool) -> kvm_sregs {
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = segment(CODE_SELECTOR, 11, long);
    let data = segment(DATA_SELECTOR, 3, false);
    for place in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *place = data;
    }
    sregs.tr = task();
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs
}

fn long_mode(sregs: kvm_sregs) -> kvm_sregs {
    let mut sregs = with_segments(sregs, true);
    sregs.cr3 = layout::BOOT_PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

fn protected_mode(sregs: kvm_sregs) -> kvm_sregs {
    let mut sregs = with_segments(sregs, false);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs
}

/// Null, unused, code, data, task (which has two entries in long mode).
const GDT_ENTRIES: usize = 6;

/// Writes the GDT that matches the segment registers, for a kernel that loads them again.
fn write_gdt(memory: &GuestMemoryMmap, sregs: &kvm_sregs) -> Result<(), GuestMemoryError> {
    let mut table = [0u64; GDT_ENTRIES];
    for segment in [&sregs.cs, &sregs.ds, &sregs.tr] {
        table[usize::from(segment.selector / 8)] = descriptor(segment);
    }
    for (entry, at) in table.iter().zip((layout::GDT.0..).step_by(8)) {
        memory.write_obj(*entry, GuestAddress(at))?;
    }
    Ok(())
}

/// Returns the descriptor of a segment (Intel SDM 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let bit = |value: u8, at: u32| u64::from(value) << at;
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let (limit, base) = (u64::from(limit), segment.base);
    (base & 0xff00_0000) << 32
        | (base & 0x00ff_ffff) << 16
        | limit & 0xffff
        | (limit & 0xf_0000) << 32
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// Writes page tables that map the first 4 GiB one to one with large pages: PML4, PDPT, four
/// directories.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let page = |index: u64| layout::BOOT_PAGE_TABLES.0 + index * layout::PAGE_SIZE;
    debug_assert_eq!(2 + MAPPED_GIB, layout::BOOT_PAGE_TABLE_PAGES);
    memory.write_obj(page(1) | PRESENT_WRITABLE, GuestAddress(page(0)))?;
    for gib in 0..MAPPED_GIB {
        let directory = page(2 + gib);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(page(1) + gib * 8))?;
        for index in 0..GIB / LARGE_PAGE {
            let address = gib * GIB + index * LARGE_PAGE;
            let entry = address | PRESENT_WRITABLE | LARGE;
            memory.write_obj(entry, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_segments_have_the_descriptors_that_everybody_knows() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 11, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 11, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, 3, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_boot_page_tables_map_low_memory_one_to_one() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let address = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        for target in [0, LARGE_PAGE, 5 * GIB / 2, 4 * GIB - LARGE_PAGE] {
            let pdpt = address(read(layout::BOOT_PAGE_TABLES.0));
            let directory = address(read(pdpt + target / GIB * 8));
            let entry = read(directory + target % GIB / LARGE_PAGE * 8);
            assert_eq!(address(entry), target);
            assert_eq!(entry & (PRESENT_WRITABLE | LARGE), PRESENT_WRITABLE | LARGE);
        }
    }
}
