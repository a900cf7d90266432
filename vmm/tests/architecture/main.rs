//! The architecture as ARCHITECTURE.md draws it, held against the sources. Each rule is a function from
//! one source file to what is wrong with the file; one test applies it to the whole crate, another shows
//! that it sees the ways in which code can break the rule.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod pages;
mod saved;
mod source;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use source::{Source, sources, strings};

/// The modules of `vmm/src` from the ground up. A module imports from its own layer and from those
/// below. ARCHITECTURE.md shows the same list.
const LAYERS: &[&[&str]] = &[
    &[
        "mutex",
        "open_files",
        "work",
        "look",
        "causes",
        "options",
        "socket",
        "inherited_fd",
        "answer",
        "random",
        "signals",
        "confine",
        "bus",
        "state",
        "boot_disk",
    ],
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
/// The crate's roots: they name every module, or the one that they start.
const ROOTS: [&str; 2] = ["lib", "main"];

/// Crates that only some modules may name, with these modules.
const OWNED: &[(&[&str], &[&str])] = &[
    // One module knows that a state document is an FDT.
    (&["vm_fdt", "dtoolkit"], &["state::document"]),
    // A device never sees a session, a token or a memfd, and neither does a machine.
    (&["luo"], &["guests", "live_update", "host", "cli"]),
    (&["guest_mem"], &["link", "vm", "guests", "live_update", "api", "host"]),
    (&["kexec"], &["live_update", "host"]),
    // A device asks for interrupts and doorbells, not for KVM.
    (&["kvm_ioctls", "kvm_bindings"], &["arch", "kvm", "vcpu", "vm"]),
    (&["linux_loader"], &["arch"]),
    // File systems with bytes of a guest are read in the VM's process only; the host makes one for a seed.
    (&["ext4_view"], &["boot_disk"]),
    (&["fatfs"], &["boot_disk", "devices::virtio::seed"]),
    // JSON is for the edges: clients, the link to a VM's process, and what the next host tells in a rehearsal.
    (&["serde_json"], &["link", "api", "cli", "live_update::rehearsal::report"]),
];

/// What the rest of the crate may know of devices. None of it is a kind of device.
const OF_DEVICES: &[&str] = &[
    "catalog",
    "files",
    "identity",
    // File descriptors that `perennial run` lends to devices.
    "inherited",
    "interface",
    "kind",
    "network",
    // The devices of the VM of a rehearsal.
    "observed",
    "pci",
    "power",
    // How the storage of a device does, for the VM's status.
    "storage",
    // What a device takes for itself of its host.
    "claims",
    // What a device needs of its host besides its files.
    "needs",
    // The terminal of the process, which `perennial run` lends to devices.
    "terminal",
    // The window that the guest physical address space has for each virtio function.
    "virtio::pci::BAR_SIZE",
    "Device",
    "DeviceError",
];
/// A file that may name one thing more.
const EXCEPTIONS: &[(&str, &str)] = &[
    // The host's control port is a port like those of the guests' consoles.
    ("host/port.rs", "serial::open_port"),
    ("host/port.rs", "serial::open_port_now"),
];
/// A file that may have a word that is also a kind's key, with another meaning.
const OTHER_MEANINGS: &[(&str, &str)] = &[
    // The node of the parts that belong to the architecture. The key is Cloud Hypervisor's word for what the
    // machine's tables say.
    ("vm/state.rs", "platform"),
    // An argument of `resize-disk`.
    ("api/arguments.rs", "disk"),
];

/// The crates that know no other crate of the workspace.
const LEAVES: [&str; 3] = ["guest-mem", "luo", "kexec"];
/// Supports fuzz targets. Only the tests of a leaf may use it, and fuzzers.
const FUZZ: &str = "perennial-fuzz";
/// What only the tests of a leaf may use.
const FOR_TESTS: [&str; 2] = [FUZZ, "perennial-doubles"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// What `rule` finds wrong in all non-test sources of the crate.
fn wrong(rule: impl Fn(&Source) -> Vec<String>) -> Vec<String> {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(sources.len() > 80, "{}", sources.len());
    sources.iter().flat_map(rule).collect()
}

fn layer_of(module: &str) -> usize {
    let layer = LAYERS.iter().position(|layer| layer.contains(&module));
    layer.unwrap_or_else(|| panic!("`crate::{module}` is in no layer: give it one in LAYERS"))
}

/// Imports from a layer above the file's own.
fn imports_from_above(source: &Source) -> Vec<String> {
    if ROOTS.contains(&source.top()) {
        return Vec::new();
    }
    let layer = layer_of(source.top());
    let modules: BTreeSet<String> = (source.paths().into_iter())
        .filter(|path| path[0] == "crate")
        .map(|path| path[1].clone())
        .collect();
    let above = modules.iter().filter(|module| layer_of(module) > layer);
    above.map(|module| format!("{} imports `{module}`, which is above it", source.name)).collect()
}

#[test]
fn no_import_runs_back_up() {
    assert_eq!(wrong(imports_from_above), Vec::<String>::new());
}

#[test]
fn an_import_that_runs_back_up_is_seen_however_it_is_written() {
    for text in [
        "use crate::host::serve;",
        "use crate::{bus, host::{self, serve}};",
        "use super::super::host::serve;",
        "use crate::bus::Bus; fn f() { let x = crate::host::start(); }",
        "fn f(host: &crate::host::Host) {}",
        "pub use crate::host as below;",
        "use crate::host::*;",
        "fn f() { println!(\"{}\", crate::host::NAME); }",
        "mod inner { fn f() { crate::host::start() } }",
        "#[cfg(not(test))] use crate::host::serve;",
        "impl From<crate::host::HostError> for u8 {}",
    ] {
        let source = Source::parse("guests/process.rs", &["guests", "process"], text);
        assert_eq!(imports_from_above(&source).len(), 1, "{text}");
    }
    for text in [
        "use crate::{bus, guests::files};",
        "// crate::host\n/// [`crate::host`]\nfn f() { \"crate::host\"; }",
        "#[cfg(test)] mod tests { use crate::host; }",
        "use super::host;",
        "pub(in crate::guests) fn f() {}",
    ] {
        let source = Source::parse("guests/process.rs", &["guests", "process"], text);
        assert_eq!(imports_from_above(&source), Vec::<String>::new(), "{text}");
    }
}

#[test]
#[should_panic(expected = "`crate::Host` is in no layer")]
fn a_name_that_the_root_of_the_crate_exports_is_in_no_layer() {
    let source = Source::parse("guests/guest.rs", &["guests", "guest"], "use crate::Host;");
    imports_from_above(&source);
}

#[test]
fn the_page_shows_the_layers() {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let drawn: Vec<String> = LAYERS.iter().rev().map(|layer| layer.join("  ")).collect();
    let block = drawn.join("\n");
    assert!(
        page.contains(&format!("```\n{block}\n```")),
        "ARCHITECTURE.md does not draw:\n{block}"
    );
}

/// Uses of a crate outside the modules that own it.
fn foreign_crates(source: &Source) -> Vec<String> {
    let module = source.module.join("::");
    let owns = |owner: &&str| module == **owner || module.starts_with(&format!("{owner}::"));
    let named: BTreeSet<String> = source.paths().into_iter().map(|path| path[0].clone()).collect();
    let owned = OWNED.iter().filter(|(_, owners)| !owners.iter().any(owns));
    let foreign = owned.flat_map(|(crates, _)| crates.iter()).filter(|name| named.contains(**name));
    foreign.map(|name| format!("{} names the crate `{name}`", source.name)).collect()
}

#[test]
fn each_crate_is_named_only_where_it_belongs() {
    assert_eq!(wrong(foreign_crates), Vec::<String>::new());
}

#[test]
fn a_crate_that_is_named_elsewhere_is_seen() {
    let device = |text| Source::parse("devices/power.rs", &["devices", "power"], text);
    for text in
        ["use luo::Token;", "use luo as l;\nfn f(t: l::Token) {}", "fn f(t: ::luo::Token) {}"]
    {
        assert_eq!(foreign_crates(&device(text)).len(), 1, "{text}");
    }
    // A module of the same name is another thing.
    let cli = "mod kexec;\nfn f() { kexec::run() }";
    assert!(foreign_crates(&Source::parse("cli/mod.rs", &["cli"], cli)).is_empty());
}

/// Mentions of a kind of device in a file outside `devices`.
fn kinds_of_device(source: &Source) -> Vec<String> {
    if source.top() == "devices" {
        return Vec::new();
    }
    let allowed = |path: &str| {
        let within = |&known: &&str| path == known || path.starts_with(&format!("{known}::"));
        OF_DEVICES.iter().any(within) || EXCEPTIONS.contains(&(source.name.as_str(), path))
    };
    let mut found = Vec::new();
    for path in source.paths() {
        let Some(path) = path.join("::").strip_prefix("crate::devices::").map(str::to_owned) else {
            continue;
        };
        // The catalog's functions are for all modules, its variants (the kinds) are not.
        let variant = ["DeviceOptions::", "DeviceState::"].iter().any(|of| {
            let name = path.split_once(of).map(|(_, name)| name);
            name.is_some_and(|name| name.starts_with(char::is_uppercase))
        });
        if variant || !allowed(&path) {
            found.push(format!("{} names `devices::{path}`", source.name));
        }
    }
    let word = |text: &str, word: &str| {
        let is_part = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
        text.split(|c| !is_part(c)).any(|part| part == word)
    };
    for text in strings(&source.file) {
        if OTHER_MEANINGS.contains(&(source.name.as_str(), text.as_str())) {
            continue;
        }
        let kinds = vmm::devices::catalog::KINDS.iter();
        let named = kinds.filter(|kind| {
            text == kind.key || text == kind.name || {
                // "serial" alone is an English word too.
                kind.name.contains('-') && word(&text, kind.name)
            }
        });
        found.extend(named.map(|kind| format!("{} says `{}`: {text:?}", source.name, kind.name)));
    }
    found
}

#[test]
fn nothing_outside_the_devices_names_a_kind_of_device() {
    assert_eq!(wrong(kinds_of_device), Vec::<String>::new());
}

#[test]
fn a_kind_of_device_that_is_named_outside_is_seen_however_it_is_written() {
    for text in [
        "use crate::devices::virtio::block::BlockOptions;",
        "use crate::devices::{catalog, serial};",
        "use crate::devices as d;\nfn f(o: d::serial::SerialOptions) {}",
        "use crate::devices::catalog::DeviceOptions::*;\nuse crate::devices::serial;",
        "use crate::devices::catalog::DeviceOptions;\nfn f() { DeviceOptions::Serial(x) }",
        "use crate::devices::catalog::DeviceState as S;\nfn f() { S::VirtioBlk(x) }",
        "fn f() { matches!(o, crate::devices::catalog::DeviceOptions::VirtioRng(_)) }",
        "fn f() { \"virtio-blk\" }",
        "fn f() { format!(\"virtio-blk@{}\", 1) }",
        "fn f() { key == \"disk\" }",
    ] {
        let source = Source::parse("vm/board.rs", &["vm", "board"], text);
        assert_eq!(kinds_of_device(&source).len(), 1, "{text}");
    }
    let source =
        "use crate::devices::catalog::DeviceOptions;\nfn f() { DeviceOptions::read(n, p) }";
    assert!(kinds_of_device(&Source::parse("vm/board.rs", &["vm", "board"], source)).is_empty());
}

/// The crates of the workspace on which a leaf's manifest depends.
fn dependencies_of_leaf(text: &str) -> Vec<String> {
    let workspace = ["guest-mem", "luo", "kexec", "vmm", "perennial-tests"];
    let manifest: toml::Table = toml::from_str(text).unwrap();
    let mut tables = vec![&manifest];
    // `[target.'cfg(..)'.dependencies]` is a dependency too.
    if let Some(targets) = manifest.get("target").and_then(|value| value.as_table()) {
        tables.extend(targets.values().filter_map(|value| value.as_table()));
    }
    let mut found = Vec::new();
    for table in tables {
        for (kind, allowed) in [
            ("dependencies", &[][..]),
            ("build-dependencies", &[]),
            ("dev-dependencies", &FOR_TESTS),
        ] {
            let entries = table.get(kind).and_then(|value| value.as_table());
            for (name, value) in entries.into_iter().flatten() {
                let renamed = value.get("package").and_then(|value| value.as_str());
                let name = renamed.unwrap_or(name);
                let by_path = value.get("path").is_some();
                let is_ours = workspace.contains(&name) || FOR_TESTS.contains(&name) || by_path;
                if is_ours && !allowed.contains(&name) {
                    found.push(name.to_owned());
                }
            }
        }
    }
    found
}

#[test]
fn the_leaf_crates_know_no_other_crate_of_the_workspace() {
    for leaf in LEAVES {
        let text = std::fs::read_to_string(root().join(leaf).join("Cargo.toml")).unwrap();
        let found: Vec<String> = dependencies_of_leaf(&text)
            .into_iter()
            // Only fuzzers compile it.
            .filter(|name| name != FUZZ || !text.contains("[target.'cfg(fuzzing)'.dependencies]"))
            .collect();
        assert_eq!(found, Vec::<String>::new(), "{leaf}");
    }
}

#[test]
fn a_leaf_that_knows_another_crate_is_seen() {
    for text in [
        "[dependencies]\nluo.workspace = true",
        "[dependencies]\nsessions = { package = \"luo\", version = \"0.1\" }",
        "[dependencies]\nother = { path = \"../other\" }",
        "[target.'cfg(unix)'.dependencies]\nkexec.workspace = true",
        "[build-dependencies]\nvmm.workspace = true",
        "[dev-dependencies]\nguest-mem.workspace = true",
        "[dependencies]\nperennial-doubles.workspace = true",
    ] {
        assert_eq!(dependencies_of_leaf(text).len(), 1, "{text}");
    }
    let own = "[dependencies]\nlibc.workspace = true\n[dev-dependencies]\nperennial-fuzz.workspace = true\n\
               perennial-doubles.workspace = true";
    assert!(dependencies_of_leaf(own).is_empty());
}
