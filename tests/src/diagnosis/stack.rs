//! Reads a guest's stack through the guest's page tables, and lists the calls on it.

use super::symbols::Symbols;

/// Bytes of a page, and of a kernel stack of Linux on x86-64 (`THREAD_SIZE` and `IRQ_STACK_SIZE`).
const PAGE: u64 = 4096;
const STACK: u64 = 16384;
/// Most calls that are listed.
const MOST_CALLS: usize = 40;
/// Most stacks that are followed: an interrupt's stack, and the stacks that were interrupted.
const MOST_STACKS: usize = 3;
/// The lowest address of the kernel's half.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Bits of a page table's entry (Intel SDM 3A, 4.5).
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The bit of CR4 for page tables of five levels.
const LA57: u64 = 1 << 12;

/// A function that reads guest memory: takes a guest-physical address and a number of bytes.
pub(crate) type Read<'a> = dyn FnMut(u64, u64) -> Result<Vec<u8>, String> + 'a;

/// Translates a virtual address to a guest-physical one.
pub(crate) fn physical(
    read: &mut Read<'_>,
    cr3: u64,
    cr4: u64,
    address: u64,
) -> Result<u64, String> {
    let mut table = cr3 & ADDRESS;
    let levels = if cr4 & LA57 != 0 { 5 } else { 4 };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = word(&read(table + 8 * (address >> shift & 0x1ff), 8)?)?;
        if entry & PRESENT == 0 {
            return Err(format!("{address:#x} is not mapped (level {level}: {entry:#x})"));
        }
        if level == 0 || (level <= 2 && entry & LARGE != 0) {
            let inside = (1 << shift) - 1;
            return Ok((entry & ADDRESS & !inside) | (address & inside));
        }
        table = entry & ADDRESS;
    }
    Err("the page tables have no last level".to_owned())
}

/// The functions whose addresses are on the stack from `rsp` on, innermost first. These are the
/// current calls, and possibly some addresses that earlier calls left behind. The second value is the
/// reason why the rest of the stack could not be read, if so.
pub(crate) fn calls(
    read: &mut Read<'_>,
    (cr3, cr4): (u64, u64),
    rsp: u64,
    symbols: &Symbols,
) -> (Vec<String>, Option<String>) {
    let (mut calls, mut top, mut last) = (Vec::new(), rsp & !7, 0);
    for _ in 0..MOST_STACKS {
        let end = (top / STACK + 1) * STACK;
        while top < end {
            let part = (PAGE - top % PAGE).min(end - top);
            let bytes = physical(read, cr3, cr4, top).and_then(|at| read(at, part));
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(problem) => return (calls, Some(problem)),
            };
            for value in bytes.chunks_exact(8).filter_map(|bytes| word(bytes).ok()) {
                if let Some(name) = symbols.name(value) {
                    calls.push(name);
                }
                if calls.len() == MOST_CALLS {
                    return (calls, None);
                }
                last = value;
            }
            top += part;
        }
        // The last word of an interrupt's stack is the stack pointer of the interrupted stack
        // (Linux `arch/x86/include/asm/irq_stack.h`).
        if last < KERNEL || symbols.name(last).is_some() || last / STACK == (end - 1) / STACK {
            break;
        }
        top = last & !7;
    }
    (calls, None)
}

fn word(bytes: &[u8]) -> Result<u64, String> {
    let bytes = bytes.try_into().map_err(|_| format!("{} bytes were read, not 8", bytes.len()))?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::symbols::tests::kernel;
    use super::*;

    /// Memory in which some words are not 0.
    #[derive(Default)]
    struct Memory(BTreeMap<u64, u64>);

    impl Memory {
        fn read(&self, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
            if at >= 1 << 30 {
                return Err(format!("no RAM at {at:#x}"));
            }
            let words = (at..at + bytes).step_by(8);
            Ok(words.flat_map(|at| self.0.get(&at).unwrap_or(&0).to_le_bytes()).collect())
        }
    }

    const CR3: u64 = 0x1000;

    /// Maps the page of a virtual address by four levels of tables, which lie at 0x1000 to 0x4000.
    fn map(memory: &mut Memory, virt: u64, phys: u64) {
        for (table, shift, next) in
            [(0x1000, 39, 0x2000), (0x2000, 30, 0x3000), (0x3000, 21, 0x4000), (0x4000, 12, phys)]
        {
            memory.0.insert(table + 8 * (virt >> shift & 0x1ff), next | PRESENT);
        }
    }

    #[test]
    fn an_address_is_found_through_four_levels_and_through_large_pages() {
        let mut memory = Memory::default();
        let virt = 0xffff_c900_0001_2000;
        map(&mut memory, virt, 0x9000);
        let find = |memory: &Memory, cr4, address| {
            physical(&mut |at, bytes| memory.read(at, bytes), CR3, cr4, address)
        };
        assert_eq!(find(&memory, 0, virt + 0x123), Ok(0x9123));
        assert!(find(&memory, 0, virt + 0x1000).unwrap_err().contains("not mapped"));
        // A page of 2 MiB.
        memory.0.insert(0x3000 + 8 * (virt >> 21 & 0x1ff), 0x0060_0000 | PRESENT | LARGE);
        assert_eq!(find(&memory, 0, virt + 0x123), Ok(0x0061_2123));
        // Five levels: one more table in front.
        memory.0.insert(0x5000 + 8 * (virt >> 48 & 0x1ff), CR3 | PRESENT);
        let found = physical(&mut |at, bytes| memory.read(at, bytes), 0x5000, LA57, virt);
        assert_eq!(found, Ok(0x0061_2000));
    }

    #[test]
    fn calls_are_told_from_the_innermost_on_into_the_stack_that_was_interrupted() {
        let mut memory = Memory::default();
        let (irq, task) = (0xffff_c900_0000_3000, 0xffff_c900_0000_7000);
        map(&mut memory, irq, 0x10000);
        map(&mut memory, task, 0x11000);
        memory.0.insert(0x10000 + 0xf00, 0xffff_ffff_8100_0404);
        memory.0.insert(0x10000 + 0xff8, task + 0xfe0);
        memory.0.insert(0x11000 + 0xfe8, 0xffff_ffff_8100_0801);
        let mut read = |at, bytes| memory.read(at, bytes);
        let (found, problem) = calls(&mut read, (CR3, 0), irq + 0xe00, &kernel());
        assert_eq!(found, ["sched_tick+0x4", "pv_native_safe_halt+0x1"]);
        assert_eq!(problem, None);
    }

    #[test]
    fn a_stack_that_cannot_be_read_says_why_and_keeps_what_was_found() {
        let mut memory = Memory::default();
        let stack = 0xffff_c900_0000_2000;
        map(&mut memory, stack, 0x10000);
        memory.0.insert(0x10000 + 0x808, 0xffff_ffff_8100_0404);
        let mut read = |at, bytes| memory.read(at, bytes);
        let (found, problem) = calls(&mut read, (CR3, 0), stack + 0x800, &kernel());
        assert_eq!(found, ["sched_tick+0x4"]);
        assert!(problem.unwrap().contains("not mapped"));
    }
}
