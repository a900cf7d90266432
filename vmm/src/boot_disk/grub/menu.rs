//! GRUB's menu: the entries and submenus that a script has, and which of them is the default.

use super::GrubError;
use super::shell::Shell;
use super::syntax::Kept;

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

    fn is_called(&self, name: &str) -> bool {
        self.title == name || self.id.as_deref() == Some(name)
    }
}

/// Runs the submenus on the way to the default entry, and returns that. The variable `default` has a name for
/// each level, with `>` between: an entry's number from 0, its title or its identifier. Where there is no
/// such entry the first one counts, as in GRUB.
pub(super) fn default_entry(shell: &mut Shell<'_>) -> Result<Entry, GrubError> {
    let default = shell.variables.get("default").to_owned();
    let mut path = levels(&default).into_iter();
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
        shell.choose(&chosen)?;
        shell.run_with(&chosen.arguments, &chosen.script)?;
    }
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
