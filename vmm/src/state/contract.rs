//! Contract tests, which every state type must have: they check a binding through real documents.
//!
//! ```ignore
//! #[cfg(test)]
//! mod tests {
//!     crate::state::contract::contract_tests! {
//!         SerialStateV1,
//!         // A fn() -> SerialStateV1. No field is zero: zero would hide a field that is not
//! written.         sample: sample,
//!         // One change for each field. Without it, no test notices if the field is lost. None for a
//!         // type without fields.
//!         changes: [|s| s.divisor = 12, |s| s.fifo.push(0x41)],
//!         // What may be absent (optional_bytes), as "path:property". Usually left out.
//!         optional: ["/:input"],
//!         // Compare with golden/serial-v1.dtb, too. Left out until the binding is complete.
//!         golden: "serial-v1",
//!     }
//! }
//! ```
//!
//! The type needs `PartialEq` and `Debug`. The tests write the value as the root of a document, so
//! `/` is the value's node and `/fifo` a child.
//!
//! A golden document is written by running its test once with `PERENNIAL_WRITE_GOLDEN=1` and is
//! then committed; an existing one is never overwritten. After the release of its binding it never
//! changes again: a state type that cannot read it any more needs a new binding.

use std::fmt::Debug;
use std::path::PathBuf;

use super::document::{self, Detail, decode, encode, read_document, write_document};
use super::node::{Node, read_node};
use super::{Schema, StateError};

/// See the [module](self).
macro_rules! contract_tests {
    (
        $state:ty,
        sample: $sample:expr,
        changes: [$($change:expr),* $(,)?]
        $(, optional: [$($optional:literal),* $(,)?])?
        $(, golden: $golden:literal)?
        $(,)?
    ) => {
        mod contract {
            #[allow(unused_imports)]
            use super::*;

            fn value() -> $state {
                $sample()
            }

            #[test]
            fn a_document_of_the_state_gives_it_back() {
                $crate::state::contract::gives_itself_back(&value());
            }

            #[test]
            fn every_change_shows_in_the_document() {
                let changes: Vec<fn(&mut $state)> = vec![$($change),*];
                $crate::state::contract::changes_show(value, &changes);
            }

            #[test]
            fn every_missing_property_is_a_named_error() {
                let optional: &[&str] = &[$($($optional),*)?];
                $crate::state::contract::missing_properties_are_named(&value(), optional);
            }

            #[test]
            fn no_node_can_go_missing_unnoticed() {
                $crate::state::contract::missing_nodes_are_noticed(&value());
            }

            #[test]
            fn every_property_or_node_too_many_is_a_named_error() {
                $crate::state::contract::leftovers_are_named(&value());
            }

            #[test]
            fn an_unknown_binding_is_a_named_error() {
                $crate::state::contract::unknown_bindings_are_named(&value());
            }

            #[test]
            fn hostile_values_never_panic() {
                $crate::state::contract::hostile_values_do_not_panic(&value());
            }

            #[test]
            fn every_cut_of_the_document_is_an_error() {
                $crate::state::contract::cuts_are_errors(&value());
            }

            #[test]
            fn every_flipped_byte_of_the_document_is_an_error() {
                $crate::state::contract::flips_are_errors(&value());
            }

            $(
                #[test]
                fn the_golden_document_reads_as_ever() {
                    $crate::state::contract::golden_document_reads(&value(), $golden);
                }
            )?
        }
    };
}
pub(crate) use contract_tests;

pub(crate) fn gives_itself_back<S: Schema + PartialEq + Debug>(value: &S) {
    let bytes = write_document(value).unwrap();
    assert_eq!(bytes, write_document(value).unwrap(), "the same value must give the same bytes");
    assert_eq!(&read_document::<S>(&bytes).unwrap(), value);
    let bindings = decode(&bytes).unwrap().properties["compatible"].clone();
    let expected: Vec<u8> =
        value.bindings().iter().flat_map(|c| [c.as_bytes(), &[0]].concat()).collect();
    assert_eq!(bindings, expected, "a state type writes the bindings that it says");
    assert!(value.bindings().iter().all(|binding| S::COMPATIBLE.contains(binding)));
}

