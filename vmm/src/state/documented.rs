//! Checks `docs/state-document.md` and `docs/state-versioning.md` against the bindings in the
//! sources and the nodes of the golden documents.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::contract::golden_path;
use super::document::{self, Detail};
use super::node::Node;

const DOCUMENT: &str = include_str!("../../../docs/state-document.md");
const VERSIONING: &str = include_str!("../../../docs/state-versioning.md");

/// The names that follow `perennial,` in `text`, with that prefix.
fn bindings_in(text: &str) -> BTreeSet<String> {
    let part_of_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split("perennial,")
        .skip(1)
        .map(|rest| rest.split(|c| !part_of_name(c)).next().unwrap_or_default())
        .filter(|name| !name.is_empty())
        .map(|name| format!("perennial,{name}"))
        .collect()
}

fn source(path: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "src", path].iter().collect();
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            // Test files define types whose bindings are not part of the format.
            false if path.ends_with("tests.rs") || path.ends_with("contract.rs") => {}
            false if path.ends_with("documented.rs") => {}
            false => found.push(path),
        }
    }
}

fn texts_of_the_code() -> Vec<String> {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect()
}

/// Every binding that a `Schema` of this crate has.
fn bindings_of_the_code() -> BTreeSet<String> {
    let found: BTreeSet<String> = texts_of_the_code()
        .iter()
        .flat_map(|text| text.split("const COMPATIBLE:").skip(1))
        .flat_map(|rest| bindings_in(rest.split(';').next().unwrap_or_default()))
        .collect();
    assert!(found.len() > 10, "{found:?}");
    found
}

/// All nodes of the golden documents of these bindings, by their binding.
fn golden_nodes() -> BTreeMap<String, Vec<Node>> {
    fn collect(node: &Node, nodes: &mut BTreeMap<String, Vec<Node>>) {
        let compatible = String::from_utf8(node.properties["compatible"].clone()).unwrap();
        let binding = compatible.split('\0').next().unwrap().to_owned();
        nodes.entry(binding).or_default().push(node.clone());
        node.children.iter().for_each(|child| collect(child, nodes));
    }
    let mut nodes = BTreeMap::new();
    for binding in bindings_of_the_code() {
        collect(&golden(&binding), &mut nodes);
    }
    nodes
}

fn golden(binding: &str) -> Node {
    let path = golden_path(&format!("{}.dtb", binding.trim_start_matches("perennial,")));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    document::decode(&bytes).unwrap()
}

/// Returns the text below the heading of `binding`, up to the next heading.
fn section(binding: &str) -> &'static str {
    let heading = format!("\n### `{binding}`\n");
    let (_, rest) = DOCUMENT.split_once(&heading).unwrap_or_else(|| panic!("no {heading:?}"));
    rest.split("\n#").next().unwrap_or_default()
}

/// The rows of the tables in `text`, as their cells.
fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

/// The words in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The properties that the section of `binding` lists, with their types.
fn documented_properties(binding: &str) -> BTreeMap<&'static str, &'static str> {
    rows(section(binding)).flat_map(|row| quoted(row[0]).map(move |name| (name, row[1]))).collect()
}

#[test]
fn every_binding_has_a_golden_document_and_every_node_of_one_a_binding() {
    let found: BTreeSet<String> = golden_nodes().into_keys().collect();
    assert_eq!(found, bindings_of_the_code());
}

#[test]
fn every_binding_is_documented_with_exactly_its_properties() {
    for (binding, nodes) in golden_nodes() {
        let mut written: BTreeSet<&str> =
            nodes.iter().flat_map(|node| node.properties.keys()).map(String::as_str).collect();
        assert!(written.remove("compatible"));
        let documented: BTreeSet<&str> = documented_properties(&binding).into_keys().collect();
        assert_eq!(documented, written, "{binding}: documented on the left, written on the right");
    }
}

#[test]
fn every_property_has_the_type_that_is_documented() {
    for (binding, nodes) in golden_nodes() {
        for (property, kind) in documented_properties(&binding) {
            for value in nodes.iter().filter_map(|node| node.properties.get(property)) {
                let fits = match kind.strip_suffix(" bytes") {
                    Some(len) => len.parse() == Ok(value.len()),
                    None => match kind {
                        "u32" => value.len() == 4,
                        "u64" => value.len() == 8,
                        "bool" => value.len() == 4 && value[..3] == [0; 3] && value[3] < 2,
                        "u64 list" => value.len().is_multiple_of(8),
                        "string" => value.iter().position(|b| *b == 0) == Some(value.len() - 1),
                        "strings" => value.last().is_none_or(|b| *b == 0),
                        "bytes" => true,
                        _ => false,
                    },
                };
                assert!(fits, "{binding}: `{property}` is no {kind:?}: {value:x?}");
            }
        }
    }
}

