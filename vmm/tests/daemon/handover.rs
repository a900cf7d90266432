//! Handovers of a host without VMs that is not PID 1: to the same binary and to other programs. The
//! end-to-end suites, which have KVM, test handovers with VMs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::events::Watcher;
use crate::guests::{configuration, has_kvm};
use crate::host::{Host, PERENNIAL};
use crate::kernel::COUNTS;

impl Host {
    fn refused(&self, program: &Path) -> String {
        let output = self.ctl(&["handover", "--program", program.to_str().unwrap()]);
        assert!(!output.status.success());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("[guests: running]"), "{said}");
        said
    }
}

/// Writes a copy of `perennial` into `directory` in which the name `format` is replaced by `called`, as another
/// version may have it.
pub(crate) fn other_version(directory: &Path, format: &str, called: &str) -> PathBuf {
    assert_eq!(format.len(), called.len());
    let bytes = replaced(fs::read(PERENNIAL).unwrap(), format.as_bytes(), called.as_bytes());
    let path = directory.join(called);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Returns the bytes with one text in all places of another one of the same length, which must be there.
fn replaced(mut bytes: Vec<u8>, text: &[u8], other: &[u8]) -> Vec<u8> {
    let at = |bytes: &[u8]| bytes.windows(text.len()).position(|w| w == text);
    assert!(at(&bytes).is_some());
    while let Some(at) = at(&bytes) {
        bytes[at..at + text.len()].copy_from_slice(other);
    }
    bytes
}

/// Limits the open files of a host, which it may not raise again.
fn limit_files(host: &Host, most: u64) {
    let most = Rlimit { current: Some(most), maximum: Some(most) };
    prlimit(Some(Pid::from_child(&host.child)), Resource::Nofile, most).unwrap();
}

fn open_files(host: &Host) -> u64 {
    fs::read_dir(format!("/proc/{}/fd", host.child.id())).unwrap().count() as u64
}

#[test]
fn a_handover_for_which_there_are_too_few_files_is_refused() {
    let mut host = Host::start();
    let open = open_files(&host);
    limit_files(&host, open + 200);
    assert!(host.ctl(&["handover"]).status.success());
    host.wait_until_ready("boot handover");
    // Enough for all that this host opens before it would pause a guest.
    limit_files(&host, open + 20);
    let said = host.refused(Path::new(PERENNIAL));
    assert!(said.contains(&format!("may have {}", open + 20)), "{said}");
    assert!(said.contains("LimitNOFILE="), "{said}");
}

#[test]
fn a_handover_is_refused_while_the_disk_of_a_vm_is_missing_or_another_one() {
    if !has_kvm() {
        return;
    }
    let mut host = Host::start_in(|path| {
        let disk = path.join("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        configuration(
            path,
            "",
            &[("one", COUNTS, &format!("disk = [\"path={}\"]", disk.display()))],
        )
    });
    let [disk, hidden] = ["disk", "hidden"].map(|name| host.directory.path().join(name));
    fs::rename(&disk, &hidden).unwrap();
    let said = host.refused(Path::new(PERENNIAL));
    assert!(said.contains("VM `one`") && said.contains("disk-missing"), "{said}");
    assert!(said.contains("bring it back") && !said.contains("--force"), "{said}");
    // What the VM has open only root sees.
    if rustix::process::geteuid().is_root() {
        fs::write(&disk, [0; 4096]).unwrap();
        assert!(host.refused(Path::new(PERENNIAL)).contains("disk-other"));
    }
    host.counts_on("one");
    fs::rename(&hidden, &disk).unwrap();
    assert!(host.ctl(&["handover"]).status.success());
    host.wait_until_ready("boot handover");
    host.counts_on("one");
}

/// With every limit a handover either takes place, and the guests run, or is refused before they are paused.
#[test]
fn a_lack_of_files_is_noticed_before_a_guest_is_paused() {
    if !has_kvm() {
        return;
    }
    let vms = ["one", "two", "three"].map(|name| (name, COUNTS, ""));
    let (inner, directory) = Host::command(|path| configuration(path, "", &vms));
    let mut command = inner;
    if rustix::process::geteuid().is_root() {
        // Root could raise the limit.
        let mut dropped = Command::new("setpriv");
        dropped.args(["--bounding-set=-sys_resource", PERENNIAL]).args(command.get_args());
        command = dropped;
    }
    let mut host = Host::run(command, directory);
    host.wait_until_ready("boot cold");
    let open = open_files(&host);
    let (mut handed_over, mut is_refused) = (0, false);
    for most in (open..=open + 46).rev() {
        vms.iter().for_each(|(name, ..)| host.counts_on(name));
        limit_files(&host, most);
        let output = host.ctl(&["handover"]);
        if output.status.success() {
            host.wait_until_ready("boot handover");
            handed_over += 1;
            continue;
        }
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("open files at a time") && !said.contains("jumping"), "{said}");
        is_refused = true;
        break;
    }
    assert!(handed_over > 0 && is_refused, "{handed_over} {is_refused}");
    vms.iter().for_each(|(name, ..)| host.counts_on(name));
}

