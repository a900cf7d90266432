//! Tests of the layout of Linux 7.3: golden pages, round trips, and every kind of damage.

use proptest::prelude::*;

use super::*;
use crate::Token;
use crate::builtin::tree::memory::SimulatedMemory;
use crate::builtin::tree::samples::{any_handover, golden, many, pages};

const SER: &[u8] = include_bytes!("../../../../golden/luo-v5.ser");
const PAGES: &[u8] = include_bytes!("../../../../golden/luo-v5.pages");

const LINUX_SER: &[u8] = include_bytes!("../../../../golden/linux-7.3.4.ser");
const LINUX_PAGES: &[u8] = include_bytes!("../../../../golden/linux-7.3.4.pages");

/// The address of the golden tree's first block of sessions.
const SESSIONS: u64 = 0x3000_0000;

fn with_u64(memory: &mut SimulatedMemory, address: u64, at: usize, value: u64) {
    memory.page_mut(address).unwrap()[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Changes a number in a golden page, and returns the error of decoding.
fn after(address: u64, at: usize, value: u64) -> String {
    let mut memory = pages(PAGES);
    with_u64(&mut memory, address, at, value);
    let error = decode(SER, &memory).unwrap_err();
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn blocks(first: u64, memory: &SimulatedMemory) -> Vec<u64> {
    let mut counts = Vec::new();
    let mut at = first;
    while at != 0 {
        let page = memory.page(at).unwrap();
        counts.push(u64_at(page, 8));
        at = u64_at(page, 0);
    }
    counts
}

#[test]
fn the_golden_pages_are_decoded() {
    let memory = pages(PAGES);
    assert_eq!(decode(SER, &memory).unwrap(), golden());
    let memfd = memfd::decode(0x700_1000, &memory).unwrap();
    let folio = |frame, index| memfd::Folio { frame, dirty: true, uptodate: true, index };
    let folios = vec![folio(0x40200, 0), folio(0x12345, 512)];
    assert_eq!(memfd, memfd::Memfd { position: 5, size: 0x20_1000, seals: 0xf, folios });
}

#[test]
fn a_tree_that_linux_wrote_is_decoded() {
    let memory = pages(LINUX_PAGES);
    let handover = decode(LINUX_SER, &memory).unwrap();
    let [web, empty] = &handover.sessions[..] else { panic!("{handover}") };
    assert_eq!(
        (handover.number, web.name.as_bytes(), empty.name.as_bytes()),
        (1, &b"web"[..], &b"empty"[..])
    );
    assert_eq!(empty.files, []);
    let memfds: Vec<_> = web
        .files
        .iter()
        .map(|file| {
            assert_eq!(file.compatible.as_bytes(), memfd::COMPATIBLE.as_bytes());
            let memfd = memfd::decode(file.data, &memory).unwrap();
            (file.token, memfd.size, memfd.folios.len(), memfd.seals)
        })
        .collect();
    assert_eq!(memfds, [(Token(1), 15, 1, 0), (Token(u64::MAX), 0, 0, 0)]);
}

#[test]
fn the_limits_are_those_of_the_kernel() {
    assert_eq!((SESSIONS_PER_BLOCK, FILES_PER_BLOCK, MAX_FLBS), (51, 63, 63));
    assert_eq!((MAX_BLOCKS, CHUNK_PAGES), (10_000, 511));
}

#[test]
fn a_block_is_filled_before_the_next() {
    for (sessions, counts) in [(0, vec![]), (51, vec![51]), (52, vec![51, 1]), (102, vec![51, 51])]
    {
        let mut memory = SimulatedMemory::new();
        let handover = many(sessions, 0);
        let blob = encode(&handover, &mut memory).unwrap();
        assert_eq!(blocks(u64_at(&blob, 16), &memory), counts);
        assert_eq!(decode(&blob, &memory).unwrap(), handover);
    }
    for (files, counts) in [(63, vec![63]), (64, vec![63, 1])] {
        let mut memory = SimulatedMemory::new();
        let handover = many(1, files);
        let blob = encode(&handover, &mut memory).unwrap();
        let session = memory.page(u64_at(&blob, 16)).unwrap();
        assert_eq!(blocks(u64_at(session, 16 + 64), &memory), counts);
        assert_eq!(decode(&blob, &memory).unwrap(), handover);
    }
}

#[test]
fn another_version_or_length_is_refused() {
    let memory = pages(PAGES);
    let mut other = SER.to_vec();
    other[5] = b'4';
    assert_eq!(
        decode(&other, &memory).unwrap_err().to_string(),
        r"the tree is `luo-v4\x00\x00`, this build knows `luo-v5`"
    );
    for length in (0..SER.len()).chain([33]) {
        let mut blob = SER.to_vec();
        blob.resize(length, 0);
        assert_eq!(decode(&blob, &memory), Err(Error::Blob { found: length }));
    }
}

#[test]
fn damaged_chains_are_refused() {
    let chain = "the chain of sessions is damaged: ";
    for (at, value, says) in [
        (8, 0, "the block at 0x30000000 says 0 records, it can have 1 to 51"),
        (8, 52, "the block at 0x30000000 says 52 records, it can have 1 to 51"),
        (
            8,
            u64::MAX,
            "the block at 0x30000000 says 18446744073709551615 records, it can have 1 to 51",
        ),
        (0, SESSIONS, "the page at 0x30000000 is part of the tree twice"),
        (0, 0x123, "0x123 is not the address of a page"),
        (0, 0x5000_0000, "there is no memory at 0x50000000"),
    ] {
        assert_eq!(after(SESSIONS, at, value), format!("{chain}{says}"));
    }
    let files = after(0x3000_3000, 0, 0x3000_2000);
    assert!(files.starts_with("the chain of files of session `web` is damaged"), "{files}");
    // Two sessions cannot have the same files.
    let again = after(0x3000_1000, 16 + 64, 0x3000_2000);
    assert!(again.ends_with("the page at 0x30002000 is part of the tree twice"), "{again}");
}

#[test]
fn a_session_with_a_wrong_number_of_files_is_refused() {
    for count in [0, 1, 3] {
        let says = format!("session `web` says {count} files, its blocks have 2");
        assert_eq!(after(SESSIONS, 16 + 72, count), says);
    }
    let says = "session `web` says 2 files, its blocks have 0";
    assert_eq!(after(SESSIONS, 16 + 64, 0), says);
    let nameless = after(SESSIONS, 16 + 80, 0);
    assert!(nameless.starts_with("record 1 of sessions is damaged"), "{nameless}");
}

#[test]
fn the_page_of_shared_objects_is_checked() {
    let page = 0x3000_5000;
    let says = after(page, 0, 2);
    assert!(says.ends_with("it says 2 pages, this build knows 1"), "{says}");
    let says = after(page, 8, 64);
    assert!(says.ends_with("it says 64 objects, the most is 63"), "{says}");
    let says = after(page, 8, 3);
    assert!(says.starts_with("record 2 of shared objects is damaged"), "{says}");
    let flb = golden().flbs[0];
    let handover = Handover { flbs: vec![flb; 64], ..Handover::default() };
    assert!(encode(&handover, &mut SimulatedMemory::new()).is_err());
}

#[test]
fn a_chain_of_10000_blocks_is_the_longest() {
    let mut memory = SimulatedMemory::new();
    let record = golden().sessions[1].clone();
    let entry = SessionEntry { name: record.name, files: 0, count: 0 };
    let chain = |blocks: u64, memory: &mut SimulatedMemory| {
        for block in 1..=blocks {
            let mut page = [0; PAGE_BYTES];
            let next = if block == blocks { 0 } else { (block + 1) << 12 };
            page[..8].copy_from_slice(&next.to_le_bytes());
            page[8..16].copy_from_slice(&1_u64.to_le_bytes());
            page[16..96].copy_from_slice(&entry.to_bytes());
            memory.insert(block << 12, page);
        }
        let mut blob = SER.to_vec();
        blob[16..24].copy_from_slice(&0x1000_u64.to_le_bytes());
        blob[24..].fill(0);
        decode(&blob, memory)
    };
    assert_eq!(chain(10_000, &mut memory).unwrap().sessions.len(), 10_000);
    let error = chain(10_001, &mut memory).unwrap_err();
    let Error::Chain { source, .. } = error else { panic!("{error}") };
    assert_eq!(source, BlockError::TooLong { address: 10_001 << 12 });
}

#[test]
fn an_array_of_511_pages_is_read_with_and_without_its_empty_last_chunk() {
    // 256 folios to a page.
    for (pages, chunks) in [(1, 1), (510, 1), (511, 2), (512, 2)] {
        let folio = |index| memfd::Folio { frame: 1 + index, dirty: true, uptodate: false, index };
        let folios = (0..pages * 256).map(folio).collect();
        let memfd = memfd::Memfd { position: 0, size: pages << 20, seals: 0, folios };
        let mut memory = SimulatedMemory::new();
        let handle = memfd::encode(&memfd, &mut memory).unwrap();
        let first = u64_at(memory.page(handle).unwrap(), 32);
        let found = vmalloc::chunks(first, &memory);
        assert_eq!(found.len(), chunks, "{pages} pages");
        assert_eq!(memfd::decode(handle, &memory).unwrap(), memfd);
        if pages == 511 {
            assert_eq!(memory.page(found[1]).unwrap(), &[0; PAGE_BYTES]);
            with_u64(&mut memory, first, 0, 0);
            assert_eq!(memfd::decode(handle, &memory).unwrap(), memfd);
            with_u64(&mut memory, first, 0, first);
            assert!(memfd::decode(handle, &memory).is_err());
        }
    }
}

#[test]
fn an_empty_memfd_has_no_array() {
    let memfd = memfd::Memfd { position: 7, size: 0, seals: 0, folios: Vec::new() };
    let mut memory = SimulatedMemory::new();
    let handle = memfd::encode(&memfd, &mut memory).unwrap();
    assert_eq!(memory.pages().count(), 1);
    assert_eq!(memfd::decode(handle, &memory).unwrap(), memfd);
}

#[test]
fn the_record_of_a_memfd_is_checked() {
    let handle = 0x700_1000;
    for (address, at, value, says) in [
        (handle, 16, 1 << 32 | 0xf, "the record of the memfd says flags 0x1, this build knows 0"),
        (
            handle,
            24,
            1 << 32,
            "the record of the memfd says folios 0x100000000, this build knows at most 2^32 - 1",
        ),
        (handle, 24, 257, "cannot read the 257 folios of the memfd"),
        (handle, 32, 0, "cannot read the 2 folios of the memfd"),
        (handle, 40, 1 << 32 | 2, "cannot read the 2 folios of the memfd"),
        (
            handle,
            40,
            1 << 48 | 1,
            "the record of the memfd says an array of kind 0x10000, this build knows order 0, allocated or huge",
        ),
        (0x3000_6000, 0, 0x3000_6000, "cannot read the 2 folios of the memfd"),
        (0x3000_6000, 16, 0x3000_7000, "cannot read the 2 folios of the memfd"),
        (
            0x3000_7000,
            0,
            4 << 52 | 1,
            "the record of the memfd says a folio with flags 0x4, this build knows dirty and up to date",
        ),
    ] {
        let mut memory = pages(PAGES);
        with_u64(&mut memory, address, at, value);
        assert_eq!(memfd::decode(handle, &memory).unwrap_err().to_string(), says);
    }
    let folio = memfd::Folio { frame: 1 << 52, dirty: true, uptodate: true, index: 0 };
    let memfd = memfd::Memfd { position: 0, size: 1, seals: 0, folios: vec![folio] };
    assert!(memfd::encode(&memfd, &mut SimulatedMemory::new()).is_err());
}

/// Whether no record of the golden page uses the byte: it is after a NUL, or after the last record.
fn is_unused(address: u64, at: usize) -> bool {
    let tail = |labels: &[(usize, usize, usize)], end: usize| {
        at >= end
            || labels
                .iter()
                .any(|(from, length, size)| (from + length + 1..from + size).contains(&at))
    };
    match address {
        0x3000_0000 => tail(&[(16, 3, 64), (96, 5, 64)], 176),
        0x3000_1000 => tail(&[(16, 4, 64)], 96),
        0x3000_2000 | 0x3000_3000 => tail(&[(16, 8, 48)], 80),
        0x3000_4000 => tail(&[(16, 14, 48)], 80),
        0x3000_5000 => tail(&[(16, 8, 48), (80, 6, 48)], 144),
        // The pages of the memfd, which decoding the tree does not read.
        _ => true,
    }
}

#[test]
fn every_flipped_byte_is_an_error_or_another_tree_unless_nothing_uses_it() {
    let memory = pages(PAGES);
    for at in 0..SER.len() {
        let mut blob = SER.to_vec();
        blob[at] ^= 1;
        assert_ne!(decode(&blob, &memory).ok(), Some(golden()), "byte {at} of luo_ser");
    }
    let addresses: Vec<u64> = memory.pages().map(|(address, _)| address).collect();
    for address in addresses {
        for at in 0..PAGE_BYTES {
            let mut damaged = memory.clone();
            damaged.page_mut(address).unwrap()[at] ^= 1;
            let decoded = decode(SER, &damaged);
            let same = decoded.as_ref().ok() == Some(&golden());
            assert_eq!(same, is_unused(address, at), "byte {at} of {address:#x}");
        }
    }
}

proptest! {
    #[test]
    fn decoding_returns_what_was_encoded(handover in any_handover()) {
        let mut memory = SimulatedMemory::new();
        let blob = encode(&handover, &mut memory).unwrap();
        prop_assert_eq!(decode(&blob, &memory).unwrap(), handover);
    }

    #[test]
    fn no_damage_makes_it_panic(
        handover in any_handover(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..200, any::<u8>()), 1..8),
    ) {
        let mut memory = SimulatedMemory::new();
        let blob = encode(&handover, &mut memory).unwrap();
        let addresses: Vec<u64> = memory.pages().map(|(address, _)| address).collect();
        prop_assume!(!addresses.is_empty());
        for (page, at, value) in damage {
            memory.page_mut(*page.get(&addresses)).unwrap()[at] = value;
        }
        // A damaged tree that is accepted can be encoded and decoded like any other.
        if let Ok(other) = decode(&blob, &memory) {
            let mut memory = SimulatedMemory::new();
            let blob = encode(&other, &mut memory).unwrap();
            prop_assert_eq!(decode(&blob, &memory).unwrap(), other);
        }
        for address in addresses {
            let _ = memfd::decode(address, &memory);
        }
    }
}
