//! The wire formats: cases 180 to 190. They test the encoder and decoder and need no system.

use luo::builtin::tree::memory::{Allocate, Memory, SimulatedMemory};
use luo::builtin::tree::record::{FILE_BYTES, FLB_BYTES, SESSION_BYTES};
use luo::builtin::tree::v5::radix::Run;
use luo::builtin::tree::v5::{self, memfd};
use luo::builtin::tree::{FileRecord, Handover, SessionRecord, v1};
use luo::builtin::{Compatible, Name};
use luo::uapi::{Finish, GetName, NamedSession, TokenedFd};
use luo::{Errno, Token};

use super::Class::U;
use super::{Row, row};
use crate::conformance::profile::Need;
use crate::conformance::world::{Failure, Outcome, same};

/// A handover with `sessions` sessions of `files` files each.
fn handover(sessions: usize, files: u64) -> Handover {
    let session = |index| SessionRecord {
        name: Name::new(format!("session-{index}")).expect("the name is short"),
        files: (0..files).map(file).collect(),
    };
    Handover { number: 1, sessions: (0..sessions).map(session).collect(), flbs: Vec::new() }
}

fn file(token: u64) -> FileRecord {
    let compatible = Compatible::new(memfd::COMPATIBLE).expect("the name is short");
    FileRecord { compatible, data: 0x1000, token: Token(token) }
}

fn failure(error: impl std::error::Error) -> Failure {
    Failure(error.to_string())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |field| u64::from_le_bytes(*field))
}

/// The entry counts of all blocks of a chain.
fn counts(first: u64, memory: &SimulatedMemory) -> Vec<u64> {
    let mut counts = Vec::new();
    let mut page = memory.page(first);
    while let Some(block) = page {
        counts.push(u64_at(block, 8));
        page = memory.page(u64_at(block, 0));
    }
    counts
}

