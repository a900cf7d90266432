//! Names of a kernel's functions, read from the symbol table of its `vmlinux`.
//!
//! The kernels of the tests are built without address randomisation, so that addresses in the running
//! kernel equal those in the file. A distribution's kernel has no `vmlinux`, so its addresses are shown
//! as numbers.

use std::fs;
use std::io;
use std::path::Path;

/// ELF section type of a symbol table (System V ABI, figure 4-9).
const SYMTAB: u32 = 2;
/// Bytes of a symbol, and of a section header, in a 64-bit ELF file.
const SYMBOL: usize = 24;
const SECTION: usize = 64;

/// The functions of a kernel, by address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Symbols {
    /// Address and name, ascending.
    functions: Vec<(u64, String)>,
    end: u64,
}

impl Symbols {
    /// Reads the symbols of an ELF file.
    pub(crate) fn read(vmlinux: &Path) -> io::Result<Self> {
        let file = fs::read(vmlinux)?;
        let problem = || io::Error::other(format!("{}: no symbols found", vmlinux.display()));
        let all = symbols(&file).ok_or_else(problem)?;
        Self::new(all).ok_or_else(problem)
    }

    /// The symbols between `_stext` and `_etext`. `None` if one of these is missing.
    fn new(mut all: Vec<(u64, String)>) -> Option<Self> {
        let address = |name: &str| all.iter().find(|(_, n)| n == name).map(|(at, _)| *at);
        let (start, end) = (address("_stext")?, address("_etext")?);
        all.retain(|(at, name)| (start..end).contains(at) && name != "_stext");
        all.sort();
        // If an address has several names, the first one is kept.
        all.dedup_by_key(|(at, _)| *at);
        Some(Self { functions: all, end })
    }

    /// The function that contains an address, and the offset in it: `name+0x12`.
    pub(crate) fn name(&self, address: u64) -> Option<String> {
        let (start, name) = self.function(address)?;
        Some(format!("{name}+{:#x}", address - start))
    }

    /// The function that contains an address: its start and its name.
    pub(crate) fn function(&self, address: u64) -> Option<(u64, &str)> {
        if address >= self.end {
            return None;
        }
        let next = self.functions.partition_point(|(start, _)| *start <= address);
        let (start, name) = self.functions.get(next.checked_sub(1)?)?;
        Some((*start, name))
    }
}

/// All symbols of a 64-bit little-endian ELF file that have a name and lie in a section.
fn symbols(file: &[u8]) -> Option<Vec<(u64, String)>> {
    if file.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let sections = usize::try_from(u64_at(file, 40)?).ok()?;
    let count = usize::from(u16_at(file, 60)?);
    let section = |index: usize| file.get(sections.checked_add(index.checked_mul(SECTION)?)?..);
    let contents = |header: &[u8]| {
        let (offset, len) = (u64_at(header, 24)?, u64_at(header, 32)?);
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        file.get(offset..offset.checked_add(len)?)
    };
    let table = (0..count).filter_map(section).find(|header| u32_at(header, 4) == Some(SYMTAB))?;
    let names = contents(section(usize::try_from(u32_at(table, 40)?).ok()?)?)?;
    let symbols = contents(table)?.chunks_exact(SYMBOL).filter_map(|symbol| {
        let name = names.get(usize::try_from(u32_at(symbol, 0)?).ok()?..)?;
        let name = name.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
        let is_defined = u16_at(symbol, 6)? != 0;
        let name = String::from_utf8_lossy(name).into_owned();
        is_defined.then_some((u64_at(symbol, 8)?, name))
    });
    Some(symbols.collect())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A kernel with three functions.
    pub(crate) fn kernel() -> Symbols {
        let all = [
            (0xffff_ffff_8100_0000, "_stext"),
            (0xffff_ffff_8100_0100, "native_queued_spin_lock_slowpath"),
            (0xffff_ffff_8100_0000, "startup"),
            (0xffff_ffff_8100_0400, "sched_tick"),
            (0xffff_ffff_8100_0400, "sched_tick_alias"),
            (0xffff_ffff_8100_0800, "pv_native_safe_halt"),
            (0xffff_ffff_8100_1000, "_etext"),
            (0xffff_ffff_8200_0000, "some_data"),
            (0, "per_cpu_offset"),
        ];
        Symbols::new(all.map(|(at, name)| (at, name.to_owned())).to_vec()).unwrap()
    }

    #[test]
    fn an_address_of_the_code_has_a_name_and_others_have_none() {
        let symbols = kernel();
        let name = |address| symbols.name(address);
        let lock = "native_queued_spin_lock_slowpath+0x12";
        assert_eq!(name(0xffff_ffff_8100_0112).as_deref(), Some(lock));
        assert_eq!(name(0xffff_ffff_8100_0400).as_deref(), Some("sched_tick+0x0"));
        assert_eq!(name(0xffff_ffff_8100_0000).as_deref(), Some("startup+0x0"));
        for none in [0, 0xffff_ffff_80ff_ffff, 0xffff_ffff_8100_1000, 0xffff_ffff_8200_0000] {
            assert_eq!(name(none), None, "{none:#x}");
        }
    }

    #[test]
    fn a_program_s_own_symbols_are_read_from_its_file() {
        let file = fs::read(std::env::current_exe().unwrap()).unwrap();
        let all = symbols(&file).unwrap();
        assert!(all.iter().any(|(address, name)| *address != 0 && name == "main"));
    }

    #[test]
    fn a_file_that_is_no_elf_file_or_only_a_part_of_one_is_an_error_and_no_panic() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
        for contents in [&b""[..], b"not an ELF file", &whole[..64], &whole[..whole.len() / 2]] {
            fs::write(&path, contents).unwrap();
            let error = Symbols::read(&path).unwrap_err().to_string();
            assert!(error.contains("vmlinux: no symbols"), "{error}");
        }
    }
}
