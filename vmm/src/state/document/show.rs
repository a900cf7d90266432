//! Prints a tree in the syntax of device tree source.
//!
//! Values have no types, so their bytes decide how they are printed: NUL-terminated printable text as
//! strings, a few whole cells as cells, other values as bytes. With [`Detail::Full`] the text is complete:
//! `dtc` compiles it to the same tree.

use std::fmt::Write;

use crate::state::Node;

/// Longest value in bytes that is printed as cells, if it is whole cells.
const MAX_CELL_BYTES: usize = 64;
/// Bytes of a longer value that [`Detail::Brief`] prints.
const BRIEF_BYTES: usize = 16;

/// How much of a long value is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The first bytes and the number of the others.
    Brief,
    /// All bytes.
    Full,
}

/// Returns the tree at `root` as device tree source.
pub fn show(root: &Node, detail: Detail) -> String {
    let mut text = String::from("/dts-v1/;\n\n");
    show_node(&mut text, root, 0, detail);
    text
}

fn show_node(text: &mut String, node: &Node, level: usize, detail: Detail) {
    let indent = "\t".repeat(level);
    let name = if level == 0 { "/" } else { &node.name };
    line(text, format_args!("{indent}{name} {{"));
    for (name, value) in &node.properties {
        match value.as_slice() {
            [] => line(text, format_args!("{indent}\t{name};")),
            value => line(text, format_args!("{indent}\t{name} = {};", show_value(value, detail))),
        }
    }
    for (index, child) in node.children.iter().enumerate() {
        if index > 0 || !node.properties.is_empty() {
            text.push('\n');
        }
        show_node(text, child, level + 1, detail);
    }
    line(text, format_args!("{indent}}};"));
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

fn show_value(value: &[u8], detail: Detail) -> String {
    if let Some(strings) = as_strings(value) {
        return strings;
    }
    match value.as_chunks::<4>() {
        (cells, []) if value.len() <= MAX_CELL_BYTES => {
            let cells: Vec<String> =
                cells.iter().map(|cell| format!("{:#x}", u32::from_be_bytes(*cell))).collect();
            format!("<{}>", cells.join(" "))
        }
        _ if detail == Detail::Brief && value.len() > BRIEF_BYTES => {
            let rest = value.len() - BRIEF_BYTES;
            format!("[{} /* and {rest} more bytes */]", hex(&value[..BRIEF_BYTES]))
        }
        _ => format!("[{}]", hex(value)),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// Returns strings as device tree source, if each string is printable and not empty.
fn as_strings(value: &[u8]) -> Option<String> {
    let text = str::from_utf8(value.strip_suffix(&[0])?).ok()?;
    let quoted: Option<Vec<String>> = text
        .split('\0')
        .map(|part| {
            let plain = !part.is_empty() && part.bytes().all(|b| (b' '..=b'~').contains(&b));
            plain.then(|| format!("\"{}\"", part.replace('\\', "\\\\").replace('"', "\\\"")))
        })
        .collect();
    Some(quoted?.join(", "))
}
