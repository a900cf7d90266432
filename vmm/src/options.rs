//! The option dialect of the configuration and the command line, which is Cloud Hypervisor's:
//! `key=value,key=value`, with quotes around a value that has commas, and sizes such as `512M`.

/// Follows a key in the error about a key that is not known.
pub const UNKNOWN: &str = " is not known here";

/// The pairs of one option text. Each key is known and occurs once.
#[derive(Debug)]
pub struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    /// Splits `text` into pairs. Errors if a part has no `=`, a key is not in `known`, or a key
    /// occurs twice; the error text says what is wrong and what is accepted.
    pub fn parse(text: &'a str, known: &[&str]) -> Result<Self, String> {
        let mut pairs = Vec::new();
        for part in split(text) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(without_value(part, pairs.is_empty(), known));
            };
            let is_given = |key: &str| pairs.iter().any(|(given, _)| *given == key);
            if !known.contains(&key) {
                let others: Vec<_> = known.iter().copied().filter(|key| !is_given(key)).collect();
                return Err(match nearest(key, &others).or_else(|| elsewhere(key, &others)) {
                    Some(meant) => format!("`{key}`{UNKNOWN}: did you mean `{meant}`?"),
                    None => format!("`{key}`{UNKNOWN}; there is {}", known.join(", ")),
                });
            }
            if is_given(key) {
                return Err(format!("`{key}` is given twice"));
            }
            pairs.push((key, unquoted(value).ok_or_else(|| unclosed(part))?));
        }
        Ok(Self(pairs))
    }

    /// Returns the value of `key`, if it was given.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, value)| *value)
    }

    /// Returns the value of `key`, a path. Errors if it is missing or empty.
    pub fn path(&self, key: &str) -> Result<&'a str, String> {
        let path = self.get(key).filter(|path| !path.is_empty());
        path.ok_or_else(|| format!("it must name a path: {key}=FILE"))
    }

    /// Returns whether `key` is `on` or `true`; a missing key counts as `off`. Errors on other values.
    pub fn switch(&self, key: &str) -> Result<bool, String> {
        let Some(value) = self.get(key) else { return Ok(false) };
        match value.to_ascii_lowercase().as_str() {
            "off" | "false" => Ok(false),
            "on" | "true" => Ok(true),
            _ => Err(format!("{key} is on or off, not `{value}`")),
        }
    }
}

/// The error about a part without `=`: a key without its value, or a value without the first of the known keys.
fn without_value(part: &str, is_first: bool, known: &[&str]) -> String {
    let problem = format!("`{part}` is not of the form key=value");
    match known.first() {
        _ if part.is_empty() => problem,
        _ if known.contains(&part) => format!("{problem}: write `{part}=` and a value"),
        Some(first) if is_first => format!("{problem}: did you mean `{first}={part}`?"),
        _ => problem,
    }
}

/// Words of other programs' options for keys here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("file", "path"),
    ("filename", "src"),
    ("ifname", "tap"),
    ("macaddr", "mac"),
    ("mem", "size"),
    ("queues", "num_queues"),
    ("ro", "readonly"),
    ("vcpus", "boot"),
];

/// Returns the key of `known` that another program calls `word`.
fn elsewhere<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (_, key) = ELSEWHERE.iter().find(|(other, key)| *other == word && known.contains(key))?;
    known.iter().find(|known| *known == key).copied()
}

/// Splits `text` at its commas, apart from those in brackets or in quotes: `fd=[3,4],mtu=1500` and
/// `path="/a,b",readonly=on` have two parts. Quotes are those around a whole value; others are as any character.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let (mut in_key, mut value_begins) = (true, false);
    let (mut in_brackets, mut in_quotes) = (false, false);
    text.split(move |c| {
        match c {
            '"' if in_quotes => in_quotes = false,
            '"' => in_quotes = value_begins,
            '[' if !in_quotes => in_brackets = true,
            ']' if !in_quotes => in_brackets = false,
            _ => {}
        }
        let part_ends = c == ',' && !in_brackets && !in_quotes;
        value_begins = in_key && c == '=';
        in_key = part_ends || in_key && !value_begins;
        part_ends
    })
}

/// Returns `text` without the pairs of which `is_left_out` says so, by key and value.
pub fn without(text: &str, is_left_out: impl Fn(&str, &str) -> bool) -> String {
    let is_kept =
        |part: &&str| !part.split_once('=').is_some_and(|(key, value)| is_left_out(key, value));
    split(text).filter(is_kept).collect::<Vec<_>>().join(",")
}

/// Returns the value without the quotes around it. `None` if they do not end, or end before the value does.
fn unquoted(value: &str) -> Option<&str> {
    match value.strip_prefix('"') {
        None => Some(value),
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains('"')),
    }
}

fn unclosed(part: &str) -> String {
    format!("`{part}`: a value that begins with a quote has one at its end, and no other")
}

