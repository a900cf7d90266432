//! `ctl rehearse`, with kernels of a few bytes that say over the serial port what a next host would say, or anything
//! else. The host is the first process of a PID namespace, as only such a host rehearses, and has an emulated LUO.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::geteuid;
use serde_json::Value;

use crate::events::Watcher;
use crate::host::{Host, PERENNIAL};
use crate::kernel::{COUNTS, End, bzimage, image};

const BEGUN: &str = r#"perennial-rehearsal: {"begun":{"version":"9.9.9","kernel":"9.9"}}"#;
const FINDING: &str = r#"perennial-rehearsal: {"finding":{"severity":"refusal","name":"rehearsal-luo","subject":"","sentence":"no LUO here","remedy":"build it in"}}"#;

/// Where the first process has the host's directory. It mounts empty file systems on /tmp and /run, where the directory
/// itself may be.
const SEEN_AT: &str = "/mnt";

/// A host with a VM that counts, which is the first process of its namespace. `None`, with a word about it, where
/// that is not possible.
fn first_process() -> Option<Host> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: no /dev/kvm");
        return None;
    }
    if !geteuid().is_root() {
        eprintln!("skipped: not root, so there is no PID namespace");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let config = path.join("etc/perennial.toml");
    fs::create_dir(path.join("etc")).unwrap();
    fs::write(path.join("counts.elf"), image(COUNTS)).unwrap();
    fs::write(path.join("initramfs"), cpio::newc::trailer(Vec::new()).unwrap()).unwrap();
    let [socket, lock, kernel, initramfs] =
        ["socket", "lock", "counts.elf", "initramfs"].map(|name| Path::new(SEEN_AT).join(name));
    let text = format!(
        "[host]\nsocket = {socket:?}\nlock = {lock:?}\n[update]\ninitramfs = {initramfs:?}\n\
         [[vm]]\nname = \"counts\"\nmemory = \"size=32M\"\nkernel = {kernel:?}\nserial = \"off\"\n"
    );
    fs::write(&config, text).unwrap();
    let mut command = Command::new(PERENNIAL);
    command.args(["luo", "emulate", "setpriv", "--pdeathsig", "KILL"]);
    command.args(["unshare", "--pid", "--fork", "--kill-child", "--mount", "sh", "-c"]);
    let places =
        format!("mount --bind \"$1\" {SEEN_AT} && mount --bind \"$1/etc\" /etc && exec \"$0\"");
    command.arg(places).arg(PERENNIAL).arg(path);
    let mut host = Host::run(command, directory);
    host.wait_until_ready("boot cold");
    host.counts_on("counts");
    Some(host)
}

/// Writes a kernel that says `text`, and returns its path.
fn kernel(host: &Host, text: &str, end: End) -> String {
    fs::write(host.directory.path().join("next"), bzimage(text, end)).unwrap();
    format!("{SEEN_AT}/next")
}

fn rehearse(host: &Host, kernel: &str, within: &str) -> Output {
    host.ctl(&["rehearse", "--kernel", kernel, "--within", within])
}

/// Errors unless the rehearsal ended with this exit status and its output has `named`.
fn expect(output: &Output, status: i32, named: &[&str]) {
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    named.iter().for_each(|named| assert!(said.contains(named), "{said}"));
}

/// The process of the VM, and the files that the host has open.
fn fingerprint(host: &Host) -> (Value, Value) {
    (host.vm("counts")["pid"].clone(), host.status()["resources"]["open_files"].clone())
}

#[test]
fn a_report_is_the_answer_whatever_is_written_around_it() {
    let Some(host) = first_process() else { return };
    let before = fingerprint(&host);
    let ended = |count| format!(r#"perennial-rehearsal: {{"ended":{{"findings":{count}}}}}"#);
    let good = kernel(&host, &format!("[0.1] hello\n{BEGUN}\nnoise\n{}\n", ended(0)), End::Halt);
    expect(&rehearse(&host, &good, "600"), 0, &["`rehearsed`", "perennial 9.9.9"]);
    let bad = kernel(&host, &format!("{BEGUN}\n{FINDING}\n{}\n", ended(1)), End::Halt);
    expect(&rehearse(&host, &bad, "600"), 3, &["`rehearsal-luo`", "no LUO here"]);
    let lost = kernel(&host, &format!("{BEGUN}\n{FINDING}\n{}\n", ended(2)), End::Halt);
    expect(&rehearse(&host, &lost, "600"), 3, &["`rehearsal-boot`", "lines", "no LUO here"]);
    let panics = kernel(&host, "Kernel panic - not syncing\n", End::Reset);
    let why = "it reset (Kernel panic - not syncing)";
    expect(&rehearse(&host, &panics, "600"), 3, &["`rehearsal-boot`", why]);
    host.counts_on("counts");
    assert_eq!(fingerprint(&host), before);
}

#[test]
fn a_kernel_that_writes_without_end_is_bounded_and_nobody_else_notices() {
    let Some(host) = first_process() else { return };
    let before = (fingerprint(&host), host.peak_kib());
    // Findings without end, and never a whole report.
    let floods = kernel(&host, &format!("{BEGUN}\n{FINDING}\n"), End::Again);
    let mut watcher = Watcher::start(&host);
    watcher.next();
    let client = client(&host, &floods, "5");
    assert_eq!(watcher.next()["refused"], Value::Null);
    host.counts_on("counts");
    expect(
        &client.wait_with_output().unwrap(),
        3,
        &["`rehearsal-boot`", "within 5 s", "no LUO here"],
    );
    host.counts_on("counts");
    drop(watcher);
    assert_eq!(fingerprint(&host), before.0);
    let grown = host.peak_kib() - before.1;
    assert!(grown < 32 << 10, "the host grew by {grown} KiB");
}

#[test]
fn a_rehearsal_ends_with_its_client_and_the_next_one_begins() {
    let Some(mut host) = first_process() else { return };
    let before = fingerprint(&host);
    let halts = kernel(&host, "nothing\n", End::Halt);
    let mut watcher = Watcher::start(&host);
    watcher.next();
    let mut client = client(&host, &halts, "100000");
    assert_eq!(watcher.next()["event"], "rehearsal");
    let busy = rehearse(&host, &halts, "1");
    assert!(String::from_utf8_lossy(&busy.stderr).contains("a rehearsal runs"), "{busy:?}");
    client.kill().unwrap();
    client.wait().unwrap();
    host.wait_for_line("because its client has left");
    drop(watcher);
    assert_eq!(fingerprint(&host), before);
    expect(&rehearse(&host, &halts, "1"), 3, &["did not report within 1 s"]);
    host.counts_on("counts");
}

fn client(host: &Host, kernel: &str, within: &str) -> std::process::Child {
    let mut client = Command::new(PERENNIAL);
    client.args(["ctl", "--socket"]).arg(host.socket());
    client.args(["rehearse", "--kernel", kernel, "--within", within]);
    client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_host_whose_program_is_not_in_the_initramfs_refuses_to_rehearse_and_serves_on() {
    let host = Host::start();
    let refused = host.ctl(&["rehearse", "--kernel", "/nowhere", "--initramfs", "/nowhere"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("first process of its machine"), "{said}");
    assert_eq!(refused.status.code(), Some(1), "{said}");
    // The preflight comes before the rehearsal of an update.
    let next = ["--kernel", "/nowhere", "--initramfs", "/nowhere"];
    let refused = host.ctl(&[&["update", "--rehearse"], &next[..]].concat());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("/nowhere") && said.contains("kernel-file"), "{said}");
    assert!(said.contains("guests: running"), "{said}");
    host.answers();
}
