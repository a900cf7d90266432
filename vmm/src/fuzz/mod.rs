//! Fuzz targets: functions of arbitrary bytes that panic if the crate breaks a guarantee.
//!
//! Only tests and fuzzers compile them. `vmm/fuzz` runs them under libFuzzer (`make fuzz`); the tests here run
//! each target over its seeds (`vmm/fuzz/seeds`) and inputs made from the seeds. No target needs KVM.
#![expect(clippy::unwrap_used, reason = "a panic is how a target says that it found something")]

mod control;
mod devices;
mod documents;
mod guest;
mod link;
mod rehearsal;

pub use crate::boot_disk::fuzz::{boot_config, boot_disk};
pub use control::control;
pub use documents::{manifest, state_document};
pub use guest::guest;
pub use link::{from_vm, to_vm};
pub use rehearsal::rehearsal;

#[cfg(test)]
mod tests {
    use perennial_fuzz::replay;

    use super::*;

    fn seeds(target: &str) -> String {
        format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn nothing_that_a_guest_does_to_its_devices_confuses_them() {
        replay(seeds("guest"), guest);
    }

    #[test]
    fn a_state_document_is_refused_or_means_something() {
        replay(seeds("state_document"), state_document);
    }

    #[test]
    fn a_manifest_is_refused_or_means_something() {
        replay(seeds("manifest"), manifest);
    }

    #[test]
    fn a_process_of_a_vm_answers_whatever_it_is_asked() {
        replay(seeds("to_vm"), to_vm);
    }

    #[test]
    fn the_host_goes_on_whatever_a_process_of_a_vm_says() {
        replay(seeds("from_vm"), from_vm);
    }

    #[test]
    fn a_boot_configuration_is_refused_or_boots_something() {
        replay(seeds("boot_config"), boot_config);
    }

    #[test]
    fn a_disk_has_something_to_boot_or_an_error_says_why_not() {
        replay(seeds("boot_disk"), boot_disk);
    }

    #[test]
    fn a_report_of_a_rehearsal_counts_only_if_it_is_whole() {
        replay(seeds("rehearsal"), rehearsal);
    }

    #[test]
    fn a_client_is_understood_or_told_that_it_is_not() {
        replay(seeds("control"), control);
    }
}
