//! Runs GRUB's scripts: variables, conditions, and the commands that bear on what is booted.

use std::collections::BTreeMap;

use super::environment::Variables;
use super::menu::Entry;
use super::syntax::{Command, Kept, Piece, Script, Word};
use super::{Chosen, GrubError, Place, Save, Volumes, excerpt, loader_spec, syntax};

/// Most commands that are run.
const STEPS: usize = 50_000;
/// Most entries of all menus.
const ENTRIES: usize = 1000;
/// Most functions and read files inside each other.
const DEPTH: usize = 8;
/// Most files that are read and run.
const FILES: usize = 32;
/// Most boot loader entries of which it is kept why they were left out.
const SKIPPED: usize = 32;
/// Most words of a command, most bytes of one, and most bytes of all: more than any command line has.
const WORDS: usize = 4096;
const WORD_MAX: usize = 16 << 10;
const WORDS_MAX: usize = 64 << 10;

/// The state of a script.
#[derive(Clone)]
pub(super) struct Shell<'v> {
    volumes: &'v dyn Volumes,
    pub(super) variables: Variables,
    /// The entries of the menu, in order.
    pub(super) entries: Vec<Entry>,
    functions: BTreeMap<String, Kept>,
    /// Arguments of the function or entry that runs: `$1` and so on.
    arguments: Vec<String>,
    kernel: Option<(Place, String)>,
    initramfs: Vec<Place>,
    /// A device that `linux` or `initrd` named and that is not there.
    missing: Option<String>,
    /// Whether entries for one boot only are read from an environment block, and whether one was.
    once: bool,
    is_once: bool,
    /// The environment blocks that were saved.
    pub(super) saves: Vec<Save>,
    /// Boot loader entries that are left out, and why.
    pub(super) skipped: Vec<(Place, String)>,
    /// How many submenus were entered.
    pub(super) level: usize,
    steps: usize,
    depth: usize,
    entries_made: usize,
    files_run: usize,
}

impl<'v> Shell<'v> {
    /// A shell whose script is in the directory `prefix` of `volume`.
    pub(super) fn new(volumes: &'v dyn Volumes, volume: usize, prefix: &str, once: bool) -> Self {
        let root = volumes.name(volume);
        Self {
            volumes,
            variables: Variables::new(&format!("({root}){prefix}"), &root),
            entries: Vec::new(),
            functions: BTreeMap::new(),
            arguments: Vec::new(),
            kernel: None,
            initramfs: Vec::new(),
            missing: None,
            once,
            is_once: false,
            saves: Vec::new(),
            skipped: Vec::new(),
            level: 0,
            steps: 0,
            depth: 0,
            entries_made: 0,
            files_run: 0,
        }
    }

    /// Runs the script of an entry. Returns what it boots.
    pub(super) fn start(mut self, entry: &Entry) -> Result<Chosen, GrubError> {
        self.choose(entry)?;
        self.run_with(&entry.arguments, &entry.script)?;
        let title = entry.title.clone();
        match (self.missing, self.kernel) {
            (Some(device), _) => {
                Err(GrubError::Device { entry: excerpt(&title), device: excerpt(&device) })
            }
            (None, None) => Err(GrubError::NoKernel(excerpt(&title))),
            (None, Some((kernel, cmdline))) => {
                let Self { initramfs, is_once, saves, .. } = self;
                Ok(Chosen { title, kernel, initramfs, cmdline, is_once, saves })
            }
        }
    }

    /// Makes the menu of a submenu.
    pub(super) fn enter(&mut self, submenu: &Entry) -> Result<(), GrubError> {
        self.level += 1;
        self.choose(submenu)?;
        self.run_with(&submenu.arguments, &submenu.script).map(drop)
    }

    /// Adds an entry or a submenu to `chosen`, which scripts save for the next boot: its identifier behind those of
    /// the submenus, in the form that `default` has.
    fn choose(&mut self, entry: &Entry) -> Result<(), GrubError> {
        let before = self.variables.get("chosen");
        let id = entry.id.as_ref().unwrap_or(&entry.title).replace('>', ">>");
        let chosen = if before.is_empty() { id } else { format!("{before}>{id}") };
        self.variables.set("chosen", &chosen)
    }

