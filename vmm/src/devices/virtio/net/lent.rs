//! Taps whose file descriptors `perennial run` keeps for as long as it runs, over resets of the guest too.
//!
//! The user brings them along: `fd=3` or `fd=[3,4]`, one for each pair of queues. Their owner has made the tap, and does
//! with its interface what is to be done: this host changes only what belongs to a descriptor. Or the user names no tap:
//! then `perennial run` makes one, as Cloud Hypervisor does.

use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Mutex;

use super::{PAIRS_MAX, host, tap};
use crate::devices::inherited;
use crate::devices::interface::Interface;
use crate::mutex::lock;

/// The descriptors of each tap, by its name. The options of a device have the name only.
static TAPS: Mutex<BTreeMap<String, Vec<RawFd>>> = Mutex::new(BTreeMap::new());

/// Checks the descriptors of `list`, which must be `queues` if given, and lends them to one device. Returns the name
/// of their tap and how many there are. The error says what is wrong.
pub(super) fn claim(list: &str, queues: Option<u16>) -> Result<(String, u16), String> {
    let numbers = parse(list)?;
    let count = numbers.len() as u16;
    if queues.is_some_and(|queues| queues != count) {
        return Err(format!(
            "fd={list} is {count} for the pairs of queues: queues must be the same number, or left out"
        ));
    }
    let names = numbers.iter().map(|number| name_of(*number));
    let names: Vec<String> = names.collect::<Result<_, _>>()?;
    let (first, rest) = names.split_first().ok_or("fd= names no file descriptor")?;
    if let Some(other) = rest.iter().find(|name| *name != first) {
        return Err(format!(
            "fd={list}: the file descriptors belong to different interfaces, {first} and {other}; a device has \
             one, with a descriptor for each pair of queues"
        ));
    }
    let mut taps = lock(&TAPS);
    if taps.contains_key(first) {
        return Err(format!("fd={list}: another device has the tap {first} already"));
    }
    taps.insert(first.clone(), numbers);
    Ok((first.clone(), count))
}

/// Makes a tap whose name the kernel chooses (`vmtap0`), with the MTU and on the bridge. Returns its name. The tap
/// ends with this process.
pub(super) fn make(pairs: u16, mtu: Option<u16>, bridge: Option<&str>) -> Result<String, String> {
    let (name, files) = host::make(pairs, mtu, bridge).map_err(|error| {
        let why = crate::causes::chain(&error).join(": ");
        format!("no tap is named, and none can be made: {why}")
    })?;
    let numbers: Vec<RawFd> = files.into_iter().map(inherited::keep).collect::<Result<_, _>>()?;
    lock(&TAPS).insert(name.clone(), numbers);
    match bridge {
        Some(bridge) => tracing::info!("made tap {name} on bridge {bridge}"),
        None => tracing::warn!(
            "made tap {name}, which has no address yet: `ip address add ADDRESS/PREFIX dev {name}` gives it one"
        ),
    }
    Ok(name)
}

/// Returns the descriptors of the tap `name` for a new process, if they are lent.
pub(super) fn open(name: &str) -> Option<Result<Vec<OwnedFd>, String>> {
    let taps = lock(&TAPS);
    let numbers = taps.get(name)?;
    Some(numbers.iter().map(|number| inherited::duplicate(*number)).collect())
}

/// Whether the descriptors of the tap `name` are lent.
pub(super) fn has(name: &str) -> bool {
    lock(&TAPS).contains_key(name)
}

/// Reads `3` or `[3,4]`.
fn parse(list: &str) -> Result<Vec<RawFd>, String> {
    let inner = list.strip_prefix('[').and_then(|list| list.strip_suffix(']')).unwrap_or(list);
    let number = |text: &str| text.parse::<RawFd>().ok().filter(|number| *number >= 0);
    let numbers: Option<Vec<RawFd>> = inner.split(',').map(number).collect();
    let numbers = numbers.ok_or_else(|| {
        format!("fd is the number of a file descriptor or a list such as [3,4], not `{list}`")
    })?;
    if numbers.len() > PAIRS_MAX {
        return Err(format!(
            "fd has {} descriptors, a device has at most {PAIRS_MAX}",
            numbers.len()
        ));
    }
    match numbers.iter().enumerate().find(|(at, number)| numbers[..*at].contains(number)) {
        Some((_, number)) => Err(format!("fd={list}: {number} is given twice")),
        None => Ok(numbers),
    }
}

/// Returns the name of the interface that a descriptor belongs to. Errors if the device cannot use it.
fn name_of(number: RawFd) -> Result<String, String> {
    let fd = inherited::duplicate(number)?;
    let (name, flags) = tap::identify(&fd).map_err(|error| {
        format!("fd {number} is no tap or macvtap that is attached to an interface: {error}")
    })?;
    if flags & libc::IFF_TAP == 0 {
        return Err(format!(
            "fd {number} ({name}) is a tun, which carries packets: it must be a tap"
        ));
    }
    if flags & libc::IFF_VNET_HDR == 0 {
        return Err(format!(
            "fd {number} ({name}) is a tap without a virtio-net header: open it with IFF_VNET_HDR"
        ));
    }
    // The answer to TUNGETIFF has the flag always, because IFF_NOFILTER is the same bit. The file does not exist
    // for a macvtap, which has no packet information, and for an interface in another network namespace.
    let path = Interface::new(&name).map_err(|error| error.to_string())?.directory();
    let flags = std::fs::read_to_string(path.join("tun_flags"))
        .ok()
        .and_then(|text| i32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    if flags.is_some_and(|flags| flags & libc::IFF_NO_PI == 0) {
        return Err(format!(
            "fd {number} ({name}) is a tap with packet information: open it with IFF_NO_PI"
        ));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_a_number_or_a_list_without_repetition() {
        assert_eq!(parse("3"), Ok(vec![3]));
        assert_eq!(parse("[3,4]"), Ok(vec![3, 4]));
        for (wrong, why) in [
            ("", "not ``"),
            ("[]", "not `[]`"),
            ("-1", "not `-1`"),
            ("three", "not `three`"),
            ("[3", "not `[3`"),
            ("[3,]", "not `[3,]`"),
            ("[3,4,3]", "3 is given twice"),
            ("[3,4,5,6,7,8,9,10,11]", "at most 8"),
        ] {
            let said = parse(wrong).unwrap_err();
            assert!(said.contains(why), "{wrong}: {said}");
        }
    }
}
