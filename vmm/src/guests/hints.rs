//! What a VM's guest was told of its processor, on the host on which it booted, and is not true of this host.

use super::guest::Guest;

/// Most hints that are kept: more than there are. A compromised process may send any number.
const MOST_HINTS: usize = 128;
/// Most bytes of a hint's name.
const MAX_NAME: usize = 64;

impl Guest {
    /// Notes and logs the hints of the guest's CPUID that the host lacks, as the VM's process reports them.
    pub fn note_missing_hints(&mut self, mut hints: Vec<String>) {
        hints.truncate(MOST_HINTS);
        hints.retain(|hint| {
            hint.len() <= MAX_NAME && hint.bytes().all(|byte| byte.is_ascii_graphic())
        });
        if !hints.is_empty() {
            tracing::warn!(
                "VM `{}`: its guest was told of its processor what is not true of this host's: {}. It runs \
                 on, perhaps slower, or without a guard that it needs now until it boots again",
                self.machine.name,
                hints.join(", ")
            );
        }
        self.missing_hints = hints;
    }

    /// Returns the names of the hints in the guest's CPUID that are not true of this host.
    pub fn missing_hints(&self) -> &[String] {
        &self.missing_hints
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HostSection;
    use crate::guests::confinement::Confinement;
    use crate::machine::tests::sample;

    #[test]
    fn what_a_process_says_of_hints_is_bounded_and_plain() {
        let mut guest = Guest::new(sample(), &Confinement::new(&HostSection::default()));
        let mut said = vec!["srso_no".to_owned(), "a\nb".to_owned(), "x".repeat(65)];
        said.extend((0..1000).map(|number| format!("hint{number}")));
        guest.note_missing_hints(said);
        let kept = guest.missing_hints();
        assert_eq!(kept.len(), MOST_HINTS - 2);
        assert_eq!(kept[..2], ["srso_no", "hint0"]);
    }
}
