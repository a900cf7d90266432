//! Physical memory as pages at addresses, for trees whose records hold addresses.
//!
//! Such trees are read through [`Memory`] and written through [`Allocate`]. So they can be in a
//! dump, in `/dev/mem`, or in a map ([`SimulatedMemory`]). This module does not check the contents
//! of pages.

use std::collections::BTreeMap;

/// Bytes of a page, and the alignment of every address that a tree holds.
pub const PAGE_BYTES: usize = 4096;

/// One page.
pub type Page = [u8; PAGE_BYTES];

/// Memory that can be read page by page.
pub trait Memory {
    /// Returns the page at `address`, a multiple of [`PAGE_BYTES`]; `None` if there is no page.
    fn page(&self, address: u64) -> Option<&Page>;
}

/// Memory in which pages can be allocated.
pub trait Allocate: Memory {
    /// Allocates `count` contiguous pages of zeros, and returns the address of the first, which is
    /// never 0. `None` if there is not enough memory.
    fn allocate(&mut self, count: usize) -> Option<u64>;

    /// Returns an allocated page for writing; `None` if there is no page.
    fn page_mut(&mut self, address: u64) -> Option<&mut Page>;
}

/// Memory as a map of pages. Allocates each page above the last one, from 1 MiB on.
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

    /// Puts a page at an address, and replaces a page that was there.
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

/// Reads `length` bytes from contiguous pages, from the page-aligned `address` on. `None` if a page
/// is missing. Allocates only as it reads, so that a wrong `length` costs no memory.
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

/// Writes `bytes` to contiguous pages, from the page-aligned `address` on. `None` if a page is
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
