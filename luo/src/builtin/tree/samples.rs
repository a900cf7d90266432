//! Handovers for the tests of all layouts: the golden one, generated ones, and those in page files.

use proptest::prelude::*;

use super::memory::{PAGE_BYTES, SimulatedMemory};
use super::{FileRecord, FlbRecord, Handover, SessionRecord};
use crate::Token;
use crate::builtin::label::{Compatible, Label, Name};

/// The contents of the golden trees. The seed's tree lacks the shared objects.
pub(super) fn golden() -> Handover {
    let file = |compatible, data, token| FileRecord {
        compatible: Compatible::new(compatible).unwrap(),
        data,
        token: Token(token),
    };
    let session = |name: &[u8], files| SessionRecord { name: Name::new(name).unwrap(), files };
    let flb = |compatible, data, count| FlbRecord {
        compatible: Compatible::new(compatible).unwrap(),
        data,
        count,
    };
    let web = vec![file("memfd-v2", 0x700_1000, 0), file("memfd-v2", 0x700_2000, 999)];
    Handover {
        number: 3,
        sessions: vec![
            session(b"web", web),
            session(b"empty", Vec::new()),
            session(b"a/\n\xff", vec![file("guest-memfd-v1", u64::MAX, u64::MAX)]),
        ],
        flbs: vec![flb("iommu-v1", 0x700_3000, 2), flb("map-v3", 0, 1)],
    }
}

/// The contents of the golden tree of the seed, which has no shared objects.
pub(super) fn golden_without_flbs() -> Handover {
    Handover { flbs: Vec::new(), ..golden() }
}

/// A handover of `sessions` sessions, each with `files` files.
pub(super) fn many(sessions: usize, files: usize) -> Handover {
    let name = |index| Name::new(format!("session-{index}")).unwrap();
    let file = |token: usize| FileRecord {
        compatible: Compatible::new("memfd-v2").unwrap(),
        data: 0x1000,
        token: Token(token as u64),
    };
    let session =
        |index| SessionRecord { name: name(index), files: (0..files).map(file).collect() };
    Handover { number: 1, sessions: (0..sessions).map(session).collect(), flbs: Vec::new() }
}

/// Reads a `.pages` file: each page follows its address.
pub(super) fn pages(image: &[u8]) -> SimulatedMemory {
    let mut memory = SimulatedMemory::new();
    let (pages, rest) = image.as_chunks::<{ 8 + PAGE_BYTES }>();
    assert!(rest.is_empty());
    for page in pages {
        let (address, bytes) = page.split_first_chunk().unwrap();
        memory.insert(u64::from_le_bytes(*address), bytes.try_into().unwrap());
    }
    memory
}

fn label<const N: usize>() -> impl Strategy<Value = Label<N>> {
    prop::collection::vec(1_u8..=255, 1..N).prop_map(|bytes| Label::new(bytes).unwrap())
}

/// Generates handovers of up to 4 sessions with up to 4 files each, and up to 2 shared objects.
pub(super) fn any_handover() -> impl Strategy<Value = Handover> {
    let file = (label(), any::<u64>(), any::<u64>())
        .prop_map(|(compatible, data, token)| FileRecord { compatible, data, token: Token(token) });
    let session = (label(), prop::collection::vec(file, 0..5))
        .prop_map(|(name, files)| SessionRecord { name, files });
    let flb = (label(), any::<u64>(), any::<u64>())
        .prop_map(|(compatible, data, count)| FlbRecord { compatible, data, count });
    let sessions = prop::collection::vec(session, 0..5);
    let flbs = prop::collection::vec(flb, 0..3);
    (any::<u64>(), sessions, flbs).prop_map(|(number, sessions, flbs)| Handover {
        number,
        sessions,
        flbs,
    })
}
