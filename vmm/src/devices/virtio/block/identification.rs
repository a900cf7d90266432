//! The identification string of a disk (5.2.6), which guests call its serial number.
//!
//! udev makes `/dev/disk/by-id/virtio-...` of the string, so the disks of one VM must have different strings.
//! The string is computed when the VM boots and is part of the saved state, so that another version of this
//! program, which may compute other strings, does not change the string that a running guest knows.

/// Length of the identification string, in bytes.
pub(super) const LEN: usize = 20;

/// Returns the identification string of the disk that is called `label`, which is the name of its VM,
/// `-`, and its number among the disks of the VM.
///
/// A label that is too long is shortened: the string is the start of the VM's name, a checksum of the whole
/// name, and the number. So the disks of one VM differ in their numbers, and VMs whose names have the same
/// beginning differ in their checksums.
pub(super) fn of(label: &str) -> [u8; LEN] {
    let mut text = label.to_owned();
    if text.len() > LEN {
        let (name, number) = label.rsplit_once('-').unwrap_or((label, "0"));
        let end = format!("-{:08x}-{number}", crc32fast::hash(name.as_bytes()));
        text = name.chars().take(LEN.saturating_sub(end.len())).collect::<String>() + &end;
    }
    let mut id = [0; LEN];
    // Labels of disks are not longer, because a number has at most two digits.
    id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    id
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_short_label_is_the_identification_itself() {
        assert_eq!(of("web-0"), *b"web-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(of("a-name-of-20-bytes-1"), *b"a-name-of-20-bytes-1");
    }

    #[test]
    fn disks_of_vms_with_long_names_have_identifications_of_their_own() {
        assert_eq!(of("a-name-of-22-characters-7").len(), LEN);
        let names =
            ["production-database-1", "production-database-2", "production-database-22", "x"];
        let long = "y".repeat(50);
        let labels: Vec<String> = names
            .iter()
            .copied()
            .chain([long.as_str()])
            .flat_map(|name| (0..24).map(move |number| format!("{name}-{number}")))
            .collect();
        let different: BTreeSet<[u8; LEN]> = labels.iter().map(|label| of(label)).collect();
        assert_eq!(different.len(), labels.len());
    }
}
