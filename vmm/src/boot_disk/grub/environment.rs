//! GRUB's variables, and its environment block: `grubenv`, a file of 1,024 bytes with lines of `NAME=VALUE`.

use std::collections::BTreeMap;
use std::ops::Range;

use super::GrubError;

/// Most variables, and most bytes of a value.
const MOST: usize = 1000;
const VALUE_MAX: usize = 16 << 10;

const SIGNATURE: &[u8] = b"# GRUB Environment Block\n";

/// Variables that stand for one boot only: the scripts that `grub-mkconfig` makes clear them in the environment block,
/// by `save_env`, before they use them.
const ONCE: [&str; 2] = ["next_entry", "prev_saved_entry"];

/// The variables.
#[derive(Debug, Clone)]
pub(super) struct Variables(BTreeMap<String, String>);

impl Variables {
    /// The variables that GRUB sets itself, as a BIOS build of version 2.06 or later does.
    pub(super) fn new(prefix: &str, root: &str) -> Self {
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let features = ["menuentry_id", "default_font_path", "platform_search_hint"];
        let features =
            features.into_iter().chain(["all_video_module", "timeout_style", "200_final"]);
        let features = features.map(|name| set(&format!("feature_{name}"), "y"));
        let own =
            [("grub_platform", "pc"), ("grub_cpu", "i386"), ("prefix", prefix), ("root", root)];
        let own = own.into_iter().chain([("config_directory", prefix)]);
        Self(features.chain(own.map(|(name, value)| set(name, value))).collect())
    }

    pub(super) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<(), GrubError> {
        if value.len() > VALUE_MAX || name.len() > VALUE_MAX {
            return Err(GrubError::TooMuch("a variable has more than 16 KiB"));
        }
        self.0.insert(name.to_owned(), value.to_owned());
        match self.0.len() > MOST {
            true => Err(GrubError::TooMuch("there are more than 1000 variables")),
            false => Ok(()),
        }
    }

    pub(super) fn unset(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Sets the variables of an environment block: all, or those called `names`. Those for one boot only are left out
    /// unless `once`. Returns whether one of them was set; `None` if this is no environment block.
    pub(super) fn load(
        &mut self,
        block: &[u8],
        names: &[String],
        once: bool,
    ) -> Result<Option<bool>, GrubError> {
        let Some(entries) = entries(block) else { return Ok(None) };
        let mut any_once = false;
        for Entry { name, value, .. } in entries {
            let wanted = names.is_empty() || names.contains(&name);
            let is_once = ONCE.contains(&name.as_str());
            if wanted && (once || !is_once) {
                any_once |= is_once && !value.is_empty();
                self.set(&name, &value)?;
            }
        }
        Ok(Some(any_once))
    }

    /// The block with the values that the variables `names` have now; a variable that is not set is removed. `None` if
    /// this is no environment block, or if it has no room for them.
    pub(super) fn save(&self, block: &[u8], names: &[String]) -> Option<Vec<u8>> {
        names.iter().try_fold(block.to_vec(), |block, name| {
            saved(&block, name, self.0.get(name).map(String::as_str))
        })
    }
}

/// A variable in an environment block.
struct Entry {
    name: String,
    value: String,
    /// Its line in the block, with the end of the line.
    line: Range<usize>,
}

/// The variables in an environment block, or `None` if it does not begin as one. A `#` at the beginning of a line
/// begins a comment; a backslash takes away the meaning of the character behind it, an end of line included. What
/// is not UTF-8 is replaced.
fn entries(block: &[u8]) -> Option<Vec<Entry>> {
    let mut at = block.starts_with(SIGNATURE).then_some(SIGNATURE.len())?;
    let mut entries = Vec::new();
    while at < block.len() {
        let end = line_end(block, at);
        let line = block.get(at..end).unwrap_or_default();
        let split = line.iter().position(|byte| *byte == b'=').filter(|_| line[0] != b'#');
        if let Some(split) = split {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let value = line[split + 1..].strip_suffix(b"\n").unwrap_or(&line[split + 1..]);
            let (name, value) = (text(&line[..split]), unescape(&text(value)));
            entries.push(Entry { name, value, line: at..end });
        }
        at = end;
    }
    Some(entries)
}

/// Where the line that begins at `at` ends: behind its end of line.
fn line_end(block: &[u8], mut at: usize) -> usize {
    // A comment has no backslashes with a meaning.
    let is_comment = block.get(at) == Some(&b'#');
    loop {
        match block.get(at) {
            None => return block.len(),
            Some(b'\\') if !is_comment => at += 2,
            Some(b'\n') => return at + 1,
            Some(_) => at += 1,
        }
    }
}

/// The block with one variable changed or, without a value, removed. The block keeps its length: `#` fills its
/// end.
fn saved(block: &[u8], name: &str, value: Option<&str>) -> Option<Vec<u8>> {
    let used = block.len() - block.iter().rev().take_while(|byte| **byte == b'#').count();
    let found = entries(block)?.into_iter().find(|entry| entry.name == name);
    let line = value.map_or(String::new(), |value| format!("{name}={}\n", escape(value)));
    let place = found.map_or(used..used, |entry| entry.line);
    // A line that was cut, or bytes behind the last line, would become a part of the new one.
    let is_whole = |end: usize| end <= used && block[..end].ends_with(b"\n");
    if !is_whole(place.start) || !is_whole(place.end) || name.contains(['=', '\n', '#', '\\']) {
        return None;
    }
    let mut new = [&block[..place.start], line.as_bytes(), &block[place.end..used]].concat();
    if new.len() > block.len() {
        return None;
    }
    new.resize(block.len(), b'#');
    Some(new)
}

fn escape(value: &str) -> String {
    let escape = |c| ['\\', '\n'].contains(&c).then_some('\\').into_iter().chain([c]);
    value.chars().flat_map(escape).collect()
}

fn unescape(value: &str) -> String {
    let mut chars = value.chars();
    let mut plain = String::new();
    while let Some(c) = chars.next() {
        plain.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    plain
}