pub(crate) fn changes_show<S: Schema + PartialEq + Debug>(
    value: impl Fn() -> S,
    changes: &[fn(&mut S)],
) {
    let before = write_document(&value()).unwrap();
    for (index, change) in changes.iter().enumerate() {
        let mut changed = value();
        change(&mut changed);
        assert_ne!(changed, value(), "change {index} changes nothing");
        let bytes = write_document(&changed).unwrap();
        assert_ne!(bytes, before, "change {index} does not show in the document");
        assert_eq!(read_document::<S>(&bytes).unwrap(), changed, "change {index}");
    }
}

pub(crate) fn missing_properties_are_named<S: Schema + PartialEq + Debug>(
    value: &S,
    optional: &[&str],
) {
    let root = value.to_node("");
    let mut unused: Vec<&str> = optional.to_vec();
    for (place, path) in places(&root) {
        for property in at(&root, &place).properties.keys() {
            let mut cut = root.clone();
            at_mut(&mut cut, &place).properties.remove(property);
            let name = format!("{path}:{property}");
            let found = read::<S>(&cut);
            if optional.contains(&name.as_str()) {
                unused.retain(|known| *known != name);
                let found = found.unwrap_or_else(|error| panic!("{name} is not optional: {error}"));
                assert_ne!(&found, value, "{name} can go missing unnoticed");
            } else {
                let expected =
                    StateError::MissingProperty { path: path.clone(), property: property.clone() };
                assert_eq!(found.err(), Some(expected), "without {name}");
            }
        }
    }
    assert!(unused.is_empty(), "the sample has no {unused:?}");
}

pub(crate) fn missing_nodes_are_noticed<S: Schema + PartialEq + Debug>(value: &S) {
    let root = value.to_node("");
    for (place, path) in places(&root) {
        let Some((index, parent)) = place.split_last() else { continue };
        let mut cut = root.clone();
        at_mut(&mut cut, parent).children.remove(*index);
        match read::<S>(&cut) {
            // An element of a list, such as a disk, may be missing without an error in this type.
            Ok(found) => assert_ne!(&found, value, "{path} can go missing unnoticed"),
            Err(error) => assert!(error.to_string().starts_with('/'), "without {path}: {error}"),
        }
    }
}

pub(crate) fn leftovers_are_named<S: Schema + PartialEq + Debug>(value: &S) {
    let root = value.to_node("");
    for (place, path) in places(&root) {
        let mut more = root.clone();
        at_mut(&mut more, &place).put_u32("stray-property", 1);
        let what = "a property `stray-property`".to_owned();
        let expected = StateError::Leftover { path: path.clone(), what };
        assert_eq!(read::<S>(&more).err(), Some(expected));

        let mut more = root.clone();
        at_mut(&mut more, &place).push(Node::new("stray-node@0", &["perennial,stray-v1"]));
        // A type that reads all children as a list refuses the node by its binding.
        let stray = format!("{}/stray-node@0", path.trim_end_matches('/'));
        match read::<S>(&more) {
            Err(StateError::Leftover { path: named, what }) => {
                assert_eq!((named, what.as_str()), (path, "a node `stray-node@0`"));
            }
            Err(StateError::Incompatible { path: named, found, .. }) => {
                assert_eq!((named, found.as_str()), (stray, "perennial,stray-v1"));
            }
            other => panic!("{path} with a node too many: {other:?}"),
        }
    }
}

pub(crate) fn unknown_bindings_are_named<S: Schema + PartialEq + Debug>(value: &S) {
    let root = value.to_node("");
    for (place, path) in places(&root) {
        let mut other = root.clone();
        let unknown = b"perennial,stray-v1\0".to_vec();
        at_mut(&mut other, &place).properties.insert("compatible".to_owned(), unknown);
        match read::<S>(&other) {
            Err(StateError::Incompatible { path: named, found, known }) => {
                assert_eq!(named, path);
                assert!(found.contains("perennial,stray-v1"), "{found}");
                assert!(known.contains("perennial,"), "{known}");
            }
            other => panic!("{path} with an unknown binding: {other:?}"),
        }
    }
}

