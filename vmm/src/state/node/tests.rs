//! The reader's strictness, and a state type that shows the contract tests at work.

use super::*;
use crate::state::contract::contract_tests;
use crate::state::document::{encode, read_document};

/// A part with every kind of property and of child.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SampleState {
    byte: u8,
    cell: u32,
    wide: u64,
    flag: bool,
    name: String,
    tags: Vec<String>,
    counters: Vec<u64>,
    registers: [u8; 6],
    extra: Option<Vec<u8>>,
    core: InnerState,
    spare: Option<InnerState>,
    lines: Vec<(String, InnerState)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct InnerState {
    level: u32,
}

impl Schema for InnerState {
    const COMPATIBLE: &'static [&'static str] = &["perennial,inner-v1"];

    fn encode(&self, node: &mut Node) {
        let Self { level } = self;
        node.put_u32("level", *level);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self { level: reader.u32("level")? })
    }
}

impl Schema for SampleState {
    const COMPATIBLE: &'static [&'static str] = &["perennial,sample-v2", "perennial,sample-v1"];

    fn encode(&self, node: &mut Node) {
        let Self {
            byte,
            cell,
            wide,
            flag,
            name,
            tags,
            counters,
            registers,
            extra,
            core,
            spare,
            lines,
        } = self;
        node.put_u32("byte", (*byte).into());
        node.put_u32("cell", *cell);
        node.put_u64("wide-ns", *wide);
        node.put_bool("flag", *flag);
        node.put_str("label", name);
        node.put_strings("tags", &tags.iter().map(String::as_str).collect::<Vec<_>>());
        node.put_u64s("counters", counters);
        node.put_bytes("registers", registers);
        if let Some(extra) = extra {
            node.put_bytes("extra", extra);
        }
        node.push(core.to_node("core"));
        if let Some(spare) = spare {
            node.push(spare.to_node("spare"));
        }
        for (address, line) in lines {
            node.push(line.to_node(&format!("line@{address}")));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(Self {
            byte: reader.narrow("byte")?,
            cell: reader.u32("cell")?,
            wide: reader.u64("wide-ns")?,
            flag: reader.bool("flag")?,
            name: reader.str("label")?,
            tags: reader.strings("tags")?,
            counters: reader.u64s("counters")?,
            registers: reader.array("registers")?,
            extra: reader.optional_bytes("extra").map(<[u8]>::to_vec),
            core: reader.child("core")?,
            spare: reader.optional_child("spare")?,
            lines: reader.children("line")?,
        })
    }
}

fn sample() -> SampleState {
    SampleState {
        byte: 0x5a,
        cell: 0x1234_5678,
        wide: 0x0123_4567_89ab_cdef,
        flag: true,
        name: "sample".to_owned(),
        tags: vec!["one".to_owned(), "two".to_owned()],
        counters: vec![1, u64::MAX],
        registers: [1, 2, 3, 4, 5, 6],
        extra: Some(vec![9, 8, 7]),
        core: InnerState { level: 3 },
        spare: Some(InnerState { level: 4 }),
        lines: vec![
            ("0".to_owned(), InnerState { level: 5 }),
            ("a,1".to_owned(), InnerState { level: 6 }),
        ],
    }
}

contract_tests! {
    SampleState,
    sample: sample,
    changes: [
        |s| s.byte = 0,
        |s| s.cell = 0,
        |s| s.wide += 1,
        |s| s.flag = false,
        |s| s.name.clear(),
        |s| s.tags.push(String::new()),
        |s| s.counters.clear(),
        |s| s.registers[5] = 0,
        |s| s.extra = None,
        |s| s.core.level = 0,
        |s| s.spare = None,
        |s| s.lines[1].1.level = 0,
        |s| s.lines.swap(0, 1),
        |s| s.lines.clear(),
    ],
    optional: ["/:extra"],
    golden: "sample-v2",
}

/// The root of [`sample`] with one property replaced.
fn with(property: &str, value: &[u8]) -> Result<SampleState, StateError> {
    let mut root = sample().to_node("");
    root.properties.insert(property.to_owned(), value.to_vec());
    read_document(&encode(&root).unwrap())
}

fn problem_with(property: &str, value: &[u8]) -> String {
    match with(property, value) {
        Err(StateError::Invalid { path, property: named, problem }) => {
            assert_eq!((path.as_str(), named.as_str()), ("/", property));
            problem
        }
        other => panic!("{property} = {value:?}: {other:?}"),
    }
}

#[test]
fn wrong_lengths_name_both_sides() {
    assert_eq!(problem_with("cell", &[0; 5]), "it has 5 bytes, the binding says 4");
    assert_eq!(problem_with("wide-ns", &[]), "it has 0 bytes, the binding says 8");
    assert_eq!(problem_with("registers", &[0; 7]), "it has 7 bytes, the binding says 6");
    assert_eq!(problem_with("counters", &[0; 12]), "12 bytes are not a list of 64-bit values");
}

#[test]
fn values_out_of_range_are_errors() {
    assert_eq!(problem_with("byte", &256u32.to_be_bytes()), "256 is out of range");
    assert_eq!(problem_with("flag", &2u32.to_be_bytes()), "2 is neither 0 nor 1");
}

#[test]
fn strings_must_be_terminated_text_and_as_many_as_asked_for() {
    assert_eq!(problem_with("label", b""), "the string is not terminated");
    assert_eq!(problem_with("label", b"sample"), "the string is not terminated");
    assert_eq!(problem_with("label", b"\xff\0"), "the string is not UTF-8");
    assert_eq!(problem_with("label", b"one\0two\0"), "2 strings, not one");
    assert_eq!(problem_with("tags", b"one"), "the string is not terminated");
    assert_eq!(with("label", b"\0").unwrap().name, "");
}

