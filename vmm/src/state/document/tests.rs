//! Documents: what goes in comes out, and whatever else there is in the bytes is refused.

use std::io::Write;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;

/// A tree with every kind of value and a few levels.
fn sample() -> Node {
    let mut serial = Node::new("serial@3f8", &["perennial,serial-v2", "perennial,serial-v1"]);
    serial.put_u32("divisor", 12);
    serial.put_bool("input-full", true);
    serial.put_bytes("input", b"\x01hello");
    serial.put_bytes("nothing", &[]);
    let mut lapic = Node::new("lapic", &["perennial,lapic-v1"]);
    lapic.put_bytes("registers", &(0..=255).cycle().take(1024).collect::<Vec<u8>>());
    let mut vcpu = Node::new("vcpu@0", &["perennial,vcpu-x86-v1"]);
    vcpu.put_u64("tsc-offset", 0xffff_ffff_0000_0001);
    vcpu.put_u64s("msrs", &[0x10, 1 << 40, 0x174, u64::MAX]);
    vcpu.push(lapic);
    let mut root = Node::new("", &["perennial,vm-v1"]);
    root.put_str("vm-name", "a \"quoted\\\" name");
    root.push(vcpu);
    root.push(serial);
    root
}

fn damage(bytes: &[u8]) -> String {
    match decode(bytes) {
        Err(StateError::Damaged(problem)) => problem,
        other => panic!("not refused as damaged: {other:?}"),
    }
}

fn refusal(root: &Node) -> String {
    match encode(root) {
        Err(StateError::Encode(problem)) => problem,
        other => panic!("not refused: {other:?}"),
    }
}

/// An FDT of other making, with a right digest.
fn foreign(write: impl FnOnce(&mut FdtWriter)) -> Vec<u8> {
    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property(DIGEST_PROPERTY, &[0; 4]).unwrap();
    write(&mut fdt);
    fdt.end_node(root).unwrap();
    let mut bytes = fdt.finish().unwrap();
    reseal(&mut bytes);
    bytes
}

#[test]
fn a_tree_comes_back_as_it_was() {
    let bytes = encode(&sample()).unwrap();
    assert_eq!(decode(&bytes).unwrap(), sample());
    assert_eq!(encode(&sample()).unwrap(), bytes, "the same tree gives the same bytes");
}

#[test]
fn a_document_is_an_fdt_with_its_digest_in_front() {
    let bytes = encode(&sample()).unwrap();
    let fdt = Fdt::new(&bytes).unwrap();
    let first = fdt.root().properties().next().unwrap();
    assert_eq!(first.name(), "digest");
    assert_eq!(first.value(), &bytes[DIGEST_AT..][..4]);
    let mut zeroed = bytes.clone();
    zeroed[DIGEST_AT..][..4].fill(0);
    assert_eq!(first.value(), crc32fast::hash(&zeroed).to_be_bytes());
}

#[test]
fn check_counts_what_is_there() {
    let bytes = encode(&sample()).unwrap();
    let summary = check(&bytes).unwrap();
    assert_eq!((summary.bytes, summary.nodes, summary.properties), (bytes.len(), 4, 12));
    assert_eq!(summary.digest.to_be_bytes(), bytes[DIGEST_AT..][..4]);
    let text = summary.to_string();
    assert!(text.starts_with(&format!("{} bytes, 4 nodes, 12 properties, digest 0x", bytes.len())));
}

#[test]
fn every_cut_is_an_error() {
    let bytes = encode(&sample()).unwrap();
    for len in 0..bytes.len() {
        damage(&bytes[..len]);
    }
}

#[test]
fn bytes_behind_the_end_are_an_error_even_if_zero() {
    let mut bytes = encode(&sample()).unwrap();
    let len = bytes.len();
    bytes.push(0);
    assert_eq!(damage(&bytes), format!("its header says {len} bytes, there are {}", len + 1));
}

#[test]
fn every_flipped_bit_is_an_error() {
    let mut bytes = encode(&sample()).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            damage(&bytes);
            bytes[at] ^= 1 << bit;
        }
    }
}

