//! The source files of a crate as the compiler finds them: from `lib.rs` along the `mod` declarations.
//! Each file is parsed, so a rule sees every path that the code names, however the code writes it:
//! in a `use` list, renamed, relative to `super`, or inside a macro's arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, File, Item, ItemMod, Macro, UseTree};

/// A path as segments: `crate::devices::kind` or, of another crate, `luo::Token`.
pub(crate) type Names = Vec<String>;

/// One source file that is not a test.
pub(crate) struct Source {
    /// Path below the crate's `src`: `devices/kind.rs`.
    pub(crate) name: String,
    /// The module that the file is, from the crate down: `["devices", "kind"]`.
    pub(crate) module: Names,
    /// The parsed file, without the items that only tests compile.
    pub(crate) file: File,
}

impl Source {
    /// Parses `text` as the file of `module`.
    pub(crate) fn parse(name: &str, module: &[&str], text: &str) -> Self {
        let mut file = syn::parse_file(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        file.items.retain(|item| !only_for_tests(attributes(item)));
        let module = module.iter().map(|&name| name.to_owned()).collect();
        Self { name: name.to_owned(), module, file }
    }

    /// The first module on the way to this file, or the name of a file that is no module.
    pub(crate) fn top(&self) -> &str {
        let file = || self.name.trim_end_matches(".rs");
        self.module.first().map_or_else(file, String::as_str)
    }

    /// Every path of two or more segments that the file names, resolved: paths into this crate begin
    /// with `crate`, paths into another crate with its name.
    pub(crate) fn paths(&self) -> BTreeSet<Names> {
        let mut aliases = Aliases { module: self.module.clone(), names: BTreeMap::new() };
        aliases.visit_file(&self.file);
        let mut uses = Paths { aliases, found: BTreeSet::new() };
        uses.visit_file(&self.file);
        uses.found
    }
}

/// The non-test sources below `src`, from `lib.rs` and `main.rs` down. Panics at a module whose file a
/// `#[path]` attribute names: the tree of the files would no longer be the tree of the modules.
pub(crate) fn sources(src: &Path) -> Vec<Source> {
    let mut found = Vec::new();
    for root in ["lib.rs", "main.rs"] {
        follow(src, PathBuf::from(root), Vec::new(), &mut found);
    }
    found
}

fn follow(src: &Path, file: PathBuf, module: Vec<String>, found: &mut Vec<Source>) {
    let text = fs::read_to_string(src.join(&file)).unwrap();
    let module: Vec<&str> = module.iter().map(String::as_str).collect();
    let source = Source::parse(file.to_str().unwrap(), &module, &text);
    for item in &source.file.items {
        let Item::Mod(ItemMod { attrs, ident, content: None, .. }) = item else { continue };
        let renamed = attrs.iter().any(|a| a.path().is_ident("path"));
        assert!(!renamed, "{}: `mod {ident}` has a #[path]", source.name);
        let mut child: Vec<String> = source.module.clone();
        child.push(ident.to_string());
        let folder: PathBuf = child.iter().collect();
        let (flat, nested) = (folder.with_extension("rs"), folder.join("mod.rs"));
        let file = if src.join(&flat).exists() { flat } else { nested };
        follow(src, file, child, found);
    }
    found.push(source);
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether an attribute leaves the item out of the program: `#[cfg(test)]`,
/// `#[cfg(any(test, fuzzing))]`.
fn only_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().filter(|a| a.path().is_ident("cfg")).any(|attribute| {
        let tokens = attribute.meta.require_list().unwrap().tokens.to_string();
        ["test", "any (test , fuzzing)", "any(test, fuzzing)"].contains(&tokens.as_str())
    })
}

/// What the names of a file stand for: its imports and its child modules.
struct Aliases {
    module: Names,
    names: BTreeMap<String, Names>,
}

impl Aliases {
    /// The full path of `path`, or `None` if its first segment is a name that the file defines itself
    /// or that the prelude has.
    fn resolve(&self, path: &[String]) -> Option<Names> {
        let (first, mut rest) = path.split_first()?;
        let inside = |module: &[String]| {
            let mut full = vec!["crate".to_owned()];
            full.extend_from_slice(module);
            full
        };
        let mut full = match first.as_str() {
            "crate" => inside(&[]),
            "self" => inside(&self.module),
            "super" => {
                let mut module = self.module.as_slice();
                module = &module[..module.len().saturating_sub(1)];
                while let Some(("super", after)) = rest.split_first().map(|(f, r)| (f.as_str(), r))
                {
                    module = &module[..module.len().saturating_sub(1)];
                    rest = after;
                }
                inside(module)
            }
            name => self.names.get(name).cloned().unwrap_or_else(|| vec![first.clone()]),
        };
        full.extend_from_slice(rest);
        Some(full)
    }

