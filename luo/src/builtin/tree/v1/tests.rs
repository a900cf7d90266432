//! Tests of both forms of `luo-v1`: golden trees, round trips, and every kind of damage.

use proptest::prelude::*;

use super::*;
use crate::builtin::tree::memory::SimulatedMemory;
use crate::builtin::tree::samples::{any_handover, golden, golden_without_flbs, many, pages};

const INLINE: &[u8] = include_bytes!("../../../../golden/luo-v1-inline.dtb");
const SEED: &[u8] = include_bytes!("../../../../golden/luo-v1-seed.dtb");
const SEED_PAGES: &[u8] = include_bytes!("../../../../golden/luo-v1-seed.pages");

/// A tree with a valid digest and any contents, as an attacker would write it.
fn tree(write: impl Fn(&mut FdtWriter, u32) -> vm_fdt::FdtWriterResult<()>) -> Vec<u8> {
    let fdt = |digest| {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        write(&mut fdt, digest).unwrap();
        fdt.end_node(root).unwrap();
        fdt.finish().unwrap()
    };
    fdt(crc32fast::hash(&fdt(0)))
}

/// A tree with a valid root, and a session node with the contents that `write` writes.
fn session_tree(write: impl Fn(&mut FdtWriter) -> vm_fdt::FdtWriterResult<()>) -> Vec<u8> {
    tree(|fdt, digest| {
        fdt.property_string("compatible", COMPATIBLE)?;
        fdt.property(NUMBER, &1_u64.to_le_bytes())?;
        fdt.property_u32(DIGEST, digest)?;
        let node = fdt.begin_node(SESSION_NODE)?;
        write(fdt)?;
        fdt.end_node(node)
    })
}

/// A tree with these values of `luo-session-header` and `luo-files`, and otherwise valid.
fn records_tree(header: &[u8], files: &[u8]) -> Vec<u8> {
    session_tree(|fdt| {
        fdt.property_string("compatible", SESSION_COMPATIBLE)?;
        fdt.property(SESSION_HEADER, header)?;
        fdt.property(FILES, files)
    })
}

fn message(bytes: &[u8]) -> String {
    decode(bytes).unwrap_err().to_string()
}

#[test]
fn the_golden_tree_is_decoded_and_encoded_again_to_the_same_bytes() {
    assert_eq!(decode(INLINE).unwrap(), golden());
    assert_eq!(encode(&golden()).unwrap(), INLINE);
}

#[test]
fn the_golden_tree_of_the_seed_is_decoded() {
    let handover = seed::decode(SEED, &pages(SEED_PAGES)).unwrap();
    assert_eq!(handover, golden_without_flbs());
}

#[test]
fn neither_form_is_mistaken_for_the_other() {
    let error = decode(SEED).unwrap_err();
    assert_eq!(error, Error::MissingProperty { path: "/".to_owned(), property: DIGEST });
    let error = seed::decode(INLINE, &pages(SEED_PAGES)).unwrap_err().to_string();
    assert_eq!(error, "/: the tree has a property `digest`, which this build does not know");
}

#[test]
fn every_prefix_is_an_error_and_so_is_a_byte_too_many() {
    for length in 0..INLINE.len() {
        assert!(decode(&INLINE[..length]).is_err(), "{length} bytes");
    }
    assert!(decode(&[INLINE, &[0]].concat()).is_err());
}

#[test]
fn every_flipped_byte_is_an_error() {
    for at in 0..INLINE.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = INLINE.to_vec();
            bytes[at] ^= flip;
            assert!(decode(&bytes).is_err(), "byte {at} ^ {flip:#x}");
        }
    }
}

#[test]
fn every_flipped_byte_of_the_seed_is_an_error_or_another_tree() {
    let memory = pages(SEED_PAGES);
    let mut unused = Vec::new();
    for at in 0..SEED.len() {
        let mut bytes = SEED.to_vec();
        bytes[at] ^= 0x01;
        match seed::decode(&bytes, &memory) {
            Err(_) => {}
            Ok(same) if same == golden_without_flbs() => unused.push(at),
            Ok(other) => {
                // There is no digest: a flipped byte of the number is not detected.
                assert_eq!(other.sessions, golden().sessions, "byte {at}");
                assert_ne!(other.number, golden().number, "byte {at}");
            }
        }
    }
    // In the FDT header: bytes of `version`, `last_comp_version` and `boot_cpuid_phys`. In the
    // nodes: padding after names and values.
    assert_eq!(unused, [20, 21, 22, 27, 28, 29, 30, 31, 61, 62, 63, 83, 147]);
}

