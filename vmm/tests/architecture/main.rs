//! The architecture as ARCHITECTURE.md draws it, held against the sources: imports that never run back
//! up, leaf crates that stay leaves, modules that do not name a kind of device, states that are saved
//! completely, and pages that name no path that is not there.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of `vmm/src` from the ground up. A module imports from its own layer and from those
/// below. ARCHITECTURE.md shows the same list.
const LAYERS: &[&[&str]] = &[
    &["mutex", "causes", "options", "bus", "state"],
    &["arch", "kvm"],
    &["devices"],
    &["machine"],
    &["config", "link"],
    &["vcpu", "vm"],
    &["guests"],
    &["live_update"],
    &["api"],
    &["host"],
    &["cli"],
];
/// Fuzz targets reach everything, and nothing reaches them.
const OUTSIDE: &[&str] = &["fuzz", "lib", "main"];
/// The crates that know no other crate of the workspace.
const LEAVES: [&str; 3] = ["guest-mem", "luo", "kexec"];
/// What only the tests of a leaf may use.
const FOR_TESTS: &str = "perennial-fuzz";
/// Sources, pages and recipes, in which a page may name a path.
const WHERE_PATHS_BEGIN: &[&str] =
    &[".ci/", "docs/", "guest-mem/", "kexec/", "luo/", "resources/", "tests/", "vmm/"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn files(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

/// The source files of `vmm/src` by their paths below it.
fn sources() -> BTreeMap<String, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&source, "rs", &mut found);
    assert!(found.len() > 80, "{}", found.len());
    let text = |path: &PathBuf| {
        let name = path.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(path).unwrap())
    };
    found.iter().map(text).collect()
}

/// The code of a file without its comments and without the tests at its end.
fn code(text: &str) -> String {
    let tests = ["mod tests {", "pub(crate) mod tests {"];
    let end = tests.iter().filter_map(|begin| text.find(&format!("#[cfg(test)]\n{begin}"))).min();
    let end = end.unwrap_or(text.len());
    let lines = text[..end].lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

fn is_test(name: &str) -> bool {
    name.ends_with("tests.rs")
        || name.contains("/tests/")
        || ["state/documented.rs", "state/contract.rs", "devices/virtio/driver.rs"].contains(&name)
}

/// The top module of a file: `devices` for `devices/serial/mod.rs`.
fn module_of(name: &str) -> &str {
    name.split(['/', '.']).next().unwrap()
}

/// The top modules that a file's code imports or names by `crate::`.
fn imports(code: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let first = |name: &str| {
            name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len())
        };
        // `crate::{a, b}` as well as `crate::a`.
        let names = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => &rest[..first(rest)],
        };
        found.extend(names.split(',').map(str::trim).map(|name| &name[..first(name)]));
    }
    found.remove("");
    found
}

fn layer_of(module: &str) -> usize {
    let layer = LAYERS.iter().position(|layer| layer.contains(&module));
    layer.unwrap_or_else(|| panic!("the module `{module}` is in no layer: give it one in LAYERS"))
}

/// What is wrong with the imports of one file.
fn ups(name: &str, text: &str) -> Vec<String> {
    let (module, code) = (module_of(name), code(text));
    let layer = layer_of(module);
    let up = imports(&code).into_iter().filter(|import| layer_of(import) > layer);
    up.map(|import| format!("{name} imports `{import}`, which is above `{module}`")).collect()
}

#[test]
fn no_import_runs_back_up() {
    let sources = sources();
    let inside = sources.iter().filter(|(name, _)| !OUTSIDE.contains(&module_of(name)));
    let wrong: Vec<String> = inside
        .filter(|(name, _)| !is_test(name))
        .flat_map(|(name, text)| ups(name, text))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_import_that_runs_back_up_is_seen() {
    for (name, text) in [
        ("guests/process.rs", "use crate::live_update::next_host;\n"),
        ("live_update/outgoing.rs", "fn f() { crate::host::kernel_name() }\n"),
        ("vm/serve.rs", "use crate::{api, bus};\n"),
    ] {
        assert_eq!(ups(name, text).len(), 1, "{name}");
    }
    assert!(ups("host/mod.rs", "use crate::live_update::outgoing;\n// crate::cli\n").is_empty());
}

#[test]
fn the_page_shows_the_layers() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let drawn: Vec<String> = LAYERS.iter().rev().map(|layer| layer.join("  ")).collect();
    let mut rest = page.as_str();
    for line in drawn {
        let found = rest.find(&line);
        let at = found.unwrap_or_else(|| panic!("ARCHITECTURE.md does not draw `{line}` here"));
        rest = &rest[at..];
    }
}

