//! GRUB's variables, and its environment block: `grubenv`, a file of 1,024 bytes with lines of `NAME=VALUE`.

use std::collections::BTreeMap;

use super::GrubError;

/// Most variables, and most bytes of a value.
const MOST: usize = 1000;
const VALUE_MAX: usize = 16 << 10;

const SIGNATURE: &str = "# GRUB Environment Block\n";

/// Variables that are not read from an environment block: see the description of [`super`].
const ONCE: [&str; 2] = ["next_entry", "prev_saved_entry"];

/// The variables.
#[derive(Debug)]
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

    /// Sets the variables of an environment block: all, or those called `names`. Returns whether it is one.
    pub(super) fn load(&mut self, block: &str, names: &[String]) -> Result<bool, GrubError> {
        let Some(lines) = block.strip_prefix(SIGNATURE) else { return Ok(false) };
        for line in lines.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.split_once('=') else { continue };
            let wanted = names.is_empty() || names.iter().any(|wanted| wanted == name);
            if wanted && !ONCE.contains(&name) {
                self.set(name, &unescape(value))?;
            }
        }
        Ok(true)
    }
}

fn unescape(value: &str) -> String {
    let mut chars = value.chars();
    let mut plain = String::new();
    while let Some(c) = chars.next() {
        plain.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    plain
}