#[test]
fn a_next_program_that_can_use_no_configuration_is_refused_until_the_file_is_mended() {
    let mut host = Host::start_with("stop-within-s = 7\n");
    let other = other_version(host.directory.path(), "stop-within-s", "stop-within-x");
    let said = host.refused(&other);
    assert!(said.contains("cannot use the configuration of this host (line "), "{said}");
    assert!(said.contains("stop-within-s") && said.contains("mend the configuration"), "{said}");
    // The file is another one now, and no better.
    let text = fs::read_to_string(host.config()).unwrap();
    fs::write(host.config(), text.clone() + "hostnaem = 'a'\n").unwrap();
    let said = host.refused(&other);
    assert!(said.contains("config.toml (line ") && said.contains("nor the config"), "{said}");
    // What the next program can use need not be what this one can.
    fs::write(host.config(), text.replace("stop-within-s", "stop-within-x")).unwrap();
    let output = host.ctl(&["handover", "--program", other.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    host.wait_until_ready("boot handover");
    let status = host.status();
    assert!(status["config_error"].is_null(), "{status}");
}

#[test]
fn the_next_program_answers_in_the_same_process() {
    let mut host = Host::start();
    for _ in 0..2 {
        let output = host.ctl(&["handover"]);
        assert!(output.status.success(), "{output:?}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(status["boot"], "handover");
        host.wait_until_ready("boot handover");
    }
    let report = host.ctl(&["report"]).stdout;
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["host"]["replaced"], "program");
    assert_eq!(report["host"]["luo"], "keeper");
    assert!(host.ctl(&["power-off"]).status.success());
    assert!(host.child.wait().unwrap().success(), "the process that was started ends");

    let mut host = host.start_again();
    host.wait_until_ready("boot cold");
    let kept: serde_json::Value = serde_json::from_slice(&host.ctl(&["report"]).stdout).unwrap();
    assert_eq!(kept, report, "the report of the last handover outlives the host");
    fs::write(host.directory.path().join("lock.report.json"), "{}").unwrap();
    let mut host = host.start_again();
    host.wait_for_line("cannot read the report in");
    host.wait_until_ready("boot cold");
}

#[test]
fn a_binary_that_was_replaced_in_its_place_takes_over() {
    // A copy, because the test's own binary must not be replaced.
    let directory = tempfile::tempdir().unwrap();
    let installed = directory.path().join("perennial");
    fs::copy(PERENNIAL, &installed).unwrap();
    let mut host = Host::start();
    let output = host.ctl(&["handover", "--program", installed.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    host.wait_until_ready("boot handover");

    // As a package manager replaces a program: another file is renamed over it.
    let next = directory.path().join("next");
    fs::copy(PERENNIAL, &next).unwrap();
    fs::rename(&next, &installed).unwrap();
    let exe = format!("/proc/{}/exe", host.child.id());
    let old = fs::read_link(&exe).unwrap();
    assert!(old.to_str().unwrap().ends_with(" (deleted)"), "{old:?}");
    assert!(host.ctl(&["handover"]).status.success());
    host.wait_until_ready("boot handover");
    assert_eq!(fs::read_link(&exe).unwrap(), installed);
}

#[test]
fn a_program_that_is_no_perennial_is_refused_and_the_host_goes_on() {
    let host = Host::start();
    let said = host.refused(Path::new("/bin/true"));
    assert!(said.contains("/bin/true is not a `perennial` program"), "{said}");
    let said = host.refused(Path::new("/nowhere"));
    assert!(said.contains("cannot open /nowhere"), "{said}");
    let said = host.refused(host.directory.path());
    assert!(said.contains("cannot execute"), "{said}");
    assert!(host.ctl(&["status"]).status.success());
}

#[test]
fn a_program_that_does_not_understand_what_it_would_get_is_refused() {
    let host = Host::start();
    let directory = host.directory.path();
    let said = host.refused(&other_version(directory, "perennial,host-v1", "perennial,host-v2"));
    assert!(said.contains("cannot take over: ") && said.contains("the manifest: "), "{said}");
    // This program knows the documents, but not the tree that lists them.
    let said = host.refused(&other_version(directory, "luo-v1", "luo-v2"));
    assert!(said.contains("cannot take over: ") && said.contains("luo-v"), "{said}");
    assert!(host.ctl(&["handover"]).status.success(), "nothing was lost by the attempts");
}

/// What a program cannot read of the VMs' descriptions, or would refuse beside them, is known before a VM is paused.
#[test]
fn a_program_that_would_lose_the_vms_is_refused_before_anything_is_preserved() {
    let Some(host) = crate::guests::host("", &[("web", COUNTS, "")]) else { return };
    host.counts_on("web");
    let mut watcher = Watcher::start(&host);
    while watcher.next()["state"] != "running" {}
    let directory = host.directory.path();
    // This one reads everything, but neither says that it carries on what it does not know, nor has `--protocol`.
    let silent = other_version(directory, "carries on what", "carries no what");
    let bytes = fs::read(&silent).unwrap();
    let too_old = directory.join("too-old");
    fs::write(&too_old, replaced(bytes, b"protocol", b"protocoi")).unwrap();
    fs::set_permissions(&too_old, fs::Permissions::from_mode(0o755)).unwrap();
    // A kernel's boot is in the description of the machine.
    let ignorant = other_version(directory, "kernel-boot-v1", "kernel-boot-v9");
    for (program, named) in [(too_old, "too old to carry on"), (ignorant, "kernel-boot-v1")] {
        let said = host.refused(&program);
        assert!(said.contains(named), "{said}");
        assert!(said.contains("not older than this one"), "{said}");
        // The step before anything is preserved is the only one.
        assert_eq!(watcher.next()["step"], "load");
        let next = watcher.next();
        assert_eq!((&next["event"], &next["outcome"]), (&"undone".into(), &"running".into()));
        host.counts_on("web");
    }
    assert!(host.ctl(&["handover", "--program", silent.to_str().unwrap()]).status.success());
}

#[test]
fn a_variable_that_no_host_wrote_costs_nothing_but_a_line_in_the_log() {
    for forged in ["0", "1,2", "77", "seven", "3,3", "-1"] {
        let output = Command::new(PERENNIAL)
            .args(["host", "--config", "/nowhere"])
            .env("PERENNIAL_HANDOVER", forged)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("not a list of fds"), "{forged}: {said}");
        assert!(said.contains("cannot read") && !said.contains("panicked"), "{forged}: {said}");
    }
}

/// A guest may have taken the process of its VM over, and the process ignores that its link is closed.
#[test]
fn processes_of_the_last_hosts_vms_that_do_not_end_by_themselves_are_ended() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    fs::write(&config, format!("[host]\nlock = {:?}\n", directory.path().join("lock"))).unwrap();
    // Children of the process that becomes the host. Only the first is named as a VM's.
    let script = "sleep 600 & echo $! >vm; sleep 600 & echo $! >other; \
                  PERENNIAL_HANDOVER=0 PERENNIAL_OLD_VMS=1,$(cat vm),x exec \"$0\" host --config config.toml";
    let mut command = Command::new("sh");
    command.current_dir(directory.path()).args(["-c", script, PERENNIAL]);
    let mut host = Host::run(command, directory);
    // It does not wait for the other one.
    host.wait_until_ready("boot lost");
    let exists = |name: &str| {
        let pid = fs::read_to_string(host.directory.path().join(name)).unwrap();
        Path::new("/proc").join(pid.trim()).exists()
    };
    let found = (exists("vm"), exists("other"));
    let pid = fs::read_to_string(host.directory.path().join("other")).unwrap();
    Command::new("kill").arg(pid.trim()).status().unwrap();
    assert_eq!(found, (false, true));
}