/// Returns the word of `known` that `word` was probably meant to be.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|other| (strsim::damerau_levenshtein(word, other), *other));
    let (distance, nearest) = near.min()?;
    // One mistake for each three letters; more would make any short word near to any other.
    (distance <= nearest.len().div_ceil(3) && distance < nearest.len()).then_some(nearest)
}

/// Parses a size in bytes with an optional suffix K, M, G or T (powers of 1024). Errors if it is
/// not a whole number or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| {
        let meant = intended_size(text).map(|meant| format!(": did you mean {meant}?"));
        format!("`{text}` is not a size such as 512M or 2G{}", meant.unwrap_or_default())
    })?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than can be counted"))
}

/// What a size in another notation, such as `2GiB`, `2gb` or `2 g`, was probably meant to be.
fn intended_size(text: &str) -> Option<String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).filter(|end| *end > 0)?;
    let (digits, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let letter =
        ["", "B", "IB"].iter().find_map(|end| unit.strip_suffix(end).filter(|u| u.len() == 1));
    letter.filter(|letter| "KMGT".contains(letter)).map(|letter| format!("{digits}{letter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_and_bounded() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for bad in ["", "G", "2X", "-1", "1.5G", "99999999999T", "ä"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        for (typed, meant) in [("2GB", "2G"), ("512MiB", "512M"), ("1g", "1G"), ("4 kb", "4K")] {
            let error = parse_size(typed).unwrap_err();
            assert!(error.ends_with(&format!(": did you mean {meant}?")), "{error}");
        }
        for odd in ["2X", "GB", "1MMB", "1.5GB", "1 "] {
            assert!(!parse_size(odd).unwrap_err().contains("did you mean"), "{odd}");
        }
    }

    #[test]
    fn pairs_are_left_out_whole() {
        let left =
            |text| without(text, |key, value| key == "id" || (key == "tap" && value.is_empty()));
        for (text, expected) in [
            ("tap=,id=[a,b],mac=m", "mac=m"),
            ("tap=t,id=\"a,b\"", "tap=t"),
            ("tap=", ""),
            ("id,tap=x,", "id,tap=x,"),
        ] {
            assert_eq!(left(text), expected, "{text}");
        }
    }

    #[test]
    fn every_key_is_known_given_once_and_has_a_value() {
        let options = Options::parse("path=/a=b,readonly=on", &["path", "readonly"]).unwrap();
        assert_eq!(options.path("path"), Ok("/a=b"));
        assert_eq!(options.switch("readonly"), Ok(true));
        assert_eq!(options.switch("other"), Ok(false));
        for (value, is_on) in [("true", true), ("ON", true), ("False", false), ("off", false)] {
            let text = format!("readonly={value}");
            assert_eq!(Options::parse(&text, &["readonly"]).unwrap().switch("readonly"), Ok(is_on));
        }
        for (text, problem) in [
            ("", "`` is not of the form key=value"),
            ("path", "`path` is not of the form key=value: write `path=` and a value"),
            ("d.img", "`d.img` is not of the form key=value: did you mean `path=d.img`?"),
            ("path=a,b", "`b` is not of the form key=value"),
            ("file=a", "`file` is not known here: did you mean `path`?"),
            ("path=a,", "`` is not of the form key=value"),
            ("colour=red", "`colour` is not known here; there is path"),
            ("path=a,path=b", "`path` is given twice"),
        ] {
            assert_eq!(Options::parse(text, &["path"]).unwrap_err(), problem);
        }
        for (typed, meant) in [("pth", "path"), ("Path", "path"), ("read_only", "readonly")] {
            let error = Options::parse(&format!("{typed}=on"), &["path", "readonly"]).unwrap_err();
            assert_eq!(error, format!("`{typed}` is not known here: did you mean `{meant}`?"));
        }
        let list = Options::parse("fd=[3,4],path=/a]b,x=[", &["path", "fd", "x"]).unwrap();
        assert_eq!(list.get("fd"), Some("[3,4]"));
        assert_eq!((list.get("path"), list.get("x")), (Some("/a]b"), Some("[")));
        let quoted =
            |text| Options::parse(text, &["path", "x"]).map(|o| o.get("path").map(str::to_owned));
        for (text, path) in [
            ("path=\"/a,b.img\",x=1", "/a,b.img"),
            ("x=1,path=\"/a,x=[,b\"", "/a,x=[,b"),
            ("path=\"\",x=1", ""),
            ("path=/a\"b,x=\"1\"", "/a\"b"),
            ("path=a=\"b,x=1", "a=\"b"),
        ] {
            assert_eq!(quoted(text), Ok(Some(path.to_owned())), "{text}");
        }
        for wrong in ["path=\"/a", "path=\"", "path=\"a\"b", "path=\"a\"b\"", "path=\"a,x=1"] {
            assert!(quoted(wrong).unwrap_err().contains("has one at its end"), "{wrong}");
        }
        let empty = Options::parse("path=", &["path"]).unwrap();
        assert_eq!(empty.path("path").unwrap_err(), "it must name a path: path=FILE");
        assert!(empty.switch("path").unwrap_err().contains("path is on or off, not ``"));
    }
}
