//! Says what is wrong with the text of a configuration, and where, in the words of the file: the parser says it in those
//! of the program's types, over several lines.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Returns the parser's error on one line: the number of the line, the key, and what is wrong.
pub(super) fn describe(text: &str, error: &toml::de::Error) -> String {
    let message = in_words(&error.message().replace('\n', "; "));
    match error.span() {
        Some(span) => locate(text, &span, &message),
        None => message,
    }
}

/// Returns the parser's error about the section of a VM, on one line.
pub(super) fn of_vm(name: &str, error: &toml::de::Error) -> String {
    format!("VM `{name}`: {}", in_words(&error.message().replace('\n', "; ")))
}

/// Returns an error if a section is a list. serde would take the values for the keys in the order of the program's type.
pub(super) fn list_for_a_section(text: &str) -> Option<String> {
    let file = DeTable::parse(text).ok()?;
    let file = file.get_ref();
    let host = file.get("host");
    let of_host = |key: &str| host?.get_ref().get(key);
    let mounts = of_host("mounts").and_then(|mounts| mounts.get_ref().as_array());
    let sections = [host, file.get("update"), of_host("network")].into_iter().flatten();
    let mut sections = sections.chain(mounts.into_iter().flat_map(|mounts| mounts.iter()));
    let list = sections.find(|section| section.get_ref().is_array())?;
    Some(locate(text, &list.span(), &in_words("invalid type: sequence, expected map")))
}

/// Returns `message` about the part `span` of `text`.
fn locate(text: &str, span: &Range<usize>, message: &str) -> String {
    let line = 1 + text.get(..span.start).unwrap_or_default().matches('\n').count();
    let mut path = Vec::new();
    if let Ok(file) = DeTable::parse(text) {
        find(&DeValue::Table(file.into_inner()), span, &mut path);
    }
    let remedy = match &path[..] {
        [Step::Key(key)] if key == "vm" => ": begin each VM with `[[vm]]`",
        _ => "",
    };
    match place(&path) {
        place if place.is_empty() => format!("line {line}: {message}"),
        place => format!("line {line}: {place}: {message}{remedy}"),
    }
}

/// A step on the way to a value.
#[derive(Debug)]
enum Step {
    /// Into the key of a table.
    Key(String),
    /// Into an entry of a list, counted from 1, and what `name` is in it.
    Entry(usize, Option<String>),
}

/// Finds the innermost value of which `wanted` is a part, and appends the way to it.
fn find(value: &DeValue<'_>, wanted: &Range<usize>, path: &mut Vec<Step>) -> bool {
    let has = |span: Range<usize>| span.start <= wanted.start && wanted.end <= span.end;
    let mut step_into = |step, value: &toml::Spanned<DeValue<'_>>, is_there: bool| {
        path.push(step);
        let is_found = find(value.get_ref(), wanted, path) || is_there || has(value.span());
        if !is_found {
            path.pop();
        }
        is_found
    };
    match value {
        DeValue::Table(table) => table.iter().any(|(key, value)| {
            step_into(Step::Key(key.get_ref().to_string()), value, has(key.span()))
        }),
        DeValue::Array(list) => (1..).zip(list.iter()).any(|(number, value)| {
            let name = value.get_ref().get("name").and_then(|name| name.get_ref().as_str());
            step_into(Step::Entry(number, name.map(str::to_owned)), value, false)
        }),
        _ => false,
    }
}

/// The place at the end of a way, for a person. Empty for the file itself.
fn place(path: &[Step]) -> String {
    use Step::{Entry, Key};
    let (section, rest) = match path {
        [Key(vm), Entry(number, name), rest @ ..] if vm == "vm" => match name {
            Some(name) => (Some(format!("VM `{}`", name.escape_default())), rest),
            None => (Some(format!("[[vm]] number {number}")), rest),
        },
        [Key(host), Key(network), rest @ ..] if host == "host" && network == "network" => {
            (Some("[host.network]".to_owned()), rest)
        }
        [Key(section), rest @ ..] if ["host", "update"].contains(&section.as_str()) => {
            (Some(format!("[{section}]")), rest)
        }
        _ => (None, path),
    };
    let rest = rest.iter().map(|step| match step {
        Key(key) => format!("`{}`", key.escape_default()),
        Entry(number, _) => format!("entry {number}"),
    });
    section.into_iter().chain(rest).collect::<Vec<_>>().join(": ")
}

/// The parser's message without the names of the program's types.
fn in_words(message: &str) -> String {
    let mismatch = ["invalid type: ", "invalid value: "];
    let mismatch = mismatch.iter().find_map(|start| message.strip_prefix(start));
    match mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((found, expected)) => {
            format!("it must be {}, and is {}", expected_in_words(expected), found_in_words(found))
        }
        // What the crate `toml` says of a value that stands for one of several words.
        None if message == "wanted string or table" => "it must be a text in quotes".to_owned(),
        None => message.to_owned(),
    }
}

fn expected_in_words(expected: &str) -> &str {
    match expected {
        "u32" => "a whole number from 0 to 4294967295",
        "a nonzero u32" => "a whole number from 1 to 4294967295",
        "a string" | "path string" => "a text in quotes",
        "a sequence" => "a list",
        "a boolean" => "true or false",
        "map" => "a section",
        other if other.starts_with("struct ") => "a section",
        other => other,
    }
}