#[test]
fn errors_inside_children_name_the_child() {
    let mut root = sample().to_node("");
    root.children.last_mut().unwrap().properties.insert("level".to_owned(), vec![1]);
    let error = read_document::<SampleState>(&encode(&root).unwrap()).unwrap_err();
    let expected = "/line@a,1: property `level`: it has 1 bytes, the binding says 4";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_missing_child_is_named() {
    let mut root = sample().to_node("");
    root.children.retain(|child| child.name != "core");
    let error = read_document::<SampleState>(&encode(&root).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "/: child node `core` is missing");
}

#[test]
fn an_older_binding_of_the_list_is_read() {
    let mut root = sample().to_node("");
    root.properties.insert("compatible".to_owned(), b"perennial,sample-v1\0".to_vec());
    assert_eq!(read_document::<SampleState>(&encode(&root).unwrap()).unwrap(), sample());
    let reader = Reader::new(&root, "/").unwrap();
    assert!(reader.is_compatible("perennial,sample-v1"));
    assert!(!reader.is_compatible("perennial,sample-v2"));
}

#[test]
fn incompatible_names_both_sides() {
    let mut root = sample().to_node("");
    root.properties.insert("compatible".to_owned(), b"perennial,other-v1\0other\0".to_vec());
    let error = read_document::<SampleState>(&encode(&root).unwrap()).unwrap_err();
    let expected = "/: the document has `perennial,other-v1`, `other`, this build knows \
                    `perennial,sample-v2`, `perennial,sample-v1`";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn what_was_read_once_cannot_be_read_again() {
    let root = sample().to_node("");
    let mut reader = Reader::new(&root, "/").unwrap();
    reader.u32("cell").unwrap();
    let again = StateError::MissingProperty { path: "/".into(), property: "cell".into() };
    assert_eq!(reader.u32("cell"), Err(again));
}

#[test]
fn children_of_a_prefix_do_not_include_other_names() {
    let mut root = Node::new("", &["perennial,list-v1"]);
    for name in ["line@0", "lines@0", "line", "line@1"] {
        root.push(InnerState { level: 1 }.to_node(name));
    }
    let mut reader = Reader::new(&root, "/").unwrap();
    let taken = reader.children::<InnerState>("line").unwrap();
    let addresses: Vec<_> = taken.iter().map(|(address, _)| address.as_str()).collect();
    assert_eq!(addresses, ["0", "1"]);
    let leftover = reader.finish().unwrap_err().to_string();
    assert_eq!(leftover, "/: the document has a node `lines@0`, which this build does not know");
}

/// A contract test that cannot fail proves nothing: each must notice a state type that breaks it.
mod the_contract_notices {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::state::contract;

    thread_local! {
        static FAULT: Cell<&'static str> = const { Cell::new("") };
    }

    #[derive(Debug, Clone, PartialEq)]
    struct Faulty {
        first: u32,
        second: u32,
    }

    impl Schema for Faulty {
        const COMPATIBLE: &'static [&'static str] = &["perennial,faulty-v1"];

        fn encode(&self, node: &mut Node) {
            node.put_u32("first", self.first);
            if FAULT.get() != "forgets" {
                node.put_u32("second", self.second);
            }
        }

        fn decode(reader: &mut Reader<'_>) -> Result<Self, StateError> {
            let first = reader.u32("first")?;
            let second = match FAULT.get() {
                "forgets" => 2,
                "defaults" => reader.u32("second").unwrap_or(2),
                "ignores" => reader.u32("second").map(|_| 2)?,
                "panics" => {
                    let bytes = reader.bytes("second")?;
                    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
                }
                _ => reader.u32("second")?,
            };
            Ok(Self { first, second })
        }
    }

    fn value() -> Faulty {
        Faulty { first: 1, second: 2 }
    }

    fn passes(fault: &'static str, test: impl FnOnce(&Faulty)) -> bool {
        FAULT.set(fault);
        catch_unwind(AssertUnwindSafe(|| test(&value()))).is_ok()
    }

    fn changes(_: &Faulty) {
        contract::changes_show(value, &[|f| f.first = 0, |f| f.second = 0]);
    }

    #[test]
    fn a_sound_type() {
        assert!(passes("", changes));
        assert!(passes("", |f| contract::missing_properties_are_named(f, &[])));
        assert!(passes("", contract::hostile_values_do_not_panic));
    }

    #[test]
    fn a_field_that_is_not_written() {
        assert!(!passes("forgets", changes));
    }

    #[test]
    fn a_field_that_is_written_but_not_read() {
        assert!(!passes("ignores", changes));
        assert!(!passes("ignores", contract::hostile_values_do_not_panic));
    }

    #[test]
    fn a_field_that_has_a_silent_default() {
        assert!(!passes("defaults", |f| contract::missing_properties_are_named(f, &[])));
    }

    #[test]
    fn a_length_that_is_not_checked() {
        assert!(!passes("panics", contract::hostile_values_do_not_panic));
    }

    #[test]
    fn an_optional_property_that_is_not_one() {
        assert!(!passes("", |f| contract::missing_properties_are_named(f, &["/:second"])));
        assert!(!passes("", |f| contract::missing_properties_are_named(f, &["/:third"])));
    }
}
