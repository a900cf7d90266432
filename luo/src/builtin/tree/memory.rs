//! Physical memory, as far as a tree needs it: pages at addresses.
//!
//! Layouts whose records hold addresses read them through [`Memory`] and write through
//! [`Allocate`], so that they work on a dump, on `/dev/mem`, or on nothing but a map
//! ([`SimulatedMemory`]). Nothing here checks what the pages say.

use std::collections::BTreeMap;

/// Bytes of a page, and the alignment of every address that a tree holds.
pub const PAGE_BYTES: usize = 4096;

/// One page.
pub type Page = [u8; PAGE_BYTES];

/// Memory that can be read page by page.
pub trait Memory {
    /// The page at `address`, a multiple of [`PAGE_BYTES`]; `None` if there is none.
    fn page(&self, address: u64) -> Option<&Page>;
}

/// Memory that pages can be taken from.
pub trait Allocate: Memory {
    /// Takes `count` pages of zeros, side by side, and says where the first one is. Never 0. `None`
    /// if there is not as much.
    fn allocate(&mut self, count: usize) -> Option<u64>;

    /// A page that was taken, to write to.
    fn page_mut(&mut self, address: u64) -> Option<&mut Page>;
}

/// Memory that is a map. Pages are taken from 1 MiB upwards, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SimulatedMemory {
    pages: BTreeMap<u64, Box<Page>>,
}

impl SimulatedMemory {
    const FIRST: u64 = 1 << 20;

    /// Memory without pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a page at an address, whatever was there.
    pub fn insert(&mut self, address: u64, page: Page) {
        self.pages.insert(address, Box::new(page));
    }

    /// All pages, by address.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.pages.iter().map(|(address, page)| (*address, &**page))
    }
}

impl Memory for SimulatedMemory {
    fn page(&self, address: u64) -> Option<&Page> {
        self.pages.get(&address).map(|page| &**page)
    }
}

impl Allocate for SimulatedMemory {
    fn allocate(&mut self, count: usize) -> Option<u64> {
        let page_bytes = PAGE_BYTES as u64;
        let first = match self.pages.last_key_value() {
            Some((last, _)) => last.checked_add(page_bytes)?.max(Self::FIRST),
            None => Self::FIRST,
        };
        for index in 0..u64::try_from(count).ok()? {
            let address = first.checked_add(index.checked_mul(page_bytes)?)?;
            self.insert(address, [0; PAGE_BYTES]);
        }
        Some(first)
    }

    fn page_mut(&mut self, address: u64) -> Option<&mut Page> {
        self.pages.get_mut(&address).map(|page| &mut **page)
    }
}

/// Reads `length` bytes from the page-aligned `address` on, over pages side by side. `None` if a
/// page is missing; then nothing was allocated for it.
pub(super) fn read_contiguous(
    memory: &impl Memory,
    address: u64,
    length: usize,
) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut at = address;
    while bytes.len() < length {
        let page = memory.page(at)?;
        bytes.extend_from_slice(&page[..PAGE_BYTES.min(length - bytes.len())]);
        at = at.checked_add(PAGE_BYTES as u64)?;
    }
    Some(bytes)
}

/// Writes `bytes` from the page-aligned `address` on, over pages side by side. `None` if a page is
/// missing.
pub(super) fn write_contiguous(
    memory: &mut impl Allocate,
    address: u64,
    bytes: &[u8],
) -> Option<()> {
    let mut at = address;
    for chunk in bytes.chunks(PAGE_BYTES) {
        memory.page_mut(at)?[..chunk.len()].copy_from_slice(chunk);
        at = at.checked_add(PAGE_BYTES as u64)?;
    }
    Some(())
}
