//! Memory that a kernel's command line reserves (`memmap=`), parsed as in Linux's
//! `arch/x86/kernel/e820.c` (`parse_memmap_one`).
//!
//! Two command lines reserve the same memory only if they have the same ranges in the same order, because
//! a later range overrides an earlier range where they overlap.

use crate::parameters;

/// Returns the `memmap=` ranges of a command line, each in a uniform spelling.
pub(crate) fn ranges(command_line: &str) -> Vec<String> {
    parameters(command_line)
        .filter(|parameter| parameter.is("memmap"))
        .filter_map(|parameter| parameter.value)
        .flat_map(|value| value.split(','))
        .map(|range| normal(range).unwrap_or_else(|| range.to_owned()))
        .collect()
}

/// Whether `size` bytes from `start` on lie in one range that the command line turns into a device
/// (`SIZE!START`). Kernels with this range on their command line use the memory for nothing else.
pub fn reserves(command_line: &str, start: u64, size: u64) -> bool {
    let Some(end) = start.checked_add(size).filter(|_| size > 0) else { return false };
    ranges(command_line).iter().any(|range| {
        let bounds = range.split_once('!').and_then(|(length, from)| {
            let from = number(from)?;
            Some((from, from.checked_add(number(length)?)?))
        });
        bounds.is_some_and(|(from, to)| from <= start && end <= to)
    })
}

/// Describes the ranges, for messages.
pub(crate) fn in_words(ranges: &[String]) -> String {
    match ranges {
        [] => "no `memmap=`".to_owned(),
        ranges => format!("`memmap={}`", ranges.join(",")),
    }
}

/// Returns a range in the uniform spelling, such as `1G!4G` for `1024M!0x100000000`. `None` if it does not
/// have the form of a range.
fn normal(range: &str) -> Option<String> {
    let at = range.find(['!', '$', '@', '#', '%'])?;
    let (size, rest) = range.split_at(at);
    let kind = rest.get(..1)?;
    Some(format!("{}{kind}{}", spelled(number(size)?), spelled(number(rest.get(1..)?)?)))
}

/// Parses a number with an optional suffix, as the kernel's `memparse` does. `None` if the whole text is
/// not such a number.
fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let number = match hexadecimal {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        // The kernel reads a leading zero as octal, which is not supported here.
        None if digits.len() > 1 && digits.starts_with('0') => return None,
        None => digits.parse().ok()?,
    };
    number.checked_shl(shift).filter(|shifted| shifted >> shift == number)
}

fn spelled(bytes: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    let fits = |(shift, _): &(u32, &str)| bytes != 0 && bytes.trailing_zeros() >= *shift;
    let (shift, unit) = units.into_iter().find(fits).unwrap_or((0, ""));
    format!("{}{unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_same_however_they_are_spelled() {
        for spelling in ["1G!4G", "1024M!4096M", "0x40000000!0x100000000", "1g!4G"] {
            assert_eq!(ranges(&format!("quiet memmap={spelling}")), ["1G!4G"], "{spelling}");
        }
        assert_eq!(ranges("memmap=1G!4G,64M$1G memmap=4096@0"), ["1G!4G", "64M$1G", "4K@0"]);
        assert!(ranges("quiet -- memmap=1G!4G").is_empty(), "that is for init");
    }

    #[test]
    fn a_range_that_cannot_be_parsed_keeps_its_spelling() {
        for text in ["exactmap", "1G", "!", "1G!", "!1G", "010!1G", "1X!1G", "16777216T!1G", "ä!1G"]
        {
            assert_eq!(ranges(&format!("memmap={text}")), [text]);
        }
    }

    #[test]
    fn memory_is_reserved_if_one_range_has_all_of_it() {
        const GIB: u64 = 1 << 30;
        let line = "memmap=1G!4G memmap=1G$8G,16M!64M";
        for (start, size, expected) in [
            (4 * GIB, GIB, true),
            (4 * GIB + 4096, 4096, true),
            (64 << 20, 16 << 20, true),
            (4 * GIB, GIB + 1, false),
            (4 * GIB - 1, 2, false),
            (8 * GIB, GIB, false),
            (4 * GIB, 0, false),
            (4 * GIB, u64::MAX, false),
        ] {
            assert_eq!(reserves(line, start, size), expected, "{size:#x} at {start:#x}");
        }
        assert!(!reserves("memmap=1G!", 0, 1) && !reserves("memmap=16777215T!2T", 2 << 40, 1));
        assert!(!reserves("", 0, 1));
    }

    #[test]
    fn ranges_are_named_as_they_would_be_written() {
        assert_eq!(in_words(&ranges("memmap=1024M!4G memmap=1K$8")), "`memmap=1G!4G,1K$8`");
        assert_eq!(in_words(&[]), "no `memmap=`");
    }
}