    fn take(&mut self, tree: &UseTree, prefix: &[String]) {
        each_use(tree, prefix, &mut |path, alias| {
            if let Some(full) = self.resolve(path)
                && alias != "*"
                // `use luo::{self}` and `use luo;` name the crate itself.
                && full.as_slice() != [alias]
            {
                self.names.insert(alias.to_owned(), full);
            }
        });
    }
}

impl<'ast> Visit<'ast> for Aliases {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.take(&item.tree, &[]);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        let mut child = vec!["crate".to_owned()];
        child.extend_from_slice(&self.module);
        child.push(item.ident.to_string());
        self.names.insert(item.ident.to_string(), child);
        visit::visit_item_mod(self, item);
    }
}

/// Calls `each` with every path of a `use` tree and the name that it gets in the file (`*` for all).
fn each_use(tree: &UseTree, prefix: &[String], each: &mut impl FnMut(&[String], &str)) {
    let with = |name: &dyn ToString| {
        let mut path = prefix.to_vec();
        path.push(name.to_string());
        path
    };
    match tree {
        UseTree::Path(path) => each_use(&path.tree, &with(&path.ident), each),
        UseTree::Group(group) => group.items.iter().for_each(|tree| each_use(tree, prefix, each)),
        UseTree::Glob(_) => each(&with(&"*"), "*"),
        UseTree::Name(name) if name.ident == "self" => {
            each(prefix, prefix.last().map_or("self", String::as_str));
        }
        UseTree::Name(name) => each(&with(&name.ident), &name.ident.to_string()),
        UseTree::Rename(rename) if rename.ident == "self" => {
            each(prefix, &rename.rename.to_string());
        }
        UseTree::Rename(rename) => each(&with(&rename.ident), &rename.rename.to_string()),
    }
}

struct Paths {
    aliases: Aliases,
    found: BTreeSet<Names>,
}

impl Paths {
    fn take(&mut self, path: &[String]) {
        self.found.extend(self.aliases.resolve(path).filter(|path| path.len() > 1));
    }

    /// Paths among the arguments of a macro, which are tokens and no syntax yet.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Names = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    if colons != 2 {
                        self.take(&std::mem::take(&mut path));
                    }
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                // `$crate` is `crate`.
                TokenTree::Punct(punct) if punct.as_char() == '$' => {}
                other => {
                    self.take(&std::mem::take(&mut path));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.take(&path);
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let mut all = Vec::new();
        each_use(&item.tree, &[], &mut |path, _| all.push(path.to_vec()));
        all.iter().for_each(|path| self.take(path));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Names = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.take(&names);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        self.tokens(item.tokens.clone());
    }

    /// `pub(in crate::x)` is no import.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    /// A derive or lint attribute is no import.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

/// The string literals of a file, those in macros' arguments included, and those in attributes not.
pub(crate) fn strings(file: &File) -> BTreeSet<String> {
    struct Strings(BTreeSet<String>);
    impl Strings {
        fn tokens(&mut self, tokens: TokenStream) {
            for token in tokens {
                match token {
                    TokenTree::Group(group) => self.tokens(group.stream()),
                    TokenTree::Literal(literal) => {
                        if let syn::Lit::Str(text) = syn::Lit::new(literal) {
                            self.0.insert(text.value());
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    impl<'ast> Visit<'ast> for Strings {
        fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
            self.0.insert(text.value());
        }

        fn visit_macro(&mut self, item: &'ast Macro) {
            self.tokens(item.tokens.clone());
        }

        fn visit_attribute(&mut self, _: &'ast Attribute) {}
    }
    let mut strings = Strings(BTreeSet::new());
    strings.visit_file(file);
    strings.0
}