/// Encodes two sessions, changes a number in the first block, and decodes the result.
fn changed(at: usize, value: u64) -> Result<Handover, v5::Error> {
    let mut memory = SimulatedMemory::new();
    let ser = v5::encode(&handover(2, 2), &mut memory)?;
    if let Some(page) = memory.page_mut(u64_at(&ser, 16)) {
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    v5::decode(&ser, &memory)
}

fn rejected<T>(read: Result<T, v5::Error>) -> Outcome {
    same(read.is_err(), true)
}

pub(super) const ROWS: &[Row] = &[
    row(180, U, "sizes", |_| {
        same((SESSION_BYTES, FILE_BYTES, FLB_BYTES, v5::SER_BYTES), (80, 64, 64, 32))?;
        let requests = (size_of::<NamedSession>(), size_of::<TokenedFd>());
        same(requests, (72, 16))?;
        same((size_of::<Finish>(), size_of::<GetName>()), (8, 72))
    })
    .needing(&[Need::Trees]),
    row(181, U, "51 sessions fit in a block", |_| {
        for (sessions, blocks) in [(51, vec![51]), (52, vec![51, 1]), (102, vec![51, 51])] {
            let mut memory = SimulatedMemory::new();
            let ser = v5::encode(&handover(sessions, 0), &mut memory).map_err(failure)?;
            same(counts(u64_at(&ser, 16), &memory), blocks)?;
            let read = v5::decode(&ser, &memory).map_err(failure)?;
            same(read, handover(sessions, 0))?;
        }
        Ok(())
    })
    .needing(&[Need::Trees]),
    row(182, U, "63 files fit in a block", |_| {
        for (files, blocks) in [(63, vec![63]), (64, vec![63, 1])] {
            let mut memory = SimulatedMemory::new();
            let ser = v5::encode(&handover(1, files), &mut memory).map_err(failure)?;
            let session = memory.page(u64_at(&ser, 16)).ok_or(Errno::FAULT)?;
            same(counts(u64_at(session, 16 + 64), &memory), blocks)?;
        }
        Ok(())
    })
    .needing(&[Need::Trees]),
    row(183, U, "malformed chains are refused", |_| {
        rejected(changed(8, 0))?;
        rejected(changed(8, 52))?;
        let mut memory = SimulatedMemory::new();
        let ser = v5::encode(&handover(52, 0), &mut memory).map_err(failure)?;
        let first = u64_at(&ser, 16);
        if let Some(page) = memory.page_mut(first) {
            page[..8].copy_from_slice(&first.to_le_bytes());
        }
        rejected(v5::decode(&ser, &memory))?;
        rejected(v5::encode(&handover(510_001, 0), &mut SimulatedMemory::new()))
    })
    .needing(&[Need::Trees]),
    row(184, U, "another version, another length", |_| {
        let mut memory = SimulatedMemory::new();
        let mut ser = v5::encode(&handover(1, 1), &mut memory).map_err(failure)?;
        rejected(v5::decode(&ser[..31], &memory))?;
        ser[5] = b'4';
        rejected(v5::decode(&ser, &memory))
    })
    .needing(&[Need::Trees]),
    row(185, U, "a session has as many files as it says", |_| {
        rejected(changed(16 + 72, 1))?;
        rejected(changed(16 + 72, 3))
    })
    .needing(&[Need::Trees]),
    row(186, U, "a session without files", |_| {
        let mut memory = SimulatedMemory::new();
        let ser = v5::encode(&handover(1, 0), &mut memory).map_err(failure)?;
        let session = memory.page(u64_at(&ser, 16)).ok_or(Errno::FAULT)?;
        same((u64_at(session, 16 + 64), u64_at(session, 16 + 72)), (0, 0))?;
        same(v5::decode(&ser, &memory).map_err(failure)?, handover(1, 0))
    })
    .needing(&[Need::Trees]),
    row(187, U, "the seed's tree, and a number of 4 bytes", |_| {
        let mut memory = SimulatedMemory::new();
        let tree = v1::seed::encode(&handover(3, 2), &mut memory).map_err(failure)?;
        same(v1::seed::decode(&tree, &memory).map_err(failure)?, handover(3, 2))?;
        // Changes the length of the property with the number, the second property, from 8 to 4.
        let at = tree.windows(8).position(|w| w == [0, 0, 0, 3, 0, 0, 0, 8]).ok_or(Errno::NOENT)?;
        let mut short = tree;
        short.splice(at + 7..at + 16, [4, 0, 0, 0, 11, 0, 0, 0, 0]);
        short.drain(at + 16..at + 20);
        for field in [4, 12, 36] {
            let value = u32::from_be_bytes([0, 0, short[field + 2], short[field + 3]]) - 4;
            short[field..field + 4].copy_from_slice(&value.to_be_bytes());
        }
        let error = v1::seed::decode(&short, &memory).err().map(|error| error.to_string());
        same(error.as_deref(), Some("/: `liveupdate-number` has 4 bytes, not 8"))
    })
    .needing(&[Need::Trees]),
    row(188, U, "the seed has no room for 820 sessions or 129 files", |_| {
        for (sessions, files, fits) in
            [(819, 0, true), (820, 0, false), (1, 128, true), (1, 129, false)]
        {
            let written = v1::seed::encode(&handover(sessions, files), &mut SimulatedMemory::new());
            same(written.is_ok(), fits)?;
        }
        Ok(())
    })
    .needing(&[Need::Trees]),
    row(189, U, "an array of exactly 511 pages", |_| {
        let folio = |index| memfd::Folio { frame: 1 + index, dirty: true, uptodate: true, index };
        let folios = (0..511 * 256).map(folio).collect();
        let memfd = memfd::Memfd { position: 0, size: 511 << 20, seals: 0, folios };
        let mut memory = SimulatedMemory::new();
        let handle = memfd::encode(&memfd, &mut memory).map_err(failure)?;
        same(memfd::decode(handle, &memory).map_err(failure)? == memfd, true)?;
        let record = memory.page(handle).ok_or(Errno::FAULT)?;
        let chunk = memory.page(u64_at(record, 32)).ok_or(Errno::FAULT)?;
        let next = memory.page(u64_at(chunk, 0)).ok_or(Errno::FAULT)?;
        same(next.iter().all(|byte| *byte == 0), true)
    })
    .needing(&[Need::Trees]),
    row(190, U, "keys of preserved memory", |_| {
        for order in 0..=10 {
            for unit in [0, 1, 2, 0x1_2345, (1 << 40) - 1] {
                let run = Run { address: unit << (12 + order), order };
                same(run.to_key().and_then(Run::from_key), Some(run))?;
            }
        }
        Ok(())
    })
    .needing(&[Need::Trees]),
];
