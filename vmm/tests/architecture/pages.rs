//! Pages name only paths that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::root;

/// Folders below which a page's paths may begin: the repository, and the sources of its crates, which
/// pages name without `vmm/src/` where the text is about that crate.
const BELOW: [&str; 3] = ["", "vmm/src", "luo/src"];

/// The first folders of paths in this repository. A text that begins with another name is a path of a
/// host, a guest or another project.
fn beginnings() -> BTreeSet<String> {
    let folders = |below: &&str| fs::read_dir(root().join(below)).unwrap();
    let entries = BELOW.iter().flat_map(folders).map(Result::unwrap);
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    let mut names: BTreeSet<String> =
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.remove("target");
    names
}

/// The texts of a page in backticks that look like paths of this repository.
fn paths_in<'page>(page: &'page str, beginnings: &BTreeSet<String>) -> BTreeSet<&'page str> {
    let quoted = page.split('`').skip(1).step_by(2);
    quoted
        .map(|text| text.split(['#', ' ']).next().unwrap_or_default().trim_end_matches('/'))
        .filter(|text| {
            let first = text.split_once('/').map(|(first, _)| first);
            first.is_some_and(|first| beginnings.contains(first))
        })
        // Patterns and placeholders.
        .filter(|text| !text.contains(['*', '<', '{', '$']) && !text.contains("NAME"))
        .map(|text| text.split("::").next().unwrap())
        .collect()
}

/// The targets of a page's links to other files, which are relative to the page.
fn links_in(page: &str) -> BTreeSet<&str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://"))
        .map(|target| target.split('#').next().unwrap())
        .filter(|target| !target.is_empty())
        .collect()
}

fn exists(path: &str) -> bool {
    BELOW.iter().any(|below| root().join(below).join(path).exists())
}

#[test]
fn no_page_names_a_path_that_does_not_exist() {
    let beginnings = beginnings();
    let mut pages: Vec<PathBuf> =
        ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "SECURITY.md"]
            .iter()
            .map(|page| root().join(page))
            .collect();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let page = entry.unwrap().path();
        if page.extension().is_some_and(|extension| extension == "md") {
            pages.push(page);
        }
    }
    let (mut named, mut wrong) = (0, Vec::new());
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for path in paths_in(&text, &beginnings) {
            named += 1;
            if !exists(path) {
                wrong.push(format!("{} names `{path}`", page.display()));
            }
        }
        for link in links_in(&text) {
            named += 1;
            if !page.parent().unwrap().join(link).exists() {
                wrong.push(format!("{} links to `{link}`", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(named > 40, "{named}");
}

#[test]
fn a_path_that_does_not_exist_is_seen() {
    let page =
        "`vmm/src/nowhere.rs`, `devices/nowhere/`, `/dev/kvm`, [a](x.md#y), [b](https://c.d)";
    let paths = paths_in(page, &beginnings());
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert!(paths.iter().all(|path| !exists(path)));
    assert_eq!(links_in(page).into_iter().collect::<Vec<_>>(), ["x.md"]);
}
