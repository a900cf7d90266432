//! Boot Loader Specification entries: `/loader/entries/*.conf` and unified kernel images in `/EFI/Linux`, with the
//! default in `/loader/loader.conf` (UAPI group, "The Boot Loader Specification", types 1 and 2; systemd's
//! loader.conf(5)).

use std::cmp::Ordering;

/// Most bytes of an entry, also with the values of its variables.
const ENTRY_MAX: usize = 64 << 10;
/// Most characters of a title. What is behind them is cut off.
const TITLE_MAX: usize = 256;
/// Most files of an initramfs.
const INITRDS: usize = 32;

/// One entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// The file's name without `.conf` or `.efi` and boot counters.
    id: String,
    /// Whether the boot counter says that all attempts failed.
    exhausted: bool,
    pub(super) title: String,
    version: String,
    machine_id: String,
    sort_key: String,
    /// The path of the kernel, or of the unified kernel image, on the file system of the entry.
    pub(super) linux: String,
    /// Whether that is a unified kernel image, with its own initramfs and command line.
    pub(super) is_unified: bool,
    /// The paths of the files that make up the initramfs.
    pub(super) initrds: Vec<String>,
    pub(super) options: String,
    /// Whether it is written for GRUB's command `blscfg`, as Fedora writes its entries: it has variables of GRUB.
    pub(super) is_for_grub: bool,
}

impl Entry {
    /// Parses an entry. `None` for one that cannot be booted here: without `linux`, or for another
    /// architecture. Errors if it is too long.
    pub(super) fn parse(file_name: &str, text: &str) -> Result<Option<Self>, TooLong> {
        let Some(name) = file_name.strip_suffix(".conf") else { return Ok(None) };
        if text.len() > ENTRY_MAX {
            return Err(TooLong::File);
        }
        let (id, exhausted) = counters(name);
        let mut entry = Self { id, exhausted, ..Self::default() };
        for (key, value) in settings(text) {
            match key {
                "title" => entry.title = value.chars().take(TITLE_MAX).collect(),
                "version" => value.clone_into(&mut entry.version),
                "machine-id" => value.clone_into(&mut entry.machine_id),
                "sort-key" => value.clone_into(&mut entry.sort_key),
                "linux" => value.clone_into(&mut entry.linux),
                "uki" => {
                    value.clone_into(&mut entry.linux);
                    entry.is_unified = true;
                }
                "initrd" if entry.initrds.len() < INITRDS => entry.initrds.push(value.to_owned()),
                "options" => {
                    if !entry.options.is_empty() {
                        entry.options.push(' ');
                    }
                    entry.options.push_str(value);
                }
                key if key.starts_with("grub_") => entry.is_for_grub = true,
                "architecture" if !value.eq_ignore_ascii_case("x64") => return Ok(None),
                _ => {}
            }
        }
        if entry.title.is_empty() {
            entry.title.clone_from(&entry.id);
        }
        Ok((!entry.linux.is_empty()).then_some(entry))
    }

    /// The entry's name, by which GRUB saves it as the default.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Puts the values of GRUB's variables in their places, as GRUB's command `blscfg` does. Errors if this makes
    /// too much of them.
    pub(super) fn expand(&mut self, value: &dyn Fn(&str) -> String) -> Result<(), TooLong> {
        if self.options.is_empty() {
            self.options = value("default_kernelopts");
        }
        self.options = expanded(&self.options, value)?;
        let initrds = self.initrds.iter().map(|path| expanded(path, value));
        let initrds = initrds.collect::<Result<Vec<_>, _>>()?.join(" ");
        self.initrds = initrds.split_whitespace().take(INITRDS).map(str::to_owned).collect();
        Ok(())
    }

