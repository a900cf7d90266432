//! Kernel command lines: parses any, and composes that of the next kernel.
//!
//! Parameters are read as Linux's `lib/cmdline.c` and `kernel/params.c` read them: separated by white
//! space outside of double quotes, with `-` and `_` equal in names, up to `--`. If an early parameter is
//! given several times, the last valid value wins. The operator's text is never overridden: a text that
//! switches off what a live update needs is refused.

use std::fmt;
use std::str::FromStr;

/// A command line that `kexec_file_load` accepts and the next kernel reads as the operator meant it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine(String);

/// Why a text cannot be the next kernel's command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineError {
    /// More than [`CommandLine::MAX_BYTES`].
    #[error(
        "the next kernel's command line has {bytes} bytes, more than {}; shorten it",
        CommandLine::MAX_BYTES
    )]
    TooLong {
        /// Length of the text in bytes.
        bytes: usize,
    },
    /// The text has a NUL, a line break, another control character, or a character that is not ASCII. The
    /// kernel would misread it.
    #[error("the next kernel's command line has {character:?} at byte {position}; remove it")]
    Character {
        /// The character.
        character: char,
        /// Its position, in bytes from the start.
        position: usize,
    },
    /// The text has a quote that is never closed. Parameters added behind it would be part of the quoted
    /// value.
    #[error("the next kernel's command line has a double quote that is never closed; close it")]
    OpenQuote,
    /// The text switches off a parameter that a live update needs.
    #[error(
        "the next kernel's command line says `{parameter}={value}`, with which everything that is \
         preserved would be lost; remove that parameter"
    )]
    SwitchedOff {
        /// The parameter.
        parameter: String,
        /// The value that takes effect.
        value: String,
    },
}

impl CommandLine {
    /// Longest command line in bytes. x86 accepts 2048 bytes with the terminating NUL
    /// (`COMMAND_LINE_SIZE`). `kexec_file_load` counts that NUL against the image's limit of 2047 and
    /// keeps 30 bytes free for `elfcorehdr=` (arch/x86/kernel/kexec-bzimage64.c).
    pub const MAX_BYTES: usize = 2047 - Self::OVERHEAD;

    /// Bytes that `kexec_file_load` adds to the length before it compares with the image's limit.
    pub(crate) const OVERHEAD: usize = 1 + 30;

    /// The parameters that a live update needs to be on in both kernels.
    const LIVE_UPDATE: [&str; 2] = ["liveupdate", "kho"];