    /// Runs a script with arguments, which are `$1` and so on for its time.
    pub(super) fn run_with(
        &mut self,
        arguments: &[String],
        script: &Script,
    ) -> Result<bool, GrubError> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(GrubError::TooMuch("more than 8 functions or files call each other"));
        }
        let outer = std::mem::replace(&mut self.arguments, arguments.to_vec());
        let result = self.run(script);
        self.arguments = outer;
        self.depth -= 1;
        result
    }

    /// Runs a script. Returns whether its last command succeeded.
    pub(super) fn run(&mut self, script: &Script) -> Result<bool, GrubError> {
        let mut succeeded = true;
        for command in script {
            self.step()?;
            succeeded = self.command(command)?;
            self.variables.set("?", if succeeded { "0" } else { "1" })?;
        }
        Ok(succeeded)
    }

    fn step(&mut self) -> Result<(), GrubError> {
        self.steps += 1;
        match self.steps > STEPS {
            true => Err(GrubError::TooMuch("it runs more than 50000 commands")),
            false => Ok(()),
        }
    }

    fn command(&mut self, command: &Command) -> Result<bool, GrubError> {
        match command {
            Command::Simple(words, block) => {
                let words = self.expand_all(words)?;
                match block {
                    Some(block) => self.block(&words, block),
                    None => self.simple(&words),
                }
            }
            Command::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.run(condition)? {
                        return self.run(body);
                    }
                }
                self.run(otherwise)
            }
            Command::While(condition, until, body) => {
                while self.run(condition)? != *until {
                    self.step()?;
                    self.run(body)?;
                }
                Ok(true)
            }
            Command::For(name, values, body) => {
                for value in self.expand_all(values)? {
                    self.step()?;
                    self.variables.set(name, &value)?;
                    self.run(body)?;
                }
                Ok(true)
            }
            Command::Function(name, body) => {
                self.functions.insert(name.clone(), body.clone());
                Ok(true)
            }
        }
    }

    fn block(&mut self, words: &[String], block: &Kept) -> Result<bool, GrubError> {
        let Some((command, arguments)) = words.split_first() else { return Ok(true) };
        if command != "menuentry" && command != "submenu" {
            return Ok(false);
        }
        self.add(Entry::new(arguments, block.clone(), command == "submenu"))?;
        Ok(true)
    }

    fn add(&mut self, entry: Entry) -> Result<(), GrubError> {
        self.entries_made += 1;
        if self.entries_made > ENTRIES {
            return Err(GrubError::TooMuch("it has more than 1000 menu entries"));
        }
        self.entries.push(entry);
        Ok(())
    }

    /// `blscfg`, a command of Fedora's GRUB: adds an entry to the menu for each boot loader entry, newest first.
    fn blscfg(&mut self) -> Result<bool, GrubError> {
        let set = |name| Some(self.variables.get(name)).filter(|value| !value.is_empty());
        let device = set("boot").or(set("root")).unwrap_or_default().to_owned();
        let directory = set("blsdir").unwrap_or("/loader/entries").to_owned();
        let Ok(Place { volume, .. }) = self.locate(&format!("({device}){directory}")) else {
            return Ok(false);
        };
        let mut entries = Vec::new();
        for name in self.volumes.list(volume, &directory) {
            self.step()?;
            let place = Place { volume, path: format!("{directory}/{name}") };
            match self.loader_entry(&name, &place) {
                Ok(entry) => entries.extend(entry.filter(|entry| !entry.is_unified)),
                Err(problem) if self.skipped.len() < SKIPPED => self.skipped.push((place, problem)),
                Err(_) => {}
            }
        }
        let device = self.volumes.name(volume);
        for entry in loader_spec::order(entries, "") {
            let on_device = |path: &str| format!("({device}){path}");
            let command = |words: Vec<String>| {
                let word = |text| vec![Piece::Text(text, true)];
                Command::Simple(words.into_iter().map(word).collect(), None)
            };
            let options = entry.options.split_whitespace().map(str::to_owned);
            let linux = ["linux".to_owned(), on_device(&entry.linux)].into_iter().chain(options);
            let initrds = entry.initrds.iter().map(|path| on_device(path));
            let initrd = ["initrd".to_owned()].into_iter().chain(initrds);
            let commands = vec![command(linux.collect()), command(initrd.collect())];
            self.add(Entry::of_commands(entry.title.clone(), entry.id(), commands))?;
        }
        Ok(true)
    }

    /// The boot loader entry in a file, with the values of its variables. Errors with the reason if there is one that
    /// cannot be used.
    fn loader_entry(
        &self,
        name: &str,
        place: &Place,
    ) -> Result<Option<loader_spec::Entry>, String> {
        if !name.ends_with(".conf") {
            return Ok(None);
        }
        let text = self.volumes.read(place.volume, &place.path);
        let text = text.ok_or("it cannot be read, or has more than 1 MiB")?;
        let text = String::from_utf8_lossy(&text);
        if text.trim().is_empty() {
            return Err("it is empty".to_owned());
        }
        let Some(mut entry) = loader_spec::Entry::parse(name, &text).map_err(|e| e.to_string())?
        else {
            return Ok(None);
        };
        let expanded = entry.expand(&|name| self.variables.get(name).to_owned());
        expanded.map_err(|error| error.to_string()).map(|()| Some(entry))
    }

    /// Runs a command without a block, which may have `!` in front.
    fn simple(&mut self, words: &[String]) -> Result<bool, GrubError> {
        match words {
            [] => Ok(true),
            // An error of GRUB: there is no command.
            [not] if not == "!" => Ok(false),
            [not, name, arguments @ ..] if not == "!" => Ok(!self.named(name, arguments)?),
            [name, arguments @ ..] => self.named(name, arguments),
        }
    }

    fn named(&mut self, command: &str, arguments: &[String]) -> Result<bool, GrubError> {
        if let Some((name, value)) = command.split_once('=').filter(|_| arguments.is_empty()) {
            return self.set(name, value);
        }
        if let Some(function) = self.functions.get(command).cloned() {
            return self.run_with(arguments, &function);
        }
        match (command, arguments) {
            ("set", [assignment]) => match assignment.split_once('=') {
                Some((name, value)) => self.set(name, value),
                None => Ok(true),
            },
            ("unset", names) => {
                names.iter().for_each(|name| self.variables.unset(name));
                Ok(true)
            }
            ("[", [condition @ .., end]) if end == "]" => Ok(self.test(condition)),
            ("test", condition) => Ok(self.test(condition)),
            ("load_env", options) => self.load_env(options),
            ("save_env", options) => self.save_env(options),
            ("source" | "." | "configfile" | "normal", [path]) => self.source(path),
            ("blscfg", []) => self.blscfg(),
            ("linux" | "linux16" | "linuxefi", [path, parameters @ ..]) => {
                self.linux(path, parameters)
            }
            ("initrd" | "initrd16" | "initrdefi", paths) => self.initrd(paths),
            (name, options) if name == "search" || name.starts_with("search.") => {
                self.search(name, options)
            }
            ("true" | "insmod" | "export" | "echo" | "terminal_output", _) => Ok(true),
            // Graphics, keys and whatever else is not there.
            _ => Ok(false),
        }
    }

    fn set(&mut self, name: &str, value: &str) -> Result<bool, GrubError> {
        self.variables.set(name, value)?;
        Ok(true)
    }

    /// The file system and the path of `PATH`, which is on the device `$root`, or of `(DEVICE)PATH`.
    fn locate(&self, path: &str) -> Result<Place, String> {
        let named = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let (device, path) = named.unwrap_or((self.variables.get("root"), path));
        let device = device.trim_start_matches('(').trim_end_matches(')');
        let volume = self.volumes.by_name(device).ok_or_else(|| device.to_owned())?;
        Ok(Place { volume, path: path.to_owned() })
    }

    fn linux(&mut self, path: &str, parameters: &[String]) -> Result<bool, GrubError> {
        match self.locate(path) {
            Ok(place) => {
                // GRUB adds this parameter, and guests' tools look for it.
                let mut cmdline = format!("BOOT_IMAGE={path}");
                for parameter in parameters {
                    cmdline.push(' ');
                    cmdline.push_str(parameter);
                }
                (self.kernel, self.missing) = (Some((place, cmdline)), None);
                self.initramfs.clear();
                Ok(true)
            }
            Err(device) => {
                self.missing = Some(device);
                Ok(false)
            }
        }
    }

    fn initrd(&mut self, paths: &[String]) -> Result<bool, GrubError> {
        self.initramfs.clear();
        for path in paths.iter().filter(|path| !path.starts_with("--")) {
            match self.locate(path) {
                Ok(place) => self.initramfs.push(place),
                Err(device) => self.missing = Some(device),
            }
        }
        Ok(self.missing.is_none())
    }

    /// `search [--fs-uuid|--label|--file] [--set[=NAME]] [--hint...] WHAT`, or `search.fs_uuid WHAT NAME`.
    fn search(&mut self, command: &str, options: &[String]) -> Result<bool, GrubError> {
        let mut by = command.strip_prefix("search.").unwrap_or("file").to_owned();
        let (mut variable, mut words) = ("root".to_owned(), Vec::new());
        let mut options = options.iter();
        while let Some(option) = options.next() {
            match option.as_str() {
                "--fs-uuid" | "-u" => by = "fs_uuid".to_owned(),
                "--label" | "-l" => by = "fs_label".to_owned(),
                "--file" | "-f" => by = "file".to_owned(),
                // Its value may be missing, then it is `root`, or be a word of its own.
                "--set" | "-s" => {}
                "--hint" | "-h" => drop(options.next()),
                option => match option.strip_prefix("--set=") {
                    Some(name) => variable = name.to_owned(),
                    None if option.starts_with('-') => {}
                    None => words.push(option.to_owned()),
                },
            }
        }
        let wanted = match (words.as_slice(), command.starts_with("search.")) {
            ([wanted, name, ..], true) => {
                variable = name.clone();
                wanted
            }
            ([name, wanted], false) => {
                variable = name.clone();
                wanted
            }
            ([wanted], _) => wanted,
            _ => return Ok(false),
        };
        let found = match by.as_str() {
            "fs_uuid" => self.volumes.by_uuid(wanted),
            "fs_label" => self.volumes.by_label(wanted),
            _ => self.volumes.by_file(wanted),
        };
        match found {
            Some(volume) => self.set(&variable, &self.volumes.name(volume)),
            None => Ok(false),
        }
    }

    /// `load_env [--file PATH] [NAME...]`.
    fn load_env(&mut self, options: &[String]) -> Result<bool, GrubError> {
        let (path, names) = self.block_and_names(options);
        let Some(block) = self.read(&path) else { return Ok(false) };
        let loaded = self.variables.load(&block, &names, self.once)?;
        self.is_once |= loaded == Some(true);
        Ok(loaded.is_some())
    }

    /// `save_env [--file PATH] NAME...`.
    fn save_env(&mut self, options: &[String]) -> Result<bool, GrubError> {
        let (path, names) = self.block_and_names(options);
        let Ok(place) = self.locate(&path) else { return Ok(false) };
        let at = match self.saves.iter().position(|save| save.place == place) {
            Some(at) => at,
            None => {
                let Some(old) = self.volumes.read(place.volume, &place.path) else {
                    return Ok(false);
                };
                if self.saves.len() >= FILES {
                    return Err(GrubError::TooMuch("it saves more than 32 other files"));
                }
                let new = Some(old.clone());
                self.saves.push(Save { place, old, new });
                self.saves.len() - 1
            }
        };
        let Some(save) = self.saves.get_mut(at) else { return Ok(false) };
        let current = save.new.as_ref();
        save.new = current.and_then(|block| self.variables.save(block, &names));
        Ok(save.new.is_some())
    }

    /// The environment block and the variables that the arguments of a command name.
    fn block_and_names(&self, options: &[String]) -> (String, Vec<String>) {
        let mut path = format!("{}/grubenv", self.variables.get("prefix"));
        let mut names = Vec::new();
        let mut options = options.iter();
        while let Some(option) = options.next() {
            match option.as_str() {
                "--file" | "-f" => path = options.next().cloned().unwrap_or_default(),
                option => match option.strip_prefix("--file=") {
                    Some(named) => path = named.to_owned(),
                    None if option.starts_with('-') => {}
                    None => names.push(option.to_owned()),
                },
            }
        }
        (path, names)
    }

    /// The contents of a file, as it was before the script saved anything.
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        let place = self.locate(path).ok()?;
        self.volumes.read(place.volume, &place.path)
    }

    fn source(&mut self, path: &str) -> Result<bool, GrubError> {
        match self.read(path) {
            Some(text) => {
                self.files_run += 1;
                if self.files_run > FILES {
                    return Err(GrubError::TooMuch("it runs more than 32 other files"));
                }
                let (script, arguments) =
                    (syntax::parse(&String::from_utf8_lossy(&text))?, self.arguments.clone());
                self.run_with(&arguments, &script)
            }
            None => Ok(false),
        }
    }

    /// The conditions of `test`: comparisons and files, with `!`, `-a` and `-o`.
    fn test(&self, words: &[String]) -> bool {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut any = words.split(|word| *word == "-o");
        any.any(|words| words.split(|word| *word == "-a").all(|words| self.one_test(words)))
    }

    fn one_test(&self, words: &[&str]) -> bool {
        let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
        match words {
            [] => false,
            ["!", rest @ ..] => !self.one_test(rest),
            ["-n", text] => !text.is_empty(),
            ["-z", text] => text.is_empty(),
            [kind @ ("-e" | "-f" | "-s" | "-d"), path] => {
                let place = self.locate(path).ok();
                let found = place.and_then(|place| self.volumes.look(place.volume, &place.path));
                match (*kind, found) {
                    ("-e", found) => found.is_some(),
                    ("-d", found) => found == Some(None),
                    ("-s", found) => found.flatten().is_some_and(|length| length > 0),
                    (_, found) => found.flatten().is_some(),
                }
            }
            [text] => !text.is_empty(),
            [left, "=" | "==", right] => left == right,
            [left, "!=", right] => left != right,
            [left, "-eq", right] => number(left) == number(right),
            [left, "-ne", right] => number(left) != number(right),
            [left, "-lt", right] => number(left) < number(right),
            [left, "-le", right] => number(left) <= number(right),
            [left, "-gt", right] => number(left) > number(right),
            [left, "-ge", right] => number(left) >= number(right),
            _ => false,
        }
    }

    fn expand_all(&self, words: &[Word]) -> Result<Vec<String>, GrubError> {
        let mut expanded = Words::default();
        words.iter().try_for_each(|word| self.expand(word, &mut expanded))?;
        Ok(expanded.words)
    }

    /// Adds what `word` becomes: no word, one, or several.
    fn expand(&self, word: &Word, words: &mut Words) -> Result<(), GrubError> {
        let mut current: Option<String> = None;
        for piece in word {
            match piece {
                Piece::Text(text, _) => current.get_or_insert_default().push_str(text),
                Piece::Variable(name, true) => {
                    current.get_or_insert_default().push_str(self.value(name));
                }
                Piece::Variable(name, false) => {
                    let value = self.value(name);
                    for (index, part) in value.split([' ', '\t', '\n']).enumerate() {
                        if index > 0 {
                            words.extend(current.take())?;
                        }
                        if !part.is_empty() {
                            current.get_or_insert_default().push_str(part);
                        }
                    }
                }
            }
            if current.as_ref().is_some_and(|word| word.len() > WORD_MAX) {
                return Err(GrubError::TooMuch("a word has more than 16 KiB"));
            }
        }
        words.extend(current)
    }

    fn value(&self, name: &str) -> &str {
        match name.parse::<usize>() {
            Ok(0) | Err(_) => self.variables.get(name),
            Ok(index) => self.arguments.get(index - 1).map_or("", String::as_str),
        }
    }
}

/// The words of one command. One word of a script becomes thousands if its variables have spaces, so each is counted when it
/// is added.
#[derive(Default)]
struct Words {
    words: Vec<String>,
    bytes: usize,
}

impl Words {
    /// Adds a word, if there is one. Errors if there are too many.
    fn extend(&mut self, word: Option<String>) -> Result<(), GrubError> {
        let Some(word) = word else { return Ok(()) };
        self.bytes += word.len();
        if self.words.len() == WORDS {
            return Err(GrubError::TooMuch("a command has more than 4096 words"));
        }
        if self.bytes > WORDS_MAX {
            return Err(GrubError::TooMuch("the words of a command have more than 64 KiB"));
        }
        self.words.push(word);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_before_there_are_too_many() {
        let mut words = Words::default();
        (0..WORDS).for_each(|_| words.extend(Some("x".to_owned())).unwrap());
        words.extend(None).unwrap();
        words.extend(Some("x".to_owned())).unwrap_err();
        assert_eq!(words.words.len(), WORDS);
    }
}
