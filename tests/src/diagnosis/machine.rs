//! Shows where the machine's CPUs are, from two looks by QEMU's monitor.

use super::symbols::Symbols;
use crate::qemu::Qemu;

/// Number of words of a stack that are read.
const STACK_WORDS: usize = 256;
/// Most calls that are listed.
const MOST_CALLS: usize = 16;

/// One CPU, from the output of QEMU's monitor (`info registers`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cpu {
    rip: u64,
    rsp: u64,
    rflags: u64,
    halted: bool,
}

/// Looks at the machine. Returns the monitor's output, and one line that says what the CPUs do.
pub(super) fn look(qemu: &mut Qemu, symbols: Option<&Symbols>) -> (String, String) {
    let [first, second] = qemu.cpus();
    let mut text = format!("{first}\n--- a moment later:\n{second}");
    let (before, after) = (cpus(&first), cpus(&second));
    let mut said = Vec::new();
    for (index, cpu) in after.iter().enumerate() {
        let calls = calls(&qemu.ask(&format!("x /{STACK_WORDS}gx {:#x}", cpu.rsp)), symbols);
        if !calls.is_empty() {
            text += &format!("\nCPU {index}: code addresses on its stack: {}", calls.join(", "));
        }
        said.push(format!("CPU {index} {}", does(before.get(index), *cpu, symbols)));
    }
    let said = if said.is_empty() { "QEMU shows no CPU".to_owned() } else { said.join("; ") };
    (text, said)
}

fn does(before: Option<&Cpu>, cpu: Cpu, symbols: Option<&Symbols>) -> String {
    let interrupts = if cpu.rflags & 1 << 9 != 0 { "on" } else { "off" };
    if cpu.halted {
        return format!("sleeps with interrupts {interrupts}");
    }
    // The kernels of host and guests are at the same addresses, so the name may be wrong.
    let place = |rip: u64| match symbols.and_then(|symbols| symbols.name(rip)) {
        Some(name) => format!("{rip:#x} ({name} if that is the host's kernel)"),
        None => format!("{rip:#x}"),
    };
    match before {
        Some(before) if before.rip != cpu.rip => {
            format!("runs: it was at {}, then at {}", place(before.rip), place(cpu.rip))
        }
        _ => format!("is at {} with interrupts {interrupts}", place(cpu.rip)),
    }
}

/// Parses the CPUs in the monitor's output.
fn cpus(text: &str) -> Vec<Cpu> {
    let blocks = text.split("CPU#").skip(1);
    blocks
        .filter_map(|block| {
            Some(Cpu {
                rip: field(block, "RIP=")?,
                rsp: field(block, "RSP=")?,
                rflags: field(block, "RFL=")?,
                halted: field(block, "HLT=")? == 1,
            })
        })
        .collect()
}

/// The hexadecimal number after `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let digits = text.split_once(name)?.1;
    let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
    u64::from_str_radix(&digits[..end], 16).ok()
}

/// The functions whose addresses are in a memory dump of the monitor (`address: 0x... 0x...`).
fn calls(memory: &str, symbols: Option<&Symbols>) -> Vec<String> {
    let Some(symbols) = symbols else { return Vec::new() };
    let words = memory
        .lines()
        .filter_map(|line| line.split_once(':'))
        .flat_map(|(_, words)| words.split_whitespace().filter_map(|word| word.strip_prefix("0x")));
    words
        .filter_map(|word| symbols.name(u64::from_str_radix(word, 16).ok()?))
        .take(MOST_CALLS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::symbols::tests::kernel;
    use super::*;

    const REGISTERS: &str = "\
\r
CPU#0\r
RAX=0000000000000000 RBX=0000000000000001 RCX=0000000000000000 RDX=0000000000000000\r
RSI=0000000000000000 RDI=0000000000000000 RBP=ffffffff82003e60 RSP=ffffffff82003e50\r
RIP=ffffffff81000112 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\r
CR0=80050033 CR2=00007f5c3c8d5000 CR3=0000000002a0a000 CR4=000006f0\r
CPU#1\r
RSI=0000000000000000 RDI=0000000000000000 RBP=0000000000000000 RSP=ffffffff82003e50\r
RIP=ffffffff81000801 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
";

    #[test]
    fn each_cpu_that_the_monitor_shows_is_read() {
        let found = cpus(REGISTERS);
        let rsp = 0xffff_ffff_8200_3e50;
        let first = Cpu { rip: 0xffff_ffff_8100_0112, rsp, rflags: 0x246, halted: false };
        let second = Cpu { rip: 0xffff_ffff_8100_0801, rsp, rflags: 0x46, halted: true };
        assert_eq!(found, [first, second]);
        assert_eq!(cpus("Error: unknown command"), []);
    }

    #[test]
    fn a_cpu_that_stays_where_it_is_one_that_goes_on_and_one_that_sleeps_are_told_apart() {
        let [first, second] = cpus(REGISTERS)[..] else { panic!() };
        let stays = does(Some(&first), first, Some(&kernel()));
        assert!(stays.contains("native_queued_spin_lock_slowpath+0x12"), "{stays}");
        assert!(stays.ends_with("with interrupts on"), "{stays}");
        let moved = Cpu { rip: first.rip + 4, ..first };
        assert!(does(Some(&first), moved, None).starts_with("runs: it was at 0xffff"));
        assert_eq!(does(None, second, None), "sleeps with interrupts off");
    }

    #[test]
    fn calls_are_read_from_the_monitor_s_dump_of_memory() {
        let memory = "ffffffff82003e50: 0xffffffff81000404 0x0000000000000000\r\n\
                      ffffffff82003e60: 0x00000000deadbeef 0xffffffff81000801\r\n";
        let expected = ["sched_tick+0x4", "pv_native_safe_halt+0x1"];
        assert_eq!(calls(memory, Some(&kernel())), expected);
        assert!(calls("Cannot access memory", Some(&kernel())).is_empty());
    }
}
