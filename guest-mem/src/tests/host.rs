//! The host's available memory and its setting for huge pages.

use super::*;
use std::fs;

const MEMINFO: &str = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\n\
                       MemAvailable:    2000000 kB\nBuffers:               0 kB\n";

fn sysfs(setting: &str) -> tempfile::TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let directory = sysfs.path().join("kernel/mm/transparent_hugepage");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("shmem_enabled"), setting).unwrap();
    sysfs
}

#[test]
fn available_memory_is_what_the_kernel_says_is_available() {
    assert_eq!(available_bytes(MEMINFO).unwrap(), 2_000_000 * 1024);
    let this_host = fs::read_to_string("/proc/meminfo").unwrap();
    assert_ne!(available_bytes(&this_host).unwrap(), 0);
}

#[test]
fn a_meminfo_that_does_not_say_is_an_error_with_its_words() {
    for (text, expected) in [
        ("", "/proc/meminfo has no MemAvailable"),
        ("MemFree: 1 kB\n", "/proc/meminfo has no MemAvailable"),
        ("MemAvailable: lots\n", "MemAvailable is `lots`, not a number of kB"),
        ("MemAvailable: 5 MB\n", "MemAvailable is `5 MB`, not a number of kB"),
        ("MemAvailable: 5 kB more\n", "MemAvailable is `5 kB more`, not a number of kB"),
        ("MemAvailable: 18446744073709551615 kB\n", "MemAvailable does not fit 64 bits of bytes"),
    ] {
        let error = available_bytes(text).unwrap_err().to_string();
        let all = format!("cannot tell how much memory the host has available: {expected}");
        assert_eq!(error, all);
    }
}

#[test]
fn the_setting_for_huge_pages_is_the_word_in_brackets() {
    use ShmemPolicy::{Advise, Always, Deny, Force, Never, WithinSize};
    let all = ["always", "within_size", "advise", "never", "deny", "force"];
    let policies = [Always, WithinSize, Advise, Never, Deny, Force];
    for (word, policy) in all.into_iter().zip(policies) {
        let text = format!("{}\n", all.join(" ").replace(word, &format!("[{word}]")));
        let found = HugePages::read(sysfs(&text).path()).unwrap();
        assert_eq!((found.shmem, found.shmem.to_string()), (policy, word.to_owned()));
        assert_eq!(policy.gives_huge_pages(), !["never", "deny"].contains(&word));
    }
}

#[test]
fn only_never_is_changed() {
    let chosen = sysfs("always [within_size] advise never deny force");
    assert_eq!(HugePages::set_advise(chosen.path()).unwrap().shmem, ShmemPolicy::WithinSize);
    let off = sysfs("always within_size advise [never] deny force");
    let path = off.path().join("kernel/mm/transparent_hugepage/shmem_enabled");
    // A plain file holds exactly the word written to it. The kernel's file would list all policies.
    let error = HugePages::set_advise(off.path()).unwrap_err();
    assert_eq!(fs::read_to_string(&path).unwrap(), "advise");
    assert_eq!(error.to_string(), format!("cannot read {}", path.display()));
}

#[test]
fn a_host_without_the_setting_is_told_which_file_is_missing() {
    let nothing = tempfile::tempdir().unwrap();
    let error = HugePages::read(nothing.path()).unwrap_err().to_string();
    assert!(error.ends_with("kernel/mm/transparent_hugepage/shmem_enabled"), "{error}");
    for text in ["", "always never", "[sometimes] never", "never]"] {
        let error = HugePages::read(sysfs(text).path()).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, format!("`{text}` names no known policy"));
    }
}
