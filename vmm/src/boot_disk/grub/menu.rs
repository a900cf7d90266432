//! GRUB's menu: the entries and submenus that a script has, and which of them is the default.

use super::GrubError;
use super::shell::Shell;
use super::syntax::{Command, Kept};

/// An entry of the menu, or a submenu.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) title: String,
    pub(super) id: Option<String>,
    /// Whether the script makes another menu instead of booting something.
    pub(super) is_submenu: bool,
    pub(super) script: Kept,
    /// The arguments behind the options: `$1` and so on in the script.
    pub(super) arguments: Vec<String>,
}

impl Entry {
    /// Reads the arguments of `menuentry` and `submenu`: `TITLE [--class C] [--id ID] ... [ARGUMENT...]`.
    pub(super) fn new(words: &[String], script: Kept, is_submenu: bool) -> Self {
        let (mut id, mut arguments) = (None, Vec::new());
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.split_once('=').map_or((word.as_str(), None), |(a, b)| (a, Some(b))) {
                (name @ ("--id" | "--class" | "--users" | "--hotkey" | "--source"), value) => {
                    let value = value.map(str::to_owned).or_else(|| words.next().cloned());
                    if name == "--id" {
                        id = value;
                    }
                }
                (name, _) if name.starts_with("--") => {}
                _ => arguments.push(word.clone()),
            }
        }
        let title = arguments.first().cloned().unwrap_or_default();
        Self { title, id, is_submenu, script, arguments }
    }

    /// The entry `id` that runs these commands.
    pub(super) fn of_commands(title: String, id: &str, commands: Vec<Command>) -> Self {
        let (arguments, id) = (vec![title.clone()], Some(id.to_owned()));
        Self { title, id, is_submenu: false, script: Kept::new(commands), arguments }
    }

    fn is_called(&self, name: &str) -> bool {
        self.title == name || self.id.as_deref() == Some(name)
    }
}

/// Runs the submenus on the way to the entry `path`, and returns that. The path has a name for each level, with `>`
/// between: an entry's number from 0, its title or its identifier. Where there is no such entry the first one counts,
/// as in GRUB.
pub(super) fn entry(shell: &mut Shell<'_>, path: &str) -> Result<Entry, GrubError> {
    let mut path = levels(path).into_iter();
    // Each level is a submenu in the script, whose nesting is bounded.
    loop {
        let entries = std::mem::take(&mut shell.entries);
        let name = path.next().unwrap_or_default();
        let numbered = name.parse().ok().and_then(|index: usize| entries.get(index));
        let chosen = numbered.or_else(|| entries.iter().find(|entry| entry.is_called(&name)));
        let chosen = chosen.or(entries.first()).ok_or(GrubError::NoEntries)?.clone();
        if !chosen.is_submenu {
            return Ok(chosen);
        }
        shell.enter(&chosen)?;
    }
}

/// Most levels of submenus whose entries are visited.
const LEVELS: usize = 4;

/// Calls `visitor` with each entry of the menu and of its submenus, in order, and a shell in which it can be started.
/// Ends when it returns false. Submenus that cannot be run are left out.
pub(super) fn visit<'v>(
    menu: &Shell<'v>,
    visitor: &mut dyn FnMut(Shell<'v>, &Entry) -> bool,
) -> bool {
    menu.entries.iter().all(|entry| {
        let mut shell = menu.clone();
        shell.entries.clear();
        if !entry.is_submenu {
            return visitor(shell, entry);
        }
        let run = shell.enter(entry);
        run.is_err() || shell.level > LEVELS || visit(&shell, visitor)
    })
}

/// Splits at `>`; `>>` is the character itself.
fn levels(default: &str) -> Vec<String> {
    let mut levels = vec![String::new()];
    let mut chars = default.chars().peekable();
    while let Some(c) = chars.next() {
        match levels.last_mut() {
            Some(level) if c != '>' || chars.next_if_eq(&'>').is_some() => level.push(c),
            _ => levels.push(String::new()),
        }
    }
    levels
}