/// With the digest made right again, only the one form of a document stands between a changed byte
/// and a restore. Values and names may change and still make a document; nothing else may.
#[test]
fn a_flip_under_a_right_digest_is_an_error_or_an_honest_other_document() {
    let bytes = encode(&sample()).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            reseal(&mut flipped);
            if flipped == bytes {
                continue;
            }
            match decode(&flipped) {
                Ok(other) => {
                    assert!(at >= STRUCTURE_AT, "byte {at} is of the header");
                    assert_ne!(other, sample(), "byte {at}, bit {bit} means nothing");
                }
                Err(StateError::Damaged(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn each_header_field_has_one_right_value() {
    let fields = [
        (0, "magic number"),
        (4, "header says"),
        (8, "structure offset"),
        (12, "strings offset"),
        (16, "reservation offset"),
        (20, "version"),
        (24, "oldest compatible version"),
        (28, "boot CPU"),
        (32, "end of the strings"),
        (36, "strings offset"),
        (40, "reserves memory"),
        (55, "reserves memory"),
    ];
    for (at, expected) in fields {
        let mut bytes = encode(&sample()).unwrap();
        bytes[at] ^= 0x40;
        reseal(&mut bytes);
        let problem = damage(&bytes);
        assert!(problem.contains(expected), "byte {at}: {problem}");
    }
}

#[test]
fn a_wrong_digest_names_both_sides() {
    let mut bytes = encode(&sample()).unwrap();
    let right = check(&bytes).unwrap().digest;
    bytes[DIGEST_AT + 3] ^= 1;
    let problem = damage(&bytes);
    assert!(problem.contains(&format!("{:#010x}", right ^ 1)), "{problem}");
    assert!(problem.contains(&format!("{right:#010x}")), "{problem}");
}

#[test]
fn duplicates_are_errors() {
    let twice = foreign(|fdt| {
        fdt.property("a", &[1]).unwrap();
        fdt.property("a", &[1]).unwrap();
    });
    assert_eq!(damage(&twice), "/: there are two properties `a`");
    let digests = foreign(|fdt| fdt.property(DIGEST_PROPERTY, &[0; 4]).unwrap());
    assert_eq!(damage(&digests), "/: there are two properties `digest`");

    let nodes = foreign(|fdt| {
        for _ in 0..2 {
            let node = fdt.begin_node("disk@1").unwrap();
            fdt.end_node(node).unwrap();
        }
    });
    assert!(damage(&nodes).contains("/disk@1: there are two nodes of this name"));
    let mut root = sample();
    root.children.push(Node::new("vcpu@0", &[]));
    assert_eq!(refusal(&root), "/vcpu@0: there are two nodes of this name");
}

#[test]
fn an_fdt_that_is_not_written_in_the_one_form_is_an_error() {
    let unsorted = foreign(|fdt| {
        fdt.property("b", &[1]).unwrap();
        fdt.property("a", &[1]).unwrap();
    });
    let problem = damage(&unsorted);
    assert!(problem.starts_with("it is not written as this build writes it: byte "), "{problem}");

    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u64("wide", 1).unwrap();
    fdt.end_node(root).unwrap();
    assert_eq!(damage(&fdt.finish().unwrap()), "its first property is not `digest`");

    let mut fdt = FdtWriter::new().unwrap();
    let root = fdt.begin_node("").unwrap();
    fdt.property_u32("checksum", 0).unwrap();
    fdt.end_node(root).unwrap();
    let mut bytes = fdt.finish().unwrap();
    reseal(&mut bytes);
    assert!(damage(&bytes).starts_with("it is not written as this build writes it"));
}

#[test]
fn names_that_an_fdt_cannot_carry_are_errors() {
    let long = "a".repeat(32);
    for name in ["", "@0", "disk@", "1disk", "disk@0@1", "disk 1", "disk/1", "dïsk", &long] {
        let mut root = sample();
        root.push(Node::new(name, &[]));
        assert!(refusal(&root).contains("a node cannot be called"), "{name}");
    }
    for name in ["", "two words", "a@b", "a/b", "ümlaut", "name", "phandle", &long] {
        let mut root = sample();
        root.children[0].properties.insert(name.to_owned(), vec![]);
        assert_eq!(refusal(&root), format!("/vcpu@0: a property cannot be called `{name}`"));
    }
    let mut named = sample();
    named.name = "vm".to_owned();
    assert_eq!(refusal(&named), "the root is called `vm`, its name must be empty");
    let mut sealed = sample();
    sealed.put_u32(DIGEST_PROPERTY, 0);
    assert_eq!(refusal(&sealed), "/: `digest` is the document's own");
}

fn nested(depth: usize) -> Node {
    (1..depth).fold(Node::new("leaf", &[]), |inner, _| {
        let mut outer = Node::new("level", &[]);
        outer.push(inner);
        outer
    })
}

#[test]
fn a_tree_may_be_only_so_deep() {
    let mut root = nested(MAX_DEPTH);
    root.name.clear();
    assert_eq!(decode(&encode(&root).unwrap()).unwrap(), root);
    let mut root = nested(MAX_DEPTH + 1);
    root.name.clear();
    assert!(refusal(&root).ends_with("leaf: it is 17 nodes deep, the most is 16"));

    let deep = foreign(|fdt| {
        let levels: Vec<_> = (1..=MAX_DEPTH).map(|_| fdt.begin_node("level").unwrap()).collect();
        levels.into_iter().rev().for_each(|node| fdt.end_node(node).unwrap());
    });
    assert!(damage(&deep).ends_with("it is 17 nodes deep, the most is 16"));
}

/// Deeper than `vm-fdt` writes: a stack would overflow before a bound on the tree could tell.
#[test]
fn a_million_open_nodes_are_an_error() {
    let mut bytes = encode(&sample()).unwrap()[..DIGEST_AT + 4].to_vec();
    for _ in 0..1_000_000 {
        bytes.extend_from_slice(&[0, 0, 0, 1, b'a', 0, 0, 0]);
    }
    for _ in 0..=1_000_000 {
        bytes.extend_from_slice(&[0, 0, 0, 2]);
    }
    bytes.extend_from_slice(&[0, 0, 0, 9]);
    finish_by_hand(&mut bytes);
    assert!(damage(&bytes).contains("it is 17 nodes deep"), "{}", damage(&bytes));
}

/// Adds the strings block and corrects the header.
fn finish_by_hand(bytes: &mut Vec<u8>) {
    let strings_at = bytes.len();
    bytes.extend_from_slice(b"digest\0");
    let total = bytes.len();
    for (field, value) in [(1, total), (3, strings_at), (8, 7), (9, strings_at - STRUCTURE_AT)] {
        bytes[field * 4..][..4].copy_from_slice(&(value as u32).to_be_bytes());
    }
    reseal(bytes);
}

#[test]
fn there_may_be_only_so_many_nodes_properties_and_bytes() {
    let mut root = Node::new("", &[]);
    for index in 1..MAX_NODES {
        root.children.push(Node::new(&format!("n@{index}"), &[]));
    }
    assert_eq!(check(&encode(&root).unwrap()).unwrap().nodes, MAX_NODES);
    root.children.push(Node::new("straw", &[]));
    assert_eq!(refusal(&root), format!("/straw: it is one node more than {MAX_NODES}, the most"));

    let mut root = Node::new("", &[]);
    for index in 0..MAX_PROPERTIES {
        root.properties.insert(format!("p{index}"), vec![]);
    }
    assert!(refusal(&root).ends_with(&format!("is one more than {MAX_PROPERTIES}, the most")));

    let mut root = Node::new("", &[]);
    root.put_bytes("blob", &vec![1; MAX_BYTES]);
    assert!(refusal(&root).ends_with(&format!("the most is {MAX_BYTES}")));
    let problem = damage(&vec![0; MAX_BYTES + 1]);
    assert_eq!(problem, format!("it has {} bytes, the most is {MAX_BYTES}", MAX_BYTES + 1));
}

#[test]
fn a_tree_is_shown_as_device_tree_source() {
    let expected = r#"/dts-v1/;

/ {
	compatible = "perennial,vm-v1";
	vm-name = "a \"quoted\\\" name";

	vcpu@0 {
		compatible = "perennial,vcpu-x86-v1";
		msrs = <0x0 0x10 0x100 0x0 0x0 0x174 0xffffffff 0xffffffff>;
		tsc-offset = <0xffffffff 0x1>;

		lapic {
			compatible = "perennial,lapic-v1";
			registers = [00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f /* and 1008 more bytes */];
		};
	};

	serial@3f8 {
		compatible = "perennial,serial-v2", "perennial,serial-v1";
		divisor = <0xc>;
		input = [01 68 65 6c 6c 6f];
		input-full = <0x1>;
		nothing;
	};
};
"#;
    assert_eq!(show(&sample(), Detail::Brief), expected);
    assert!(show(&sample(), Detail::Full).contains("0e 0f 10 11"));
}

/// Runs `dtc`, or says why it does not.
fn dtc(from: &str, to: &str, input: &[u8]) -> Option<Vec<u8>> {
    let spawned = Command::new("dtc")
        .args(["-q", "-I", from, "-O", to])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            eprintln!("skipped: dtc (package device-tree-compiler) cannot be run: {error}");
            return None;
        }
    };
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "dtc: {}", output.status);
    Some(output.stdout)
}

#[test]
fn dtc_reads_a_document() {
    let Some(text) = dtc("dtb", "dts", &encode(&sample()).unwrap()) else { return };
    let text = String::from_utf8(text).unwrap();
    for part in ["digest = <0x", "serial@3f8 {", "vm-name = \"a \\\"quoted\\\\\\\" name\";"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn dtc_makes_the_same_tree_of_what_is_shown() {
    let Some(blob) = dtc("dts", "dtb", show(&sample(), Detail::Full).as_bytes()) else { return };
    let tree = Collector::default().node(&Fdt::new(&blob).unwrap().root(), "").unwrap();
    assert_eq!(tree, sample());
}

fn any_value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80),
        any::<u32>().prop_map(|cell| cell.to_be_bytes().to_vec()),
        "[ -~]{1,20}".prop_map(|text| [text.as_bytes(), &[0]].concat()),
    ]
}