#[test]
fn missing_and_unknown_properties_are_named_with_their_path() {
    let compatible = |fdt: &mut FdtWriter| fdt.property_string("compatible", COMPATIBLE);
    assert_eq!(message(&tree(|_, _| Ok(()))), "/: the tree has no property `compatible`");
    assert_eq!(
        message(&tree(|fdt, _| fdt.property_string("compatible", "luo-v2"))),
        "/: the tree is `luo-v2`, this build knows `luo-v1`"
    );
    assert_eq!(
        message(&tree(|fdt, _| compatible(fdt))),
        "/: the tree has no property `liveupdate-number`"
    );
    let short = tree(|fdt, _| {
        compatible(fdt)?;
        fdt.property_u32(NUMBER, 1)
    });
    assert_eq!(message(&short), "/: `liveupdate-number` has 4 bytes, not 8");
    assert_eq!(
        message(&session_tree(|fdt| fdt.property_string("compatible", "luo-session-v2"))),
        "/luo-session: the tree is `luo-session-v2`, this build knows `luo-session-v2-inline`"
    );
    let leftover = session_tree(|fdt| {
        fdt.property_string("compatible", SESSION_COMPATIBLE)?;
        fdt.property(SESSION_HEADER, &[0; 8])?;
        fdt.property(FILES, &[])?;
        fdt.property_null("luo-colour")
    });
    assert_eq!(
        message(&leftover),
        "/luo-session: the tree has a property `luo-colour`, which this build does not know"
    );
}

#[test]
fn nodes_that_are_missing_doubled_or_unknown_are_named_with_their_path() {
    let root = |fdt: &mut FdtWriter, digest, nodes: &[&str]| {
        fdt.property_string("compatible", COMPATIBLE)?;
        fdt.property(NUMBER, &1_u64.to_le_bytes())?;
        fdt.property_u32(DIGEST, digest)?;
        for name in nodes {
            let node = fdt.begin_node(name)?;
            fdt.property_string("compatible", SESSION_COMPATIBLE)?;
            fdt.property(SESSION_HEADER, &[0; 8])?;
            fdt.property(FILES, &[])?;
            fdt.end_node(node)?;
        }
        Ok(())
    };
    let with = |nodes: &[&str]| tree(|fdt, digest| root(fdt, digest, nodes));
    decode(&with(&[SESSION_NODE])).unwrap();
    assert_eq!(message(&with(&[])), "/luo-session: the tree has no such node");
    assert_eq!(
        message(&with(&[SESSION_NODE, SESSION_NODE])),
        "/: the tree has two of `luo-session`"
    );
    assert_eq!(
        message(&with(&[SESSION_NODE, "luo-colour"])),
        "/luo-colour: the tree has this node, which this build does not know"
    );
}

#[test]
fn a_property_that_occurs_twice_is_an_error() {
    let twice = session_tree(|fdt| {
        fdt.property_string("compatible", SESSION_COMPATIBLE)?;
        fdt.property(FILES, &[])?;
        fdt.property(FILES, &[])
    });
    assert_eq!(message(&twice), "/luo-session: the tree has two of `luo-files`");
}