    /// Checks `text`, without the blanks and tabs at its ends.
    pub fn new(text: &str) -> Result<Self, CommandLineError> {
        let text = text.trim_matches([' ', '\t']);
        let refused = |c: &(usize, char)| !matches!(c.1, ' '..='~' | '\t');
        if let Some((position, character)) = text.char_indices().find(refused) {
            return Err(CommandLineError::Character { character, position });
        }
        if text.len() > Self::MAX_BYTES {
            return Err(CommandLineError::TooLong { bytes: text.len() });
        }
        if text.bytes().filter(|byte| *byte == b'"').count() % 2 != 0 {
            return Err(CommandLineError::OpenQuote);
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the operator's `text` with LUO and KHO switched on, as a live update needs. Errors if `text`
    /// switches one of them off.
    pub fn for_live_update(text: &str) -> Result<Self, CommandLineError> {
        Self::LIVE_UPDATE
            .iter()
            .try_fold(Self::new(text)?, |command_line, parameter| command_line.ensure_on(parameter))
    }

    /// Adds `parameter=on` unless the parameter is on already. Errors if the text switches it off.
    pub fn ensure_on(self, parameter: &str) -> Result<Self, CommandLineError> {
        match effective(&self.0, parameter) {
            Some((_, true)) => Ok(self),
            Some((value, false)) => Err(CommandLineError::SwitchedOff {
                parameter: parameter.to_owned(),
                value: value.to_owned(),
            }),
            None => self.with(parameter, "on"),
        }
    }

    /// Adds `parameter=value` after all other parameters of the kernel, also after those of the same
    /// name. `value` must be one that needs no quotes.
    pub fn with(self, parameter: &str, value: &str) -> Result<Self, CommandLineError> {
        let (kernels, inits) = self.0.split_at(end_of_parameters(&self.0));
        let kernels = kernels.trim_end();
        let space = if kernels.is_empty() { "" } else { " " };
        let before_inits = if inits.is_empty() { "" } else { " " };
        Self::new(&format!("{kernels}{space}{parameter}={value}{before_inits}{inits}"))
    }

    /// Returns the command line without the kernel's parameters of these names.
    #[must_use]
    pub fn without(&self, names: &[&str]) -> Self {
        let mut walk = Parameters { text: &self.0, position: 0 };
        let mut words = Vec::new();
        for (start, parameter) in walk.by_ref() {
            if !names.iter().any(|name| parameter.is(name)) {
                words.push(&self.0[start..][..word_length(&self.0[start..])]);
            }
        }
        words.push(&self.0[walk.position..]);
        Self(words.join(" ").trim_end().to_owned())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `parameter` is on or off; `None` if the parameter is absent or has no valid value.
    pub fn switch(&self, parameter: &str) -> Option<bool> {
        switch(&self.0, parameter)
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for CommandLine {
    type Err = CommandLineError;

    fn from_str(text: &str) -> Result<Self, CommandLineError> {
        Self::new(text)
    }
}

/// One parameter of a command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter<'a> {
    /// The name, as written.
    pub name: &'a str,
    /// The value without quotes; `None` if there is no `=`.
    pub value: Option<&'a str>,
}

impl Parameter<'_> {
    /// Whether this is the parameter called `name`. As in the kernel, `-` and `_` are equal.
    pub fn is(&self, name: &str) -> bool {
        let same = |a: u8, b: u8| a == b || (matches!(a, b'-' | b'_') && matches!(b, b'-' | b'_'));
        self.name.len() == name.len()
            && self.name.bytes().zip(name.bytes()).all(|(a, b)| same(a, b))
    }
}

/// Returns the kernel's parameters in any command line, also that of the running kernel: those before
/// `--`.
pub fn parameters(text: &str) -> impl Iterator<Item = Parameter<'_>> {
    Parameters { text, position: 0 }.map(|(_, parameter)| parameter)
}

/// Whether `parameter` is on or off in any command line, by the rules for early parameters; `None` if the
/// parameter is absent or has no valid value.
pub fn switch(text: &str, parameter: &str) -> Option<bool> {
    effective(text, parameter).map(|(_, on)| on)
}

/// The value of `parameter` that takes effect, and what it means.
fn effective<'a>(text: &'a str, parameter: &str) -> Option<(&'a str, bool)> {
    parameters(text)
        .filter(|found| found.is(parameter))
        .filter_map(|found| found.value)
        .filter_map(|value| boolean(value).map(|on| (value, on)))
        .last()
}

/// Interprets `value` as the kernel's `kstrtobool` does: by the first character, or the first two.
fn boolean(value: &str) -> Option<bool> {
    let mut letters = value.bytes().map(|byte| byte.to_ascii_lowercase());
    match (letters.next()?, letters.next()) {
        (b'e' | b'y' | b't' | b'1', _) | (b'o', Some(b'n')) => Some(true),
        (b'd' | b'n' | b'f' | b'0', _) | (b'o', Some(b'f')) => Some(false),
        _ => None,
    }
}

/// Returns the position of `--`, where the parameters for init begin, or the length of the text.
fn end_of_parameters(text: &str) -> usize {
    let mut walk = Parameters { text, position: 0 };
    walk.by_ref().for_each(drop);
    walk.position
}

/// Iterates over the parameters with their positions; stops before `--`.
struct Parameters<'a> {
    text: &'a str,
    position: usize,
}

/// Whether the kernel takes an ASCII character for white space.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | 0x09..=0x0d)
}

impl<'a> Iterator for Parameters<'a> {
    type Item = (usize, Parameter<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let skipped = self.text[self.position..].bytes().take_while(|byte| is_space(*byte)).count();
        let start = self.position + skipped;
        let rest = &self.text[start..];
        if rest.is_empty() {
            self.position = start;
            return None;
        }
        let length = word_length(rest);
        let parameter = parse(&rest[..length]);
        self.position = start;
        if parameter == (Parameter { name: "--", value: None }) {
            return None;
        }
        self.position += length;
        Some((start, parameter))
    }
}

/// Returns the length of the first word of `text`, which ends at unquoted white space.
fn word_length(text: &str) -> usize {
    let mut quoted = false;
    text.bytes()
        .position(|byte| {
            quoted ^= byte == b'"';
            is_space(byte) && !quoted
        })
        .unwrap_or(text.len())
}