/// The contract tests check that exactly the properties of their `optional` list can be missing.
#[test]
fn what_is_marked_as_optional_is_what_the_contract_tests_leave_out() {
    let tried: BTreeSet<String> = texts_of_the_code()
        .iter()
        .flat_map(|text| text.split("optional: [").skip(1))
        .flat_map(|rest| rest.split(']').next().unwrap_or_default().split('"'))
        .filter_map(|word| word.split_once(':').map(|(_, property)| property.to_owned()))
        .collect();
    let marked: BTreeSet<String> = rows(DOCUMENT)
        .filter(|row| row[2].starts_with("*optional*"))
        .flat_map(|row| quoted(row[0]).map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert_eq!(marked, tried, "marked on the left, tried on the right");
}

#[test]
fn every_binding_is_documented_with_exactly_its_nodes() {
    let kind = |name: &str| match name.split_once('@') {
        Some((base, address)) if matches!((base, address), ("pci" | "serial", _)) => {
            format!("{base}@{address}")
        }
        Some((base, _)) => format!("{base}@"),
        None => name.to_owned(),
    };
    for (binding, nodes) in golden_nodes() {
        let written: BTreeSet<String> =
            nodes.iter().flat_map(|node| &node.children).map(|child| kind(&child.name)).collect();
        let list = section(&binding).split_once("\nNodes: ").map_or("", |(_, list)| list);
        let documented: BTreeSet<String> = quoted(list).map(kind).collect();
        assert_eq!(documented, written, "{binding}: documented on the left, written on the right");
    }
}

#[test]
fn no_page_names_a_binding_that_the_code_does_not_know() {
    let known = bindings_of_the_code();
    for (page, text) in [("state-document.md", DOCUMENT), ("state-versioning.md", VERSIONING)] {
        let strange: Vec<String> = bindings_in(text).difference(&known).cloned().collect();
        assert!(strange.is_empty(), "docs/{page} names {strange:?}");
    }
}

/// The value of `const NAME` in a source file: a number, or one shifted.
fn constant(file: &str, name: &str) -> u64 {
    let text = source(file);
    let (_, rest) = text
        .split_once(&format!("const {name}: "))
        .unwrap_or_else(|| panic!("{file} has no constant {name}"));
    let expression = rest.split_once(" = ").unwrap().1.split_once(';').unwrap().0;
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().unwrap();
    match expression.split_once("<<") {
        Some((value, shift)) => number(value) << number(shift),
        None => number(expression),
    }
}

#[test]
fn the_limits_are_those_of_the_code() {
    let (_, table) = DOCUMENT.split_once("| limit | value |").unwrap();
    let table = table.split("\n#").next().unwrap();
    let mut limits = 0;
    for row in rows(table) {
        let [name, value, file, _] = row[..] else { panic!("{row:?}") };
        let value: u64 = value.parse().unwrap();
        assert_eq!(value, constant(file.trim_matches('`'), name.trim_matches('`')), "{name}");
        limits += 1;
    }
    assert!(limits > 10, "{limits}");
}

#[test]
fn the_digest_is_where_the_page_says() {
    let at: usize = DOCUMENT
        .split_once("The digest is at byte ")
        .and_then(|(_, rest)| rest.split_once(' '))
        .and_then(|(number, _)| number.parse().ok())
        .unwrap();
    let bytes = std::fs::read(golden_path("vm-v1.dtb")).unwrap();
    let digest = document::check(&bytes).unwrap().digest;
    assert_eq!(bytes[at..at + 4], digest.to_be_bytes());
}

#[test]
fn the_example_is_what_the_command_prints() {
    let (_, example) = DOCUMENT.split_once("```dts\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let shown = document::show(&golden("perennial,vm-v1"), Detail::Brief).replace('\t', "    ");
    let mut lines = shown.lines();
    for line in example.lines() {
        assert!(lines.any(|shown| shown == line), "not printed, or not here: {line:?}");
    }
    assert_eq!(lines.next(), None, "the end is missing");
}