#[test]
fn the_leaf_crates_know_no_other_crate_of_the_workspace() {
    let workspace = ["guest-mem", "luo", "kexec", "vmm", "perennial-tests", FOR_TESTS];
    for leaf in LEAVES {
        let text = fs::read_to_string(root().join(leaf).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = toml::from_str(&text).unwrap();
        for (table, allowed) in [
            ("dependencies", None),
            ("build-dependencies", None),
            ("dev-dependencies", Some(FOR_TESTS)),
        ] {
            let Some(table) = manifest.get(table) else { continue };
            for name in table.as_table().unwrap().keys() {
                let known = workspace.contains(&name.as_str()) && Some(name.as_str()) != allowed;
                assert!(!known, "{leaf} depends on {name}");
            }
        }
    }
}

/// The catalog's kinds: the keys of the configuration and the names of the nodes.
fn kinds() -> Vec<&'static str> {
    vmm::devices::catalog::KINDS.iter().map(|kind| kind.name).collect()
}

#[test]
fn nothing_above_the_devices_names_a_kind_of_device() {
    let allowed = ["devices/", "fuzz/"];
    // The host's own control port is a port like those of the guests' consoles.
    let control_port = "crate::devices::serial::open_port";
    for (name, text) in sources() {
        if is_test(&name) || allowed.iter().any(|folder| name.starts_with(folder)) {
            continue;
        }
        let code = code(&text).replace(control_port, "");
        for kind in kinds() {
            assert!(!code.contains(&format!("\"{kind}\"")), "{name} names `{kind}`");
        }
        for folder in
            ["serial::", "virtio::block", "virtio::rng", "DeviceOptions::", "DeviceState::"]
        {
            let path = format!("devices::{folder}");
            let uses = match folder.starts_with("Device") {
                // Their functions are for everybody, their variants for the catalog.
                true => code.match_indices(folder).any(|(at, _)| {
                    code[at + folder.len()..].starts_with(|c: char| c.is_uppercase())
                }),
                false => code.contains(&path),
            };
            assert!(!uses, "{name} names a kind of device: {folder}");
        }
    }
}

#[test]
fn a_state_is_saved_field_by_field() {
    for (name, text) in sources() {
        if is_test(&name) || name == "state/mod.rs" {
            continue;
        }
        let code = code(&text);
        for opening in ["    fn save(&self) -> Result<", "    fn encode(&self, node: &mut Node) {"]
        {
            for (at, _) in code.match_indices(opening) {
                let body = code[at..].split("\n    }\n").next().unwrap();
                // A declaration has no body.
                if !body.contains('{') {
                    continue;
                }
                assert!(
                    body.contains("let Self") || body.contains("match self"),
                    "{name}: it must destructure `self`, so that a new field cannot be forgotten:\n{body}"
                );
                let open = body.find("let Self").map_or("", |at| &body[at..]);
                let pattern = open.split(" = ").next().unwrap_or_default();
                assert!(!pattern.contains(".."), "{name}: `..` hides new fields:\n{body}");
            }
        }
    }
}

/// What stands in backticks or as the target of a link, and looks like a path of this repository.
fn paths_in(page: &str) -> BTreeSet<&str> {
    let quoted = page.split('`').skip(1).step_by(2);
    let linked = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    quoted
        .chain(linked)
        .map(|text| text.split(['#', ' ']).next().unwrap_or_default().trim_end_matches('/'))
        .filter(|text| WHERE_PATHS_BEGIN.iter().any(|begin| text.starts_with(begin)))
        // Patterns and placeholders.
        .filter(|text| !text.contains(['*', '<', '{', '$']) && !text.contains("NAME"))
        .collect()
}

#[test]
fn no_page_names_a_path_that_is_not_there() {
    let mut pages = Vec::new();
    files(&root().join("docs"), "md", &mut pages);
    for page in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "SECURITY.md"] {
        pages.push(root().join(page));
    }
    let mut named = 0;
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for path in paths_in(&text) {
            named += 1;
            let path = path.split("::").next().unwrap();
            assert!(root().join(path).exists(), "{} names `{path}`", page.display());
        }
    }
    assert!(named > 40, "{named}");
    assert_eq!(paths_in("see `vmm/src/nowhere.rs` and [x](docs/x.md#y)").len(), 2);
}
