use std::path::Path;

use super::super::program::tests::elf;
use super::*;

/// A file in the `newc` format: name, mode and contents.
fn entry(name: &str, mode: u32, contents: &[u8]) -> Vec<u8> {
    let fields = [1, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    let mut bytes = b"070701".to_vec();
    bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    bytes.extend(name.bytes().chain([0]));
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(contents);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

fn check_bytes(bytes: &[u8], line: &str, is_first_process: bool) -> (Vec<Finding>, Examined) {
    check_under(bytes, line, is_first_process, "")
}

/// The same by a host with the configuration `config`.
fn check_under(
    bytes: &[u8],
    line: &str,
    is_first_process: bool,
    config: &str,
) -> (Vec<Finding>, Examined) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("initramfs");
    std::fs::write(&path, bytes).unwrap();
    let root = Path::new("/nowhere");
    let surroundings =
        Surroundings { is_first_process, root, config, ..Surroundings::without_vms() };
    check(&Initramfs::open(&path).unwrap(), line, Some("7.3.4-a"), &surroundings)
}

/// The names of the findings about an initramfs with these files.
fn found(files: &[(&str, u32, &[u8])]) -> Vec<Check> {
    names(&check_bytes(&archive(files), "quiet", true).0)
}

fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    files.iter().flat_map(|(name, mode, contents)| entry(name, *mode, contents)).collect()
}

fn names(findings: &[Finding]) -> Vec<Check> {
    findings.iter().map(|finding| finding.name).collect()
}

const CONFIGURATION: &[u8] = b"[host]\nmodules = [\"kvm\", \"kvm-amd\"]\n";

#[test]
fn an_initramfs_with_all_that_it_needs_has_no_findings() {
    let init = elf(&[1, 1]);
    let files: [(&str, u32, &[u8]); 4] = [
        ("init", PROGRAM, &init),
        ("etc/perennial.toml", FILE, CONFIGURATION),
        ("lib/modules/kvm.ko", FILE, b""),
        ("lib/modules/kvm-amd.ko.xz", FILE, b""),
    ];
    let (findings, examined) = check_bytes(&archive(&files), "quiet", true);
    assert_eq!(findings, []);
    let loadable = ["kvm", "kvm_amd"].map(str::to_owned).into();
    assert_eq!(examined.modules, Modules { loadable, built_in: None });
    assert_eq!(examined.program.as_deref(), Some(&init[..]));
    assert_eq!(examined.config.unwrap().host.modules.len(), 2);
}

#[test]
fn everything_that_is_missing_is_found_at_once() {
    assert_eq!(
        found(&[("etc/perennial.toml", FILE, CONFIGURATION)]),
        [Check::InitramfsInit, Check::InitramfsModules]
    );
    assert_eq!(found(&[("init", FILE, b"")]), [Check::InitramfsInit, Check::InitramfsConfig]);
    assert_eq!(
        found(&[("init", 0o040_755, b""), ("etc/perennial.toml", FILE, b"")]),
        [Check::InitramfsInit]
    );
    assert_eq!(
        found(&[("init", PROGRAM, b"#!/bin/sh"), ("etc/perennial.toml", FILE, b"[host")]),
        [Check::InitramfsProgram, Check::InitramfsConfig]
    );
}

#[test]
fn modules_that_are_missing_are_named_also_where_the_rest_of_the_configuration_is_wrong() {
    let init = elf(&[1]);
    let wrong = b"[host]\nhostnaem = \"a\"\nmodules = [\"nd_pmem\", \"kvm\"]\n";
    let files: [(&str, u32, &[u8]); 4] = [
        ("init", PROGRAM, &init),
        ("etc/perennial.toml", FILE, wrong),
        ("lib/modules/kvm.ko", FILE, b""),
        // Not where the host looks.
        ("lib/modules/6.1/nd_pmem.ko", FILE, b""),
    ];
    let (findings, _) = check_bytes(&archive(&files), "", true);
    assert_eq!(names(&findings), [Check::InitramfsConfig, Check::InitramfsModules]);
    let text = findings[1].to_string();
    assert!(text.contains("`nd_pmem`") && !text.contains("`kvm`"), "{text}");
}

