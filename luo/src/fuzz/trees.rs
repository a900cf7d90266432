//! Handover trees: what is read is written again and means the same.

use std::collections::BTreeSet;

use perennial_fuzz::Script;

use super::with_digest;
use crate::Errno;
use crate::builtin::scripted::Script as Handlers;
use crate::builtin::tree::memory::{PAGE_BYTES, SimulatedMemory};
use crate::builtin::tree::{Handover, v1, v5};
use crate::builtin::{Luo, Parameters};

/// Where the digest is in every tree that is right: behind the header, an empty list of reservations,
/// the root's beginning, and two properties.
const V1_DIGEST_AT: usize = 40 + 16 + 8 + 20 + 20 + 12;

/// Reads a tree of the built-in LUO. It has one form; and a kernel can live with it.
pub fn tree_v1(input: &[u8]) {
    for bytes in with_digest(input, V1_DIGEST_AT) {
        if let Ok(handover) = v1::decode(&bytes) {
            assert_eq!(v1::encode(&handover).unwrap(), bytes);
            live_with(&handover, bytes);
        }
    }
}

/// Starts a kernel on a tree, retrieves all there is, and goes on to the next kernel.
fn live_with(handover: &Handover, tree: Vec<u8>) {
    let handlers = Handlers::new();
    let mut luo = Luo::start(Parameters::default(), || Ok(tree));
    assert_eq!(luo.disabled(), None);
    assert_eq!(luo.liveupdate_number(), handover.number);
    let files = || handover.sessions.iter().flat_map(|session| &session.files);
    for format in files().map(|file| file.compatible).collect::<BTreeSet<_>>() {
        luo.register_handler(handlers.handler(format, &[1], true)).unwrap();
    }
    if luo.open_device().is_err() {
        assert_eq!(luo.deserialize_error(), Some(Errno::EXIST), "two of one name, or one token");
        return;
    }
    for session in &handover.sessions {
        let id = luo.retrieve_session(&session.name.to_field(), |_| Ok(())).unwrap();
        for file in &session.files {
            let retrieved = luo.retrieve_fd(id, file.token).unwrap();
            assert_eq!(retrieved.object, file.data as u32);
        }
        luo.finish(id).unwrap();
        luo.close_session(id).unwrap();
    }
    let answer = luo.reboot(|_| Ok(()));
    assert_eq!(answer, Ok(()));
}

/// Memory as a script has it: pages as an address (u64) and what they begin with (a long piece).
fn memory(script: &mut Script<'_>) -> SimulatedMemory {
    let mut memory = SimulatedMemory::new();
    while !script.is_at_end() {
        let (address, begins) = (script.u64(), script.long_piece());
        let mut page = [0; PAGE_BYTES];
        page.iter_mut().zip(begins).for_each(|(byte, is)| *byte = *is);
        memory.insert(address, page);
    }
    memory
}

/// Reads a tree of the first LUO: a long piece, and the memory that it points into.
pub fn tree_seed(input: &[u8]) {
    let mut script = Script::new(input);
    let tree = script.long_piece();
    let memory = memory(&mut script);
    if let Ok(handover) = v1::seed::decode(tree, &memory) {
        let mut memory = SimulatedMemory::new();
        let tree = v1::seed::encode(&handover, &mut memory).unwrap();
        assert_eq!(v1::seed::decode(&tree, &memory), Ok(handover));
    }
}

/// Reads what Linux 7.3 leaves: a piece, and the memory that it points into. Every page is also read
/// as a memfd's.
pub fn tree_v5(input: &[u8]) {
    let mut script = Script::new(input);
    let blob = script.piece();
    let memory = memory(&mut script);
    if let Ok(handover) = v5::decode(blob, &memory) {
        let mut memory = SimulatedMemory::new();
        let blob = v5::encode(&handover, &mut memory).unwrap();
        assert_eq!(v5::decode(&blob, &memory), Ok(handover));
    }
    for (address, _) in memory.pages() {
        if let Ok(memfd) = v5::memfd::decode(address, &memory) {
            let mut memory = SimulatedMemory::new();
            let handle = v5::memfd::encode(&memfd, &mut memory).unwrap();
            assert_eq!(v5::memfd::decode(handle, &memory), Ok(memfd));
        }
    }
}