fn found_in_words(found: &str) -> String {
    const WORDS: [(&str, &str); 6] = [
        ("integer ", "the number "),
        ("floating point ", "the number "),
        ("string ", "the text "),
        ("boolean ", ""),
        ("sequence", "a list"),
        ("map", "a section"),
    ];
    let known = WORDS.iter().find_map(|(serde, word)| Some((word, found.strip_prefix(serde)?)));
    known.map_or_else(|| found.to_owned(), |(word, rest)| format!("{word}{rest}"))
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    fn said(text: &str) -> String {
        let said = Config::parse(text).expect_err(text).to_string();
        assert!(!said.contains('\n'), "{said}");
        said
    }

    #[test]
    fn a_value_of_a_wrong_type_or_range_is_told_with_its_line_and_its_key() {
        let any = "it must be a whole number from 0 to 4294967295";
        let positive = "it must be a whole number from 1 to 4294967295";
        let text = "it must be a text in quotes";
        for (lines, place, wanted, found) in [
            ("\n[host]\nusers = \"1\"", "line 3: [host]: `users`", any, "the text \"1\""),
            ("[host]\nusers = 1.5", "line 2: [host]: `users`", any, "the number `1.5`"),
            ("[host]\nusers = -1", "line 2: [host]: `users`", any, "the number `-1`"),
            ("[update]\nbudget = 0", "line 2: [update]: `budget`", positive, "the number `0`"),
            ("[host]\nhostname = 7", "line 2: [host]: `hostname`", text, "the number `7`"),
            ("host = 1", "line 1: [host]", "it must be a section", "the number `1`"),
            (
                "[host]\nmodules = 1",
                "line 2: [host]: `modules`",
                "it must be a list",
                "the number `1`",
            ),
            (
                "[host]\nmodules = [\"a\", true]",
                "line 2: [host]: `modules`: entry 2",
                text,
                "`true`",
            ),
            (
                "[update]\nrehearse = \"yes\"",
                "line 2: [update]: `rehearse`",
                "it must be true or false",
                "the text \"yes\"",
            ),
            (
                "[host]\nmounts = [{ source = 4, target = \"/\", type = \"ext4\" }]",
                "line 2: [host]: `mounts`: entry 1: `source`",
                text,
                "the number `4`",
            ),
            (
                "[[vm]]\nname = \"a\"\nmemory = 64",
                "line 3: VM `a`: `memory`",
                text,
                "the number `64`",
            ),
            ("[[vm]]\nname = 3", "line 2: [[vm]] number 1: `name`", text, "the number `3`"),
            (
                "[vm]\nname = \"a\"",
                "line 1: `vm`",
                "it must be a list",
                "a section: begin each VM with `[[vm]]`",
            ),
        ] {
            assert_eq!(said(lines), format!("{place}: {wanted}, and is {found}"), "{lines}");
        }
        let second = "[[vm]]\nname = \"a\"\nmemory = \"size=64M\"\nkernel = \"/k\"\n\
                      [[vm]]\nname = \"b\"\ncpus = \"2\"";
        assert!(said(second).starts_with("line 7: VM `b`: `cpus`: it must be a whole number"));
    }

    #[test]
    fn what_is_unknown_or_missing_is_told_with_its_line_and_its_section() {
        for (lines, place) in [
            ("[host]\ncolour = 1", "line 2: [host]: `colour`: unknown field"),
            ("[hosts]", "line 1: `hosts`: unknown field"),
            ("[[vm]]\nname = \"a\"", "line 1: VM `a`: missing field `memory`"),
            (
                "[host.network]\nbridge = \"b\"\ngateway = \"10.0\"",
                "line 3: [host.network]: `gateway`: invalid IPv4 address",
            ),
        ] {
            let said = said(lines);
            assert!(said.starts_with(place), "{said}");
        }
        for key in ["budget", "rehearse-within-s"] {
            assert!(said(&format!("[update]\n{key} = 0")).contains("from 1 to"), "{key}");
        }
        assert!(said("[host]\nwatchdog-timeout-s = 0").contains("from 1 to"));
        let restart = "[[vm]]\nname = \"a\"\nmemory = \"size=64M\"\nrestart = true";
        assert_eq!(said(restart), "line 4: VM `a`: `restart`: it must be a text in quotes");
    }

    #[test]
    fn a_section_is_no_list() {
        for (text, place) in [
            ("host = []", "line 1: [host]"),
            ("update = [\"/k\"]", "line 1: [update]"),
            ("[host]\nnetwork = [\"br0\"]", "line 2: [host.network]"),
            ("[host]\nmounts = [[\"a\", \"/b\", \"ext4\"]]", "line 2: [host]: `mounts`: entry 1"),
        ] {
            assert_eq!(said(text), format!("{place}: it must be a section, and is a list"));
        }
    }

    #[test]
    fn what_is_no_toml_is_told_with_its_line() {
        for (text, line) in [("this is not TOML", 1), ("[host", 1), ("\n[[vm]]\nname = web", 3)] {
            assert!(said(text).starts_with(&format!("line {line}: ")), "{text}");
        }
        assert_eq!(said("[host]\nusers = 70000\nusers = 70001"), "line 3: duplicate key");
    }
}
