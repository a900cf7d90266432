//! Checks the build's dependencies against the licences, bans and sources in `deny.toml`.
//!
//! cargo-deny checks the same and more, but takes minutes to compile. This check reads the output of
//! `cargo metadata`, so that it runs with the unit tests on every computer. A rule in `deny.toml` that
//! it does not know is an error, so that no rule is silently ignored.

use std::collections::BTreeSet;
use std::env;
use std::io;
use std::process::{Command, Stdio};

use serde_json::Value;
use toml::{Table, Value as Rule};

use crate::paths;

/// Cargo's name for crates.io.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// The rules that are checked here, and those that only cargo-deny checks, by section.
const KNOWN: [(&str, &[&str]); 5] = [
    ("graph", &["targets"]),
    ("advisories", &["ignore"]),
    ("licenses", &["allow"]),
    ("bans", &["multiple-versions", "wildcards", "allow-wildcard-paths"]),
    ("sources", &["unknown-registry", "unknown-git"]),
];

/// Checks the workspace against its `deny.toml`. Returns one line for each problem.
pub fn problems() -> io::Result<Vec<String>> {
    let text = std::fs::read_to_string(paths::workspace().join("deny.toml"))?;
    let rules: Table = text.parse().map_err(io::Error::other)?;
    Ok(check(&rules, &metadata(&rules)?))
}

/// The packages of a build for the targets of `deny.toml`.
fn metadata(rules: &Table) -> io::Result<Value> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(paths::workspace()).args(["metadata", "--format-version", "1", "--locked"]);
    for target in list(rules, "graph", "targets") {
        command.args(["--filter-platform", target]);
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("cargo metadata: {}", output.status)));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn list<'a>(rules: &'a Table, section: &str, rule: &str) -> Vec<&'a str> {
    let list = rules.get(section).and_then(|section| section.get(rule)).and_then(Rule::as_array);
    list.into_iter().flatten().filter_map(Rule::as_str).collect()
}

fn check(rules: &Table, metadata: &Value) -> Vec<String> {
    let mut problems = unknown(rules);
    let allowed: BTreeSet<&str> = list(rules, "licenses", "allow").into_iter().collect();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or("?"),
            package["version"].as_str().unwrap_or("?")
        );
        match package["license"].as_str() {
            None => problems.push(format!("{name} has no licence expression")),
            Some(licence) => match is_allowed(licence, &allowed) {
                Some(true) => {}
                Some(false) => {
                    problems.push(format!("{name}: `{licence}` is not allowed by deny.toml"));
                }
                None => problems.push(format!("{name}: `{licence}` cannot be read")),
            },
        }
        if let Some(source) = package["source"].as_str()
            && source != CRATES_IO
        {
            problems.push(format!("{name} comes from {source}, not from crates.io"));
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let is_path = dependency["path"].is_string();
            if package["source"].is_null() && dependency["req"] == "*" && !is_path {
                let other = dependency["name"].as_str().unwrap_or("?");
                problems.push(format!("{name} takes any version of {other}"));
            }
        }
    }
    if metadata["packages"].as_array().is_none_or(Vec::is_empty) {
        problems.push("cargo metadata shows no package".to_owned());
    }
    problems
}

/// Rules that this check does not know, and rules that must be `deny` but are not.
fn unknown(rules: &Table) -> Vec<String> {
    let mut problems = Vec::new();
    for (section, content) in rules {
        let known = KNOWN.iter().find(|(name, _)| name == section).map(|(_, rules)| *rules);
        for rule in content.as_table().into_iter().flat_map(Table::keys) {
            if !known.is_some_and(|known| known.contains(&rule.as_str())) {
                problems.push(format!("deny.toml: `{section}.{rule}` is not checked here"));
            }
        }
    }
    for (section, rule) in
        [("bans", "wildcards"), ("sources", "unknown-registry"), ("sources", "unknown-git")]
    {
        if rules.get(section).and_then(|section| section.get(rule)?.as_str()) != Some("deny") {
            problems.push(format!("deny.toml: `{section}.{rule}` is not `deny`"));
        }
    }
    problems
}

/// Whether the allowed licences satisfy a licence expression. `None` if it cannot be parsed.
///
/// The grammar is SPDX 2.3, annex D, with the `/` of older packages for OR:
/// `or = and { "OR" and }`, `and = one { "AND" one }`, `one = "(" or ")" | ID [ "WITH" ID ]`.
fn is_allowed(expression: &str, allowed: &BTreeSet<&str>) -> Option<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut words = words.as_slice();
    let met = either(&mut words, allowed)?;
    words.is_empty().then_some(met)
}

