//! A next kernel that systemd was asked to enter, and has not entered yet. None is loaded: for these hosts, the system call
//! for that does nothing and succeeds.

use std::fs;
use std::process::{Command, Output};
use std::thread;

use cpio::newc::{self, Builder, ModeFileType};
use rustix::process::geteuid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

use super::manager::{CAPACITY, Manager};
use crate::host::{Host, PERENNIAL};
use crate::kernel::{End, bzimage};

/// Executes a host, given the directory of its files, where the machine looks as if its kernel had LUO and a next kernel were
/// loaded.
const WITH_LUO: &str = r#"
    set -e
    directory=$1
    shift
    mkdir "$directory/dev"
    mount -t tmpfs dev "$directory/dev"
    cp -a /dev/null /dev/zero /dev/random /dev/urandom "$directory/dev"
    touch "$directory/dev/liveupdate"
    mount --bind "$directory/dev" /dev
    if [ -e /sys/kernel/kexec_loaded ]; then
        echo 1 >"$directory/loaded"
        mount --bind "$directory/loaded" /sys/kernel/kexec_loaded
    fi
    exec "$@"
"#;

/// From now on, this thread and what it starts load no kernel, and believe to have done so.
fn load_no_kernel() {
    let (calls, succeeds) = ([(libc::SYS_kexec_file_load, Vec::new())], SeccompAction::Errno(0));
    let filter =
        SeccompFilter::new(calls.into(), SeccompAction::Allow, succeeds, TargetArch::x86_64);
    apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

/// Starts a host without VMs under systemd. `None`, with a word about it, without root.
fn start() -> Option<(Host, Manager)> {
    if !geteuid().is_root() {
        eprintln!("skipped: not root, who mounts file systems");
        return None;
    }
    let (host, directory) = Host::command(|_| String::new());
    let manager = Manager::start(directory.path(), CAPACITY);
    let passed = manager.pass();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", WITH_LUO, "sh"]).arg(directory.path());
    command.args(&passed.wrapper).arg(PERENNIAL).args(host.get_args());
    command.envs(passed.environment.iter().cloned());
    let start = thread::spawn(move || {
        load_no_kernel();
        Host::run(command, directory)
    });
    let mut host = start.join().unwrap();
    host.wait_until_ready("LUO systemd");
    Some((host, manager))
}

/// Asks for a live update. Other hosts of this machine have VMs while other tests run.
fn update(host: &Host) -> Output {
    let path = |name| host.directory.path().join(name).display().to_string();
    let (kernel, initramfs) = (path("kernel"), path("initramfs"));
    fs::write(&kernel, bzimage("", End::Halt)).unwrap();
    let init = Builder::new("init").mode(0o755).set_mode_file_type(ModeFileType::Regular);
    fs::write(&initramfs, newc::trailer(init.write(Vec::new(), 0).finish().unwrap()).unwrap())
        .unwrap();
    let files = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", ""];
    host.ctl(&[&["update", "--force", "other-host"], &files[..]].concat())
}

#[test]
fn nothing_replaces_a_host_while_systemd_is_about_to_enter_the_next_kernel() {
    let Some((mut host, _manager)) = start() else { return };
    let asked = update(&host);
    assert!(asked.status.success(), "{asked:?}");
    assert!(String::from_utf8_lossy(&asked.stdout).contains("asked of systemd"), "{asked:?}");
    let handover = |host: &Host| host.ctl(&["handover"]);
    let hand_back = |host: &Host| host.ctl(&["recover", "--with", "previous"]);
    let all: [&dyn Fn(&Host) -> Output; 3] = [&handover, &hand_back, &update];
    for command in all {
        let refused = command(&host);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains("a live update is pending"), "{said}");
    }
    // It is cancelled.
    let systemctl = host.directory.path().join("systemctl");
    let script = fs::read_to_string(&systemctl).unwrap();
    let runs = "case $1 in is-system-running) echo running;;";
    fs::write(&systemctl, script.replace("case $1 in", runs)).unwrap();
    let done = handover(&host);
    assert!(done.status.success(), "{done:?}");
    host.wait_until_ready("boot handover");
}
