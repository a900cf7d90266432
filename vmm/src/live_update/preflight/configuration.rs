//! Whether the next host can use a configuration: its own, or else that of this host, which the manifest has. Without one
//! the VMs come over, because the manifest describes them, but not what only a configuration says.

use super::documents::{Document, MANIFEST, NEXT_CONFIG};
use super::{Check, Finding};
use crate::live_update::manifest::refused_config;

/// What is lost with a section that the next host cannot use.
const LOST: &str = "the VMs that run come over, but of VMs whose sections it refuses, those that are stopped and the \
                    restart policies and priorities are lost";

/// Returns what the program of the initramfs `path` has `said` of the configurations, of which there was one for each
/// manifest in `documents`.
pub(super) fn check(path: &str, said: &str, documents: &[Document]) -> Option<Finding> {
    let is_shown = documents.iter().any(|document| document.name == NEXT_CONFIG);
    let (next, own) = (refused_config(said, NEXT_CONFIG), refused_config(said, MANIFEST));
    match (next, own) {
        (Some(why), None) => {
            let sentence = format!(
                "the next host cannot use the configuration in {path}, and uses that of this host: {why}"
            );
            let remedy = "mend the file in the initramfs";
            Some(Finding::new(Check::InitramfsConfig, path, sentence, remedy))
        }
        (next, Some(own)) if next.is_some() || !is_shown => {
            let next = next.unwrap_or("there is none");
            let sentence = format!(
                "the next host can use neither the configuration in {path} ({next}), nor that of this host ({own}): {LOST}"
            );
            let remedy =
                "mend the file in the initramfs, or build it with a `perennial` that can use it";
            Some(Finding::new(Check::InitramfsConfigUnusable, path, sentence, remedy))
        }
        // This host's is not needed.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live_update::manifest::{CARRIES_ON, REFUSES_CONFIG};
    use crate::live_update::preflight::Severity;

    #[test]
    fn a_next_host_that_can_use_no_configuration_is_refused_and_one_that_uses_this_hosts_is_warned_of()
     {
        let document = |name: &str| Document {
            name: name.to_owned(),
            file: tempfile::tempfile().unwrap(),
            check: Check::InitramfsDocuments,
        };
        let said = |name: &str, refused: bool| {
            let sound =
                format!("{name}: a sound manifest of a host on 7.3 with 1 VMs; {CARRIES_ON}");
            match refused {
                true => format!("{sound}; {REFUSES_CONFIG}: no {name}\n"),
                false => sound + "\n",
            }
        };
        // Whether the next host refuses this host's configuration and its own, if it has one.
        for (own, next, expected) in [
            (false, Some(false), None),
            (true, Some(false), None),
            (false, Some(true), Some(Check::InitramfsConfig)),
            (true, Some(true), Some(Check::InitramfsConfigUnusable)),
            (false, None, None),
            (true, None, Some(Check::InitramfsConfigUnusable)),
        ] {
            let mut documents = vec![document(MANIFEST)];
            documents.extend(next.map(|_| document(NEXT_CONFIG)));
            let said =
                said(MANIFEST, own) + &next.map_or_else(String::new, |it| said(NEXT_CONFIG, it));
            let found = check("/initramfs", &said, &documents);
            assert_eq!(found.as_ref().map(|finding| finding.name), expected, "{own} {next:?}");
            let Some(found) = found else { continue };
            let refuses = found.severity == Severity::Refusal;
            assert_eq!((refuses, found.can_be_forced), (own, own));
            assert_eq!(found.sentence.contains("(no the manifest)"), own, "{found}");
            assert!(!found.remedy.is_empty() && found.sentence.contains("/initramfs"), "{found}");
        }
    }
}