/// Tries wrong lengths and extreme values, each in an otherwise valid document. Some are valid
/// values (a register may hold all ones); the error for the others must name the node.
pub(crate) fn hostile_values_do_not_panic<S: Schema + PartialEq + Debug>(value: &S) {
    let twists: [fn(&mut Vec<u8>); 7] = [
        |v| v.fill(0),
        |v| v.fill(0xff),
        |v| v.fill(0x80),
        |v| v.extend_from_slice(&[0; 8]),
        |v| v.push(0xff),
        |v| v.truncate(v.len().saturating_sub(1)),
        |v| v.clear(),
    ];
    let root = value.to_node("");
    for (place, path) in places(&root) {
        for property in at(&root, &place).properties.keys() {
            for (index, twist) in twists.iter().enumerate() {
                let mut twisted = root.clone();
                twist(at_mut(&mut twisted, &place).properties.get_mut(property).unwrap());
                if twisted == root {
                    continue;
                }
                match read::<S>(&twisted) {
                    // A reader accepts a list that has one of its bindings, and ignores the others.
                    Ok(_) if property == "compatible" => {}
                    Ok(found) => {
                        assert_ne!(
                            &found, value,
                            "{path}: `{property}`, twist {index}, is ignored"
                        );
                    }
                    Err(error) => {
                        assert!(error.to_string().starts_with('/'), "{path}:{property}: {error}");
                    }
                }
            }
        }
    }
}

pub(crate) fn cuts_are_errors<S: Schema + PartialEq + Debug>(value: &S) {
    let bytes = write_document(value).unwrap();
    for len in 0..bytes.len() {
        damaged(&bytes[..len], &format!("the first {len} bytes"));
    }
    damaged(&[bytes.as_slice(), &[0]].concat(), "a byte too many");
}

pub(crate) fn flips_are_errors<S: Schema + PartialEq + Debug>(value: &S) {
    const SAMPLES: usize = 2048;
    let mut bytes = write_document(value).unwrap();
    let stride = bytes.len().div_ceil(SAMPLES);
    for at in (0..bytes.len()).filter(|at| *at < 128 || at % stride == 0) {
        for mask in [0x01, 0x80, 0xff] {
            bytes[at] ^= mask;
            damaged(&bytes, &format!("byte {at} xor {mask:#x}"));
            bytes[at] ^= mask;
        }
    }
}

fn damaged(bytes: &[u8], what: &str) {
    match decode(bytes) {
        Err(StateError::Damaged(_)) => {}
        other => panic!("{what}: {other:?}"),
    }
}

pub(crate) fn golden_document_reads<S: Schema + PartialEq + Debug>(value: &S, name: &str) {
    assert_eq!(
        value.bindings()[0],
        format!("perennial,{name}"),
        "the file is named for the binding"
    );
    let path = golden_path(&format!("{name}.dtb"));
    let bytes = write_document(value).unwrap();
    if std::env::var_os("PERENNIAL_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, &bytes).unwrap();
        let text = document::show(&decode(&bytes).unwrap(), Detail::Full);
        std::fs::write(path.with_extension("dts"), text).unwrap();
    }
    let golden = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{}: {error}: see state/contract.rs", path.display()));
    let text = std::fs::read_to_string(path.with_extension("dts")).unwrap();
    assert_eq!(
        document::show(&decode(&golden).unwrap(), Detail::Full),
        text,
        "{name}.dts is stale"
    );
    assert_eq!(&read_document::<S>(&golden).unwrap(), value, "{name} means something else now");
    assert_eq!(bytes, golden, "{name} is written differently now");
}

/// Returns the error text for a document of `value` after `change`. Panics if it is not refused.
pub(crate) fn refusal<S: Schema>(mut value: S, change: fn(&mut S)) -> String {
    change(&mut value);
    match read::<S>(&value.to_node("")) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the changed value is not refused"),
    }
}

/// Returns the path of a golden document.
pub(crate) fn golden_path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "golden", name].iter().collect()
}

/// Reads a tree as a restore would: through the bytes.
fn read<S: Schema>(root: &Node) -> Result<S, StateError> {
    read_node(&decode(&encode(root).unwrap()).unwrap(), "")
}

/// Returns every node as a list of child indices, with its path.
fn places(root: &Node) -> Vec<(Vec<usize>, String)> {
    let mut places = vec![(Vec::new(), "/".to_owned())];
    let mut next = 0;
    while let Some((place, path)) = places.get(next).cloned() {
        next += 1;
        for (index, child) in at(root, &place).children.iter().enumerate() {
            let place = [place.as_slice(), &[index]].concat();
            places.push((place, format!("{}/{}", path.trim_end_matches('/'), child.name)));
        }
    }
    places
}

fn at<'a>(root: &'a Node, place: &[usize]) -> &'a Node {
    place.iter().fold(root, |node, index| &node.children[*index])
}

fn at_mut<'a>(root: &'a mut Node, place: &[usize]) -> &'a mut Node {
    place.iter().fold(root, |node, index| &mut node.children[*index])
}