    /// The entry of a unified kernel image with this `os-release`.
    pub(super) fn unified(file_name: &str, path: String, os_release: &str) -> Self {
        let name = file_name.get(..file_name.len().saturating_sub(4)).unwrap_or(file_name);
        let (id, exhausted) = counters(name);
        let value = |keys: &[&str]| {
            let found = keys.iter().find_map(|key| release(os_release, key));
            found.unwrap_or_default().to_owned()
        };
        let title = release(os_release, "PRETTY_NAME").unwrap_or(&id).to_owned();
        Self {
            id,
            exhausted,
            title,
            version: value(&["IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID"]),
            sort_key: value(&["IMAGE_ID", "ID"]),
            linux: path,
            is_unified: true,
            ..Self::default()
        }
    }

    /// The order of the menu, in which the first is the default: newest first; entries that failed last.
    fn order(&self, other: &Self) -> Ordering {
        let unsorted = |entry: &Self| entry.sort_key.is_empty();
        let by_key = match unsorted(self) || unsorted(other) {
            true => Ordering::Equal,
            false => (self.sort_key.cmp(&other.sort_key))
                .then_with(|| self.machine_id.cmp(&other.machine_id))
                .then_with(|| compare_versions(&other.version, &self.version)),
        };
        (self.exhausted.cmp(&other.exhausted))
            .then_with(|| unsorted(self).cmp(&unsorted(other)))
            .then(by_key)
            .then_with(|| compare_versions(&other.id, &self.id))
    }
}

/// An entry is too long.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TooLong {
    /// The file is.
    #[error("it has more than 64 KiB")]
    File,
    /// The values of its variables make it so.
    #[error("it has more than 64 KiB with the values of its variables")]
    Values,
}

/// Returns the words of `text` with the values of its variables, `$NAME` and `${NAME}`. A variable that is not set has
/// no value.
fn expanded(text: &str, value: &dyn Fn(&str) -> String) -> Result<String, TooLong> {
    let (mut before, mut all) = (text, String::new());
    while let Some((plain, rest)) = before.split_once('$') {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let braces = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
        let (name, after) = braces
            .unwrap_or_else(|| rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len())));
        all.push_str(plain);
        match name {
            "" => all.push('$'),
            name => all.push_str(&value(name)),
        }
        if all.len() > ENTRY_MAX {
            return Err(TooLong::Values);
        }
        before = after;
    }
    all.push_str(before);
    Ok(all.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Returns the entries in the order in which they are tried: the default, by `loader_conf`, which is the text of
/// `loader.conf`, and then the others in the order of the menu.
pub(super) fn order(mut entries: Vec<Entry>, loader_conf: &str) -> Vec<Entry> {
    entries.sort_by(Entry::order);
    let pattern = settings(loader_conf).filter(|(key, _)| *key == "default").last();
    let matches = |entry: &Entry, pattern: &str| {
        let suffixes = [".conf", ".efi"];
        let pattern = suffixes.iter().find_map(|s| pattern.strip_suffix(s)).unwrap_or(pattern);
        glob(pattern.as_bytes(), entry.id.as_bytes())
    };
    let named = pattern.and_then(|(_, p)| entries.iter().position(|entry| matches(entry, p)));
    if let Some(named) = named {
        entries[..=named].rotate_right(1);
    }
    entries
}

/// The keys and values of the lines.
fn settings(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once([' ', '\t'])).map(|(key, value)| (key, value.trim()))
}

/// The value of a key in the text of `os-release`, without quotation marks.
fn release<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let lines = text.lines().filter_map(|line| line.trim().split_once('='));
    let value = lines.filter(|(found, _)| *found == key).map(|(_, value)| value).next_back()?;
    let plain = ['"', '\''].iter().find_map(|q| value.strip_prefix(*q)?.strip_suffix(*q));
    Some(plain.unwrap_or(value)).filter(|value| !value.is_empty())
}

/// Splits a boot counter (`+LEFT` or `+LEFT-DONE`) off a name. Returns whether no attempt is left.
fn counters(name: &str) -> (String, bool) {
    let counted = name.rsplit_once('+').and_then(|(id, counter)| {
        let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
        done.parse::<u32>().ok()?;
        Some((id.to_owned(), left.parse::<u32>().ok()? == 0))
    });
    counted.unwrap_or_else(|| (name.to_owned(), false))
}