#[test]
fn counts_that_do_not_match_the_records_are_errors() {
    let entry = |files, count| SessionEntry {
        name: crate::builtin::Name::new("web").unwrap(),
        files,
        count,
    };
    let header = |count: u64, entries: &[SessionEntry]| -> Vec<u8> {
        let entries = entries.iter().flat_map(|entry| entry.to_bytes());
        count.to_le_bytes().into_iter().chain(entries).collect()
    };
    let file = golden().sessions[0].files[0].to_bytes();
    decode(&records_tree(&header(1, &[entry(1, 1)]), &file)).unwrap();

    let wrong = |header: &[u8], files: &[u8]| message(&records_tree(header, files));
    let huge = header(u64::MAX, &[entry(1, 1)]);
    assert_eq!(
        wrong(&huge, &file),
        "/luo-session: `luo-session-header` has 88 bytes, not 18446744073709551615"
    );
    assert_eq!(wrong(&[0; 7], &[]), "/luo-session: `luo-session-header` has 7 bytes, not 8");
    let none = header(1, &[entry(1, u64::MAX)]);
    assert!(wrong(&none, &file).starts_with("/luo-session: `luo-files` has 64 bytes, not 1844"));
    let one = header(1, &[entry(1, 1)]);
    assert_eq!(wrong(&one, &file[1..]), "/luo-session: `luo-files` has 63 bytes, not 64");
    let elsewhere = header(1, &[entry(2, 1)]);
    assert_eq!(
        wrong(&elsewhere, &file),
        "/luo-session: the record of session `web` puts its files at 2, but they are at 1"
    );
    let nameless = header(1, &[entry(1, 1)]);
    assert_eq!(
        wrong(&nameless, &[0; 64]),
        "/luo-session: record 0 of `luo-files` is damaged: its name must be 1 to 47 bytes, then a \
         NUL"
    );
    let stale = [&header(1, &[])[..], b"web\0stale", &[0; 71]].concat();
    assert!(matches!(decode(&records_tree(&stale, &[])), Err(Error::Damaged { .. })));
}

#[test]
fn the_seed_has_room_for_819_sessions_of_128_files() {
    assert_eq!((seed::MAX_SESSIONS, seed::MAX_FILES), (819, 128));
    let mut memory = SimulatedMemory::new();
    let full = many(819, 128);
    let bytes = seed::encode(&full, &mut memory).unwrap();
    assert_eq!(seed::decode(&bytes, &memory).unwrap(), full);
    for (handover, says) in [
        (many(820, 0), "/luo-session: there are 820 sessions, the most is 819"),
        (many(1, 129), "/luo-session: there are 129 files, the most is 128"),
    ] {
        let error = seed::encode(&handover, &mut SimulatedMemory::new()).unwrap_err();
        assert_eq!(error.to_string(), says);
    }
    let error = seed::encode(&golden(), &mut SimulatedMemory::new()).unwrap_err();
    assert!(matches!(error, Error::Encode { .. }));
}

#[test]
fn the_seed_form_rejects_invalid_addresses_and_counts() {
    let error = seed::decode(SEED, &SimulatedMemory::new()).unwrap_err();
    let says = "/luo-session: there is no memory at 0x10000000 for sessions";
    assert_eq!(error.to_string(), says);
    let mut memory = pages(SEED_PAGES);
    let mut page = [0; 4096];
    page[..8].copy_from_slice(&820_u64.to_le_bytes());
    memory.insert(0x1000_0000, page);
    assert!(matches!(seed::decode(SEED, &memory), Err(Error::TooMany { .. })));
    page[..8].copy_from_slice(&1_u64.to_le_bytes());
    page[8..88].copy_from_slice(
        &SessionEntry { name: golden().sessions[0].name, files: 0x123, count: 1 }.to_bytes(),
    );
    memory.insert(0x1000_0000, page);
    assert!(matches!(seed::decode(SEED, &memory), Err(Error::Address { address: 0x123, .. })));
}

proptest! {
    #[test]
    fn decoding_returns_what_was_encoded(handover in any_handover()) {
        let bytes = encode(&handover).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap(), handover);
    }

    #[test]
    fn the_seed_form_decodes_what_it_encodes(handover in any_handover()) {
        let handover = Handover { flbs: Vec::new(), ..handover };
        let mut memory = SimulatedMemory::new();
        let bytes = seed::encode(&handover, &mut memory).unwrap();
        prop_assert_eq!(seed::decode(&bytes, &memory).unwrap(), handover);
    }

    #[test]
    fn random_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn damage_is_an_error(
        handover in any_handover(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
    ) {
        let good = encode(&handover).unwrap();
        let mut bytes = good.clone();
        for (at, flip) in damage {
            bytes[at.index(good.len())] ^= flip;
        }
        prop_assume!(bytes != good);
        prop_assert!(decode(&bytes).is_err());
    }
}