/// Splits a word into name and value. A quote at the beginning of the word or of the value is removed, and
/// then also a quote at the end.
fn parse(word: &str) -> Parameter<'_> {
    let unquoted = word.strip_prefix('"');
    let body = unquoted.unwrap_or(word);
    // A `=` as the first character is part of the name.
    let equals = body.bytes().skip(1).position(|byte| byte == b'=').map(|index| index + 1);
    let Some(equals) = equals else {
        let name = if unquoted.is_some() { body.strip_suffix('"').unwrap_or(body) } else { body };
        return Parameter { name, value: None };
    };
    let value = &body[equals + 1..];
    let inner = value.strip_prefix('"');
    let value = match (inner, unquoted) {
        (None, None) => value,
        _ => {
            let value = inner.unwrap_or(value);
            value.strip_suffix('"').unwrap_or(value)
        }
    };
    Parameter { name: &body[..equals], value: Some(value) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(text: &str) -> Vec<(&str, Option<&str>)> {
        parameters(text).map(|p| (p.name, p.value)).collect()
    }

    #[test]
    fn parameters_are_read_as_the_kernel_reads_them() {
        assert_eq!(
            all("quiet  a=1\tb= c=x=y"),
            [("quiet", None), ("a", Some("1")), ("b", Some("")), ("c", Some("x=y")),]
        );
        assert_eq!(
            all(r#"a="x y" "b=z z" "c d" e="#),
            [("a", Some("x y")), ("b", Some("z z")), ("c d", None), ("e", Some("")),]
        );
        assert_eq!(all(r#"a=x" "y =b"#), [("a", Some(r#"x" "y"#)), ("=b", None)]);
        assert_eq!(all("a=1 -- a=2"), [("a", Some("1"))]);
        assert_eq!(all("--a --=b -- c"), [("--a", None), ("--", Some("b"))]);
        assert_eq!(all(""), []);
    }

    #[test]
    fn dashes_and_underscores_in_names_are_the_same() {
        assert_eq!(switch("kho-x=on", "kho_x"), Some(true));
        assert_eq!(switch("kho_x=on", "kho-x"), Some(true));
        assert_eq!(switch("KHO=on", "kho"), None);
        assert_eq!(switch("kho2=on", "kho"), None);
    }

    #[test]
    fn switches_follow_the_kernels_rules_and_the_last_that_makes_sense_wins() {
        for on in ["on", "ON", "onward", "y", "Yes", "true", "1", "10", "enable", "\"on\""] {
            assert_eq!(switch(&format!("kho={on}"), "kho"), Some(true), "{on}");
        }
        for off in ["off", "OF", "n", "No", "false", "0", "01", "disable"] {
            assert_eq!(switch(&format!("kho={off}"), "kho"), Some(false), "{off}");
        }
        for neither in ["kho", "kho=", "kho=o", "kho=2", "kho=-1", "kho=\"", "x"] {
            assert_eq!(switch(neither, "kho"), None, "{neither}");
        }
        assert_eq!(switch("kho=off kho=on", "kho"), Some(true));
        assert_eq!(switch("kho=on kho=off", "kho"), Some(false));
        assert_eq!(switch("kho=on kho=maybe kho", "kho"), Some(true));
        assert_eq!(switch("kho=on -- kho=off", "kho"), Some(true));
    }

    #[test]
    fn a_live_update_switches_on_what_the_operator_left_open() {
        let text = |operators| CommandLine::for_live_update(operators).unwrap().to_string();
        assert_eq!(text(""), "liveupdate=on kho=on");
        assert_eq!(text(" quiet "), "quiet liveupdate=on kho=on");
        assert_eq!(text("kho=1 quiet"), "kho=1 quiet liveupdate=on");
        assert_eq!(
            text("liveupdate=off liveupdate=y kho=on"),
            "liveupdate=off liveupdate=y kho=on"
        );
        assert_eq!(text("liveupdate kho=?"), "liveupdate kho=? liveupdate=on kho=on");
    }

    #[test]
    fn what_is_added_stays_before_the_parameters_for_init() {
        let text = |operators| CommandLine::for_live_update(operators).unwrap().to_string();
        assert_eq!(text("quiet -- single"), "quiet liveupdate=on kho=on -- single");
        assert_eq!(text("-- kho=off"), "liveupdate=on kho=on -- kho=off");
        assert_eq!(text("quiet --"), "quiet liveupdate=on kho=on --");
    }

    #[test]
    fn a_parameter_with_a_value_comes_last_whatever_was_there() {
        let text = |operators| CommandLine::new(operators).unwrap().with("a.b", "7").unwrap();
        for operators in ["", "quiet", "a.b=6", "a.b=6 -- a.b=5"] {
            let text = text(operators);
            let last = parameters(text.as_str()).last();
            assert_eq!(last, Some(Parameter { name: "a.b", value: Some("7") }), "{text}");
        }
        assert_eq!(text("quiet -- single").as_str(), "quiet a.b=7 -- single");
        let long = CommandLine::new(&"x".repeat(CommandLine::MAX_BYTES - 2)).unwrap();
        assert!(matches!(long.with("a.b", "7"), Err(CommandLineError::TooLong { .. })));
    }

    #[test]
    fn an_operator_who_switches_off_what_is_needed_is_refused_and_not_overridden() {
        for (text, parameter, value) in [
            ("liveupdate=off", "liveupdate", "off"),
            ("liveupdate=0 quiet", "liveupdate", "0"),
            ("liveupdate=on liveupdate=no", "liveupdate", "no"),
            ("quiet kho=off", "kho", "off"),
            ("kho=\"false\"", "kho", "false"),
        ] {
            let error = CommandLine::for_live_update(text).unwrap_err();
            let expected = CommandLineError::SwitchedOff {
                parameter: parameter.to_owned(),
                value: value.to_owned(),
            };
            assert_eq!(error, expected, "{text}");
        }
    }

    #[test]
    fn a_text_that_the_kernel_would_misread_is_refused() {
        for (text, character) in
            [("a\0b", '\0'), ("a\nb", '\n'), ("a\u{a0}b", '\u{a0}'), ("é", 'é'), ("\x7f", '\x7f')]
        {
            let error = CommandLine::new(text).unwrap_err();
            let position = text.find(character).unwrap();
            assert_eq!(error, CommandLineError::Character { character, position });
        }
        assert_eq!(CommandLine::new("a=\"b"), Err(CommandLineError::OpenQuote));
        assert_eq!(
            CommandLine::new("quiet\n"),
            Err(CommandLineError::Character { character: '\n', position: 5 })
        );
    }

    #[test]
    fn the_longest_command_line_is_taken_and_one_byte_more_is_not() {
        let longest = "x".repeat(CommandLine::MAX_BYTES);
        assert_eq!(CommandLine::new(&longest).unwrap().as_str(), longest);
        let error = CommandLine::new(&format!("{longest}x")).unwrap_err();
        assert_eq!(error, CommandLineError::TooLong { bytes: CommandLine::MAX_BYTES + 1 });
        assert!(matches!(
            CommandLine::for_live_update(&longest[1..]),
            Err(CommandLineError::TooLong { .. })
        ));
    }

    /// Texts of those pieces that the parser treats in a special way.
    #[test]
    fn parameters_are_left_out_by_name_and_those_of_init_stay() {
        let without = |text: &str| {
            CommandLine::new(text).unwrap().without(&["memmap", "big_pages"]).as_str().to_owned()
        };
        assert_eq!(without("a memmap=1G!4G b=\"c d\" big-pages=7"), "a b=\"c d\"");
        assert_eq!(without("memmap=1 quiet -- memmap=2"), "quiet -- memmap=2");
        assert_eq!(without("memmap=\"1 2\""), "");
        assert_eq!(without("memmaps=1  x"), "memmaps=1 x");
    }

    fn texts() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop::sample::select(vec![
                " ",
                "\t",
                "\"",
                "=",
                "--",
                "-",
                "_",
                "kho",
                "liveupdate",
                "on",
                "off",
                "0",
                "x",
            ]),
            0..24,
        )
        .prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in any::<String>()) {
            let _ = parameters(&text).count();
            let _ = CommandLine::for_live_update(&text);
        }

        #[test]
        fn a_composed_command_line_has_everything_on_and_all_of_the_operators_text(text in texts()) {
            if let Ok(composed) = CommandLine::for_live_update(&text) {
                prop_assert_eq!(composed.switch("kho"), Some(true));
                prop_assert_eq!(composed.switch("liveupdate"), Some(true));
                let before = all(&text);
                let after = all(composed.as_str());
                prop_assert_eq!(&after[..before.len()], &before[..]);
                prop_assert!(after.len() <= before.len() + 2);
                prop_assert_eq!(CommandLine::for_live_update(composed.as_str()), Ok(composed));
            }
        }

        #[test]
        fn values_with_spaces_survive_quoting(name in "[a-z]{1,8}", value in "[ -!#-~]{0,16}") {
            let text = format!("first {name}=\"{value}\" last");
            prop_assert_eq!(all(&text), [
                ("first", None),
                (name.as_str(), Some(value.as_str())),
                ("last", None),
            ]);
        }
    }
}
