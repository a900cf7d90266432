//! Handover trees: a decoded tree is encoded again, and must keep its meaning.

use std::collections::BTreeSet;

use perennial_fuzz::Script;

use super::with_digest;
use crate::Errno;
use crate::builtin::scripted::Script as Handlers;
use crate::builtin::tree::memory::{PAGE_BYTES, SimulatedMemory};
use crate::builtin::tree::{Handover, v1, v5};
use crate::builtin::{Luo, Parameters};

/// Offset of the digest in every valid tree, in bytes: after the header, an empty list of
/// reservations, the start of the root node, and two properties.
const V1_DIGEST_AT: usize = 40 + 16 + 8 + 20 + 20 + 12;

/// Decodes a tree of the built-in LUO. Encoding it again must give the same bytes, and a kernel
/// must start with it.
pub fn tree_v1(input: &[u8]) {
    for bytes in with_digest(input, V1_DIGEST_AT) {
        if let Ok(handover) = v1::decode(&bytes) {
            assert_eq!(v1::encode(&handover).unwrap(), bytes);
            start_kernel(&handover, bytes);
        }
    }
}

/// Starts a kernel with a tree, retrieves and finishes all sessions, and reboots.
fn start_kernel(handover: &Handover, tree: Vec<u8>) {
    let handlers = Handlers::new();
    let mut luo = Luo::start(Parameters::default(), || Ok(tree));
    assert_eq!(luo.disabled(), None);
    assert_eq!(luo.liveupdate_number(), handover.number);
    let files = || handover.sessions.iter().flat_map(|session| &session.files);
    for format in files().map(|file| file.compatible).collect::<BTreeSet<_>>() {
        luo.register_handler(handlers.handler(format, &[1], true)).unwrap();
    }
    if luo.open_device().is_err() {
        assert_eq!(
            luo.deserialize_error(),
            Some(Errno::EXIST),
            "an error without two of one name or token"
        );
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

/// Reads pages from a script: each is an address (u64) and the first bytes of the page (a long
/// piece).
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

/// Decodes a tree of the seed (the first LUO). The input is the tree, a long piece, and the memory
/// that the tree points to.
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

/// Decodes a handover of Linux 7.3. The input is the handover, a piece, and the memory that it
/// points to. Every page is also decoded as the record of a memfd.
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