fn any_node(name: impl Strategy<Value = String> + Clone + 'static) -> BoxedStrategy<Node> {
    let properties = prop::collection::btree_map("p[a-z0-9-]{0,20}", any_value(), 0..5);
    (name, properties)
        .prop_map(|(name, properties)| Node { name, properties, children: vec![] })
        .prop_recursive(4, 24, 4, |inner| {
            (inner.clone(), prop::collection::btree_map("[a-z]{1,9}(@[0-9a-f]{1,4})?", inner, 0..4))
                .prop_map(|(mut node, children)| {
                    node.children =
                        children.into_iter().map(|(name, child)| Node { name, ..child }).collect();
                    node
                })
        })
        .prop_map(|mut root| {
            root.name.clear();
            root
        })
        .boxed()
}

proptest! {
    #[test]
    fn any_tree_comes_back_as_it_was(root in any_node(Just(String::new()))) {
        prop_assert_eq!(decode(&encode(&root).unwrap()).unwrap(), root);
    }

    /// The mutations get a right digest, so that they reach the parser.
    #[test]
    fn mutations_never_panic_and_never_pass_as_what_they_are_not(
        root in any_node(Just(String::new())),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = encode(&root).unwrap();
        for (at, value) in edits {
            // Small values make tokens and short lengths more likely than noise does.
            let at = at.index(bytes.len());
            bytes[at] = if value < 128 { value % 16 } else { value };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(8));
            let total = u32::try_from(bytes.len()).unwrap();
            bytes[4..8].copy_from_slice(&total.to_be_bytes());
        }
        reseal(&mut bytes);
        if let Ok(other) = decode(&bytes) {
            prop_assert_eq!(encode(&other).unwrap(), bytes);
        }
    }

    #[test]
    fn noise_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode(&bytes).is_err());
        if bytes.len() >= 80 {
            let header = encode(&Node::new("", &[])).unwrap();
            bytes[..80].copy_from_slice(&header[..80]);
            let total = u32::try_from(bytes.len()).unwrap();
            bytes[4..8].copy_from_slice(&total.to_be_bytes());
            reseal(&mut bytes);
            let _ = decode(&bytes);
        }
    }
}