fn either(words: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut met = both(words, allowed)?;
    while take(words, "OR") {
        met |= both(words, allowed)?;
    }
    Some(met)
}

fn both(words: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    let mut met = one(words, allowed)?;
    while take(words, "AND") {
        met &= one(words, allowed)?;
    }
    Some(met)
}

fn one(words: &mut &[&str], allowed: &BTreeSet<&str>) -> Option<bool> {
    if take(words, "(") {
        let met = either(words, allowed)?;
        return take(words, ")").then_some(met);
    }
    let licence = next(words)?;
    if take(words, "WITH") {
        let exception = next(words)?;
        return Some(allowed.contains(format!("{licence} WITH {exception}").as_str()));
    }
    Some(allowed.contains(licence))
}

fn take(words: &mut &[&str], word: &str) -> bool {
    match words.split_first() {
        Some((first, rest)) if *first == word => {
            *words = rest;
            true
        }
        _ => false,
    }
}

fn next<'a>(words: &mut &[&'a str]) -> Option<&'a str> {
    let (first, rest) = words.split_first()?;
    *words = rest;
    (!["(", ")", "AND", "OR", "WITH"].contains(first)).then_some(*first)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_workspace_keeps_the_rules_of_deny_toml() {
        let problems = problems().unwrap();
        assert!(problems.is_empty(), "\n{}", problems.join("\n"));
    }

    #[test]
    fn a_licence_expression_is_met_as_spdx_says() {
        let allowed = BTreeSet::from(["MIT", "Apache-2.0", "Unicode-3.0", "A WITH B"]);
        for (expression, met) in [
            ("MIT", Some(true)),
            ("GPL-2.0-only", Some(false)),
            ("GPL-2.0-only OR MIT", Some(true)),
            ("MIT/GPL-2.0-only", Some(true)),
            ("MIT AND GPL-2.0-only", Some(false)),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", Some(true)),
            ("MIT OR GPL-2.0-only AND Zlib", Some(true)),
            ("(MIT OR GPL-2.0-only) AND Zlib", Some(false)),
            ("A WITH B", Some(true)),
            ("A", Some(false)),
            ("MIT WITH B", Some(false)),
            ("", None),
            ("MIT OR", None),
            ("(MIT", None),
            ("MIT)", None),
            ("MIT Apache-2.0", None),
            ("AND", None),
        ] {
            assert_eq!(is_allowed(expression, &allowed), met, "{expression}");
        }
    }

    const RULES: &str = "
        [graph]
        targets = [\"x86_64-unknown-linux-gnu\"]
        [licenses]
        allow = [\"MIT\"]
        [bans]
        wildcards = \"deny\"
        [sources]
        unknown-registry = \"deny\"
        unknown-git = \"deny\"
    ";

    fn package(change: impl Fn(&mut Value)) -> Vec<String> {
        let mut package = json!({
            "name": "a", "version": "1.0.0", "license": "MIT", "source": null,
            "dependencies": [{"name": "b", "req": "^1", "path": null}],
        });
        change(&mut package);
        check(&RULES.parse().unwrap(), &json!({"packages": [package]}))
    }

    #[test]
    fn a_package_that_breaks_a_rule_is_named() {
        assert_eq!(package(|_| ()), [] as [&str; 0]);
        let licence = package(|p| p["license"] = json!("GPL-3.0-only"));
        assert_eq!(licence, ["a 1.0.0: `GPL-3.0-only` is not allowed by deny.toml"]);
        assert_eq!(package(|p| p["license"] = json!(null)), ["a 1.0.0 has no licence expression"]);
        let git = package(|p| p["source"] = json!("git+https://example.org/a"));
        assert_eq!(git, ["a 1.0.0 comes from git+https://example.org/a, not from crates.io"]);
        let any = package(|p| p["dependencies"][0]["req"] = json!("*"));
        assert_eq!(any, ["a 1.0.0 takes any version of b"]);
        let path =
            package(|p| p["dependencies"][0] = json!({"name": "b", "req": "*", "path": "/b"}));
        assert_eq!(path, [] as [&str; 0]);
    }

    #[test]
    fn a_rule_that_is_not_checked_is_an_error_and_so_is_a_weaker_one() {
        let more: Table = RULES.replace("[bans]", "[bans]\ndeny = [\"openssl\"]").parse().unwrap();
        assert_eq!(unknown(&more), ["deny.toml: `bans.deny` is not checked here"]);
        let weaker: Table = RULES.replace("wildcards = \"deny\"", "").parse().unwrap();
        assert_eq!(unknown(&weaker), ["deny.toml: `bans.wildcards` is not `deny`"]);
    }
}