/// Whether `pattern`, with `*` for any characters and `?` for one, matches all of `text`.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if what follows the last `*` does not match here.
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                retry = Some((p, t + 1));
            }
            Some(c) if *c == b'?' || *c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match retry {
                Some((after, next)) => {
                    (p, t) = (after, next);
                    retry = Some((after, next + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// Compares versions (UAPI group, "Version Format Specification"): by numbers and words, in which `~` is
/// less than an end, and `-`, `^` and `.` separate what counts for more from what counts for less.
fn compare_versions(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    let counts = |c: &u8| c.is_ascii_alphanumeric() || b"~-^.".contains(c);
    loop {
        left = &left[left.iter().position(counts).unwrap_or(left.len())..];
        right = &right[right.iter().position(counts).unwrap_or(right.len())..];
        for separator in *b"~-^." {
            if separator == b'-' && (left.is_empty() || right.is_empty()) {
                // The shorter of two versions is the older one.
                return left.len().cmp(&right.len());
            }
            match (left.first() == Some(&separator), right.first() == Some(&separator)) {
                (true, true) => (left, right) = (&left[1..], &right[1..]),
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => continue,
            }
            break;
        }
        let is_digit = |part: &[u8]| part.first().is_some_and(u8::is_ascii_digit);
        let ordering = if is_digit(left) || is_digit(right) {
            let (a, b) =
                (take(&mut left, u8::is_ascii_digit), take(&mut right, u8::is_ascii_digit));
            let (a, b) = (without_zeroes(a), without_zeroes(b));
            a.len().cmp(&b.len()).then_with(|| a.cmp(b))
        } else {
            let letters = u8::is_ascii_alphabetic;
            take(&mut left, letters).cmp(take(&mut right, letters))
        };
        if ordering.is_ne() || (left.is_empty() && right.is_empty()) {
            return ordering;
        }
    }
}

fn take<'a>(text: &mut &'a [u8], which: impl Fn(&u8) -> bool) -> &'a [u8] {
    let end = text.iter().position(|c| !which(c)).unwrap_or(text.len());
    let (taken, rest) = text.split_at(end);
    *text = rest;
    taken
}

fn without_zeroes(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().position(|c| *c != b'0').unwrap_or(digits.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, more: &str) -> Entry {
        Entry::parse(name, &format!("linux /k\n{more}")).unwrap().unwrap()
    }

    fn chosen(entries: &[(&str, &str)], loader_conf: &str) -> String {
        let entries = entries.iter().map(|(name, more)| entry(name, more)).collect();
        order(entries, loader_conf)[0].id.clone()
    }

    #[test]
    fn an_entry_has_a_kernel_an_initramfs_and_a_command_line() {
        let text = "# made by kernel-install\ntitle Debian\nversion\t6.1.0\nlinux   /6.1.0/linux\n\
                    initrd /6.1.0/ucode\ninitrd /6.1.0/initrd\noptions root=/dev/vda1\noptions quiet ro\n";
        let parse = |name, text: &str| Entry::parse(name, text).unwrap();
        let entry = parse("debian-6.1.0+3-1.conf", text).unwrap();
        assert_eq!((entry.id.as_str(), entry.exhausted), ("debian-6.1.0", false));
        assert_eq!((entry.title.as_str(), entry.linux.as_str()), ("Debian", "/6.1.0/linux"));
        assert_eq!(entry.initrds, ["/6.1.0/ucode", "/6.1.0/initrd"]);
        assert_eq!(entry.options, "root=/dev/vda1 quiet ro");
        assert_eq!(parse("a.conf", "efi /shell.efi"), None);
        assert_eq!(parse("a.conf", "linux /k\narchitecture aa64"), None);
        assert!(parse("a.conf", "linux /k\narchitecture x64").is_some());
        assert_eq!(parse("a.conf~", "linux /k"), None);
    }

    #[test]
    fn the_variables_of_grub_get_their_values() {
        let value = |name: &str| match name {
            "kernelopts" => "root=/dev/vda1 ro ".to_owned(),
            "tuned_initrd" => "/tuned.img".to_owned(),
            "default_kernelopts" => "root=LABEL=r $late".to_owned(),
            "long" => "x".repeat(16 << 10),
            _ => String::new(),
        };
        let expand = |more: &str| {
            let mut entry = entry("a.conf", more);
            entry.expand(&value).map(|()| (entry.initrds, entry.options))
        };
        let (initrds, options) =
            expand("initrd /i $tuned_initrd\noptions $kernelopts $tuned_params a=$ ${kernelopts}q")
                .unwrap();
        assert_eq!(initrds, ["/i", "/tuned.img"]);
        assert_eq!(options, "root=/dev/vda1 ro a=$ root=/dev/vda1 ro q");
        let (initrds, options) = expand("initrd $none").unwrap();
        assert_eq!((initrds, options.as_str()), (Vec::new(), "root=LABEL=r"));
        assert_eq!(expand("options a ${b").unwrap().1, "a ${b");
        assert!(expand(&format!("options {}", "$long".repeat(10_000))).is_err());
        let fedora = "grub_users $grub_users\ngrub_arg --unrestricted";
        assert!(entry("a.conf", fedora).is_for_grub && !entry("a.conf", "options $a").is_for_grub);
    }

    #[test]
    fn the_newest_entry_is_booted_unless_another_is_named() {
        let entries = [("d-6.1.0-9.conf", ""), ("d-6.1.0-18.conf", ""), ("d-6.1.0-10.conf", "")];
        assert_eq!(chosen(&entries, ""), "d-6.1.0-18");
        assert_eq!(chosen(&entries, "timeout 3\ndefault d-6.1.0-9.conf"), "d-6.1.0-9");
        assert_eq!(chosen(&entries, "default *-1?"), "d-6.1.0-18");
        assert_eq!(chosen(&entries, "default nothing*"), "d-6.1.0-18");
        let failed = [("d-6.1.0-9.conf", ""), ("d-6.1.0-18+0-3.conf", "")];
        assert_eq!(chosen(&failed, ""), "d-6.1.0-9");
        let sorted = [
            ("z.conf", ""),
            ("a.conf", "sort-key debian\nversion 2"),
            ("b.conf", "sort-key debian\nversion 10"),
        ];
        assert_eq!(chosen(&sorted, ""), "b");
        assert_eq!(order(Vec::new(), "default *"), []);
    }

    #[test]
    fn behind_the_default_are_the_others_from_the_newest_to_the_oldest() {
        let names = ["d-6.1.0-9.conf", "d-6.1.0-18.conf", "d-6.1.0-10.conf", "d-6.1.0-2.conf"];
        let entries = names.iter().map(|name| entry(name, "")).collect();
        let ids = order(entries, "default d-6.1.0-10").into_iter().map(|entry| entry.id);
        assert!(ids.eq(["d-6.1.0-10", "d-6.1.0-18", "d-6.1.0-9", "d-6.1.0-2"]));
    }

    #[test]
    fn versions_are_compared_as_people_read_them() {
        // From the smallest to the largest.
        let versions = ["1~rc1", "1", "1-2", "1-2.1", "1.a", "1.2", "1.10", "1.10.1", "11", "0100"];
        for (index, left) in versions.iter().enumerate() {
            for (other, right) in versions.iter().enumerate() {
                assert_eq!(compare_versions(left, right), index.cmp(&other), "{left} {right}");
            }
        }
        assert_eq!(compare_versions("6.01", "6.1"), Ordering::Equal);
    }

    #[test]
    fn patterns_match_whole_names() {
        assert!(glob(b"a*c?e", b"abbcde") && glob(b"*", b"") && glob(b"a**", b"a"));
        assert!(!glob(b"a*c", b"abcd") && !glob(b"?", b"") && !glob(b"", b"a"));
        assert!(!glob("*a".repeat(50).as_bytes(), "a".repeat(49).as_bytes()));
    }
}
