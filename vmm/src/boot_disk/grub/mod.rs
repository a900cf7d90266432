//! The entry that GRUB would boot, by its configuration as Debian and others write it.
//!
//! ```text
//!   grub.cfg --syntax--> script --shell--> menu entries, `default` --menu--> one entry --shell--> linux, initrd
//! ```
//!
//! Scripts run with GRUB's own commands, as far as these bear on what is booted. What `save_env` would write into the
//! environment block is part of the answer; writing it is left to the caller. An entry for the next boot only
//! (`grub-reboot`) would be booted for ever if the caller could not write that it was used: then the caller takes
//! the next one, which is the default without it. The text is the guest's: the number of commands, the entries and the sizes of
//! values are bounded.

mod environment;
mod menu;
mod shell;
mod syntax;
#[cfg(test)]
mod tests;

use super::{excerpt, loader_spec};

/// A configuration does not say what to boot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum GrubError {
    #[error("it cannot be parsed: {0}")]
    Syntax(&'static str),
    #[error("it cannot be parsed: `{0}` is missing")]
    Missing(&'static str),
    #[error("it has too much of something: {0}")]
    TooMuch(&'static str),
    #[error("it has no menu entries")]
    NoEntries,
    #[error("its default entry `{0}` has no `linux` command, and nothing else can be booted")]
    NoKernel(String),
    #[error("its default entry `{entry}` names the device `{device}`, which is not on this disk")]
    Device { entry: String, device: String },
}

/// The file systems of a disk, as GRUB's scripts see them. Numbers stand for file systems.
pub(super) trait Volumes {
    /// The file system of GRUB's device `name`, such as `hd0,gpt1`.
    fn by_name(&self, name: &str) -> Option<usize>;
    /// GRUB's name of a file system's device.
    fn name(&self, volume: usize) -> String;
    /// The file system with this UUID.
    fn by_uuid(&self, uuid: &str) -> Option<usize>;
    /// The file system with this label.
    fn by_label(&self, label: &str) -> Option<usize>;
    /// The first file system that has this file.
    fn by_file(&self, path: &str) -> Option<usize>;
    /// The contents of a text file, if there is one of a bounded size.
    fn read(&self, volume: usize, path: &str) -> Option<Vec<u8>>;
    /// The names in a directory, as many as are bounded.
    fn list(&self, volume: usize, directory: &str) -> Vec<String>;
    /// Whether there is something at `path`: the length of a file, `None` in it for a directory.
    fn look(&self, volume: usize, path: &str) -> Option<Option<u64>>;
}

/// A file on one of the disk's file systems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) volume: usize,
    pub(super) path: String,
}

/// What an entry boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The title in the menu.
    pub(super) title: String,
    pub(super) kernel: Place,
    /// Files that make up the initramfs, one behind the other.
    pub(super) initramfs: Vec<Place>,
    pub(super) cmdline: String,
    /// Whether this is the entry that the environment block has for this boot only.
    pub(super) is_once: bool,
    /// What has to be written before the entry is booted.
    pub(super) saves: Vec<Save>,
}

/// New contents of an environment block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Save {
    pub(super) place: Place,
    /// What the file has, and what it is to have. The lengths are equal.
    pub(super) old: Vec<u8>,
    /// `None` if the block is damaged or has no room.
    pub(super) new: Option<Vec<u8>>,
}

/// The entries of a configuration in the order in which they are tried.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// At least one, the default entry first.
    pub(super) entries: Vec<Chosen>,
    /// Boot loader entries that are left out, and why.
    pub(super) skipped: Vec<(Place, String)>,
}

/// Most entries that are returned behind the default one.
const OTHERS: usize = 32;

/// Returns what GRUB would boot by its configuration at `path` of `volume`, whose text is `text`, and behind it what
/// may take its place if its files are damaged: the default entry, if the first is one for this boot only; the entries
/// that the variable `fallback` names; then all entries in the order of the menu. Errors if the first one cannot be
/// booted whatever its files are; others of that kind are left out.
pub(super) fn choose(
    volumes: &dyn Volumes,
    volume: usize,
    path: &str,
    text: &str,
) -> Result<Choice, GrubError> {
    let script = syntax::parse(text)?;
    let prefix = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let run = |once| {
        let mut shell = shell::Shell::new(volumes, volume, prefix, once);
        shell.run(&script).map(|_| shell)
    };
    let start = |mut shell: shell::Shell<'_>, default: Option<&str>| {
        let default = default.unwrap_or(shell.variables.get("default")).to_owned();
        let entry = menu::entry(&mut shell, &default)?;
        shell.start(&entry)
    };
    let mut menu = run(true)?;
    let skipped = std::mem::take(&mut menu.skipped);
    let first = start(menu.clone(), None)?;
    // The script saves that the entry for this boot is used, whichever is booted in its place. What an entry
    // saves itself, such as that it is the default from now on, is for an entry that was chosen.
    let saves = menu.saves.clone();
    let mut others = Vec::new();
    if first.is_once {
        others.extend(run(false).and_then(|menu| start(menu, None)));
    }
    for name in menu.variables.get("fallback").split_whitespace() {
        others.extend(start(menu.clone(), Some(name)));
    }
    menu::visit(&menu, &mut |shell, entry| {
        others.extend(shell.start(entry));
        others.len() < OTHERS
    });
    let others = others.into_iter().take(OTHERS);
    let others = others.map(|other| Chosen { is_once: false, saves: saves.clone(), ..other });
    Ok(Choice { entries: [first].into_iter().chain(others).collect(), skipped })
}

/// Whether a configuration takes its entries from those of the Boot Loader Specification, as Fedora's do.
pub(super) fn uses_loader_entries(text: &str) -> bool {
    text.lines().any(|line| line.split_whitespace().next() == Some("blscfg"))
}

/// Puts the values that the variables have in the environment block into an entry that is written for GRUB, for a disk
/// without GRUB's configuration.
pub(super) fn expand(entry: &mut loader_spec::Entry, block: &[u8]) -> Result<(), String> {
    let mut variables = environment::Variables::new("", "");
    variables.load(block, &[], false).map_err(|error| error.to_string())?;
    entry.expand(&|name| variables.get(name).to_owned()).map_err(|error| error.to_string())
}

/// Whether a configuration ends in the middle of a command, as GRUB reads it.
pub(super) fn is_cut_off(text: &str) -> bool {
    syntax::parse(text).is_err()
}

/// Returns the beginnings of a configuration that was cut off, the longest first: each ends with the end of an entry or
/// a function. GRUB runs a script command by command, up to where it cannot be parsed.
pub(super) fn beginnings(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.rmatch_indices("\n}\n").map(|(at, end)| at + end.len());
    ends.take(OTHERS).map(|end| &text[..end])
}