#[test]
fn without_a_configuration_that_of_this_host_is_checked_apart_from_its_pool() {
    let init = elf(&[1]);
    let files: [(&str, u32, &[u8]); 2] =
        [("init", PROGRAM, &init), ("lib/modules/kvm.ko", FILE, b"")];
    let own = "[host]\nhostname = \"here\"\npool = \"/pool\"\nmodules = [\"kvm\", \"ext4\"]\n";
    let (findings, examined) = check_under(&archive(&files), "", true, own);
    assert_eq!(names(&findings), [Check::InitramfsConfig, Check::InitramfsModules]);
    assert!(findings[0].to_string().contains("uses the configuration of this host"));
    assert!(findings[1].to_string().contains("`ext4`"));
    assert_eq!(examined.modules.loadable, ["kvm".to_owned()].into());
    let host = examined.config.unwrap().host;
    assert_eq!((host.hostname.as_deref(), host.pool), (Some("here"), None));
    assert_eq!(examined.config_text, None, "the program is not asked about it twice");
}

#[test]
fn the_first_program_is_the_one_that_the_command_line_names_through_links() {
    let init = elf(&[1]);
    let files: [(&str, u32, &[u8]); 3] = [
        ("init", LINK, b"bin/perennial"),
        ("bin/perennial", PROGRAM, &init),
        ("etc/perennial.toml", FILE, b""),
    ];
    let (findings, examined) = check_bytes(&archive(&files), "", true);
    assert_eq!((findings, examined.program), (vec![], Some(init.clone())));
    let (findings, _) = check_bytes(&archive(&files), "rdinit=/bin/other quiet", true);
    assert_eq!(names(&findings), [Check::InitramfsInit]);
    assert!(findings[0].sentence.contains("`/bin/other`"), "{}", findings[0]);
    let (findings, _) = check_bytes(&archive(&files), "rdinit=/bin/perennial", true);
    assert_eq!(findings, []);
}

#[test]
fn what_the_next_kernel_has_built_in_is_read_from_the_list_of_its_release() {
    let init = elf(&[1]);
    let built_in = |directory: &str, lib: &str| {
        let list = format!("{directory}/modules.builtin");
        let files: [(&str, u32, &[u8]); 4] = [
            ("init", PROGRAM, &init),
            ("etc/perennial.toml", FILE, b""),
            (lib, LINK, b"usr/lib"),
            (&list, FILE, b"kernel/fs/ext4/ext4.ko\nkernel/arch/x86/kvm/kvm-amd.ko\n"),
        ];
        let (findings, examined) = check_bytes(&archive(&files), "", true);
        assert_eq!(findings, []);
        assert_eq!(examined.program.as_deref(), Some(&init[..]));
        examined.modules.built_in
    };
    let known = Some(["ext4", "kvm_amd"].map(str::to_owned).into());
    assert_eq!(built_in("lib/modules/7.3.4-a", "lib64"), known);
    assert_eq!(built_in("usr/lib/modules/7.3.4-a", "lib"), known);
    assert_eq!(built_in("lib/modules/7.3.4-b", "lib64"), None, "of another release");
    assert_eq!(built_in("lib/modules", "lib64"), None);
}

#[test]
fn the_initramfs_of_a_distribution_needs_no_more_than_something_to_start() {
    let (findings, _) = check_bytes(&archive(&[("init", PROGRAM, b"#!/bin/sh")]), "", false);
    assert_eq!(findings, []);
    let (findings, _) = check_bytes(&archive(&[("bin/sh", PROGRAM, b"")]), "", false);
    assert_eq!(names(&findings), [Check::InitramfsInit]);
}

#[test]
fn damage_is_refused() {
    let cut = &archive(&[("init", PROGRAM, b"0123456789")])[..120];
    assert_eq!(names(&check_bytes(cut, "", true).0), [Check::InitramfsDamaged]);
    let lzo = check_bytes(b"\x89LZO\0\r\n\x1a\n", "", true).0;
    assert_eq!(names(&lzo), [Check::InitramfsDamaged]);
}
