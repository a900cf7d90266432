//! Files that an operator names: from his own directory, on a disk that is full, and some that are no files.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;

use crate::errands::Client;
use crate::guests::{PATIENCE, host};
use crate::host::{Host, PERENNIAL};
use crate::kernel::COUNTS;

/// Runs `perennial ctl` in the host's directory, which is not the one in which the host runs.
fn ctl_there(host: &Host, arguments: &[&str]) -> Output {
    let mut command = Command::new(PERENNIAL);
    command.current_dir(host.directory.path()).args(["ctl", "--socket", "socket"]).args(arguments);
    command.output().unwrap()
}

#[test]
fn a_path_is_that_of_the_operator_and_not_that_of_the_host() {
    let Some(host) = host("", &[("one", COUNTS, "")]) else { return };
    let directory = host.directory.path();
    let dumped = ctl_there(&host, &["dump", "one", "state"]);
    assert!(dumped.status.success(), "{dumped:?}");
    assert!(fs::metadata(directory.join("state")).unwrap().len() > 1 << 10);
    let absent = directory.join("absent").display().to_string();
    let commands: [&[&str]; 3] = [
        &["handover", "--program", "absent"],
        &["preflight", "--kernel", "absent", "--initramfs", "state"],
        &["preflight", "--kernel", "state", "--initramfs", "absent"],
    ];
    for command in commands {
        let Output { stdout, stderr, .. } = ctl_there(&host, command);
        let said = String::from_utf8([stdout, stderr].concat()).unwrap();
        assert!(said.contains(&absent), "{command:?}: {said}");
    }
    host.counts_on("one");
}

#[test]
fn what_is_no_file_is_refused_and_keeps_the_host_from_nothing() {
    let Some(host) = host("", &[("one", COUNTS, "")]) else { return };
    let fifo = host.directory.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let commands: [&[&str]; 4] = [
        &["handover", "--program", "fifo"],
        &["handover", "--program", "."],
        &["preflight", "--kernel", "fifo", "--initramfs", "."],
        &["preflight", "--kernel", ".", "--initramfs", "fifo"],
    ];
    for command in commands {
        let output = ctl_there(&host, command);
        assert!(!output.status.success(), "{command:?}: {output:?}");
        host.counts_on("one");
    }
}

#[test]
fn a_configuration_that_is_no_file_does_not_keep_the_guests_standing_still() {
    let Some(mut host) = host("", &[("one", COUNTS, "")]) else { return };
    let config = host.config();
    for wrong in ["fifo", "/dev/zero"] {
        fs::remove_file(&config).unwrap();
        match wrong {
            "fifo" => mknodat(CWD, &config, FileType::Fifo, Mode::RWXU, 0).unwrap(),
            endless => std::os::unix::fs::symlink(endless, &config).unwrap(),
        }
        host.hands_over(&[]);
        host.counts_on("one");
        let why = host.status()["config_error"].to_string();
        assert!(why.contains("config.toml") && why.contains("not a regular file"), "{why}");
    }
}

/// A file system that answers nothing, as if its server were gone. Dropping it ends everything that waits for it.
struct Dead {
    directory: tempfile::TempDir,
    /// Where a server would be.
    nobody: fs::File,
}

/// The answer to the first request of Linux: the protocol's version, and no features (`struct fuse_init_out`).
const FIRST_ANSWER: [u32; 20] = {
    let mut words = [0; 20];
    // The length, no error, and the number of the request, which is filled in. Then the version.
    (words[0], words[4], words[5]) = (80, 7, 31);
    // The most bytes of a write.
    words[9] = 4096;
    words
};

impl Dead {
    /// `None`, with a word about it, where such a file system cannot be mounted.
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = (|| {
            let nobody = fs::File::options().read(true).write(true).open("/dev/fuse")?;
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", nobody.as_raw_fd());
            let options = CString::new(options)?;
            let (flags, options) = (MountFlags::empty(), Some(options.as_c_str()));
            mount("dead", directory.path(), "fuse", flags, options)?;
            Ok::<_, std::io::Error>(nobody)
        })();
        match mounted {
            Ok(nobody) => Some(Self { directory, nobody }),
            Err(error) => {
                eprintln!("skipped: no file system that hangs: {error}");
                None
            }
        }
    }

    /// Takes requests and answers only the first one. No signal ends whoever waits for the answer to another one. Returns
    /// when somebody does.
    fn hangs(&mut self) {
        let mut request = [0; 1 << 16];
        self.takes(&mut request);
        let mut answer: Vec<u8> = FIRST_ANSWER.iter().flat_map(|word| word.to_ne_bytes()).collect();
        answer[8..16].copy_from_slice(&request[8..16]);
        assert_eq!(self.nobody.write(&answer).unwrap(), answer.len());
        self.takes(&mut request);
    }

    fn takes(&mut self, request: &mut [u8]) {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let mut asked = [PollFd::new(&self.nobody, PollFlags::IN)];
        assert_eq!(poll(&mut asked, Some(&patience)).unwrap(), 1, "nobody asks for a file");
        assert!(self.nobody.read(request).unwrap() > 0);
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_disk_on_a_server_that_is_gone_keeps_no_other_vm_and_no_operator_waiting() {
    let Some(dead) = Dead::mount() else { return };
    let disk = format!("disk = \"path={}/web.img\"", dead.directory.path().display());
    let vms = [("gone", COUNTS, disk.as_str()), ("one", COUNTS, "")];
    let Some(host) = host("", &vms) else { return };
    host.counts_on("one");
    assert_eq!(host.vm("gone")["state"], "booting", "it still opens its disk");
    assert!(host.ctl(&["stop", "one", "--now"]).status.success());
    // The claims of the other VMs are looked at again.
    let output = host.ctl(&["boot", "one"]);
    assert!(output.status.success(), "{output:?}");
    host.counts_on("one");
}

#[test]
fn a_handover_is_refused_while_a_thread_of_the_host_cannot_be_ended() {
    let Some(dead) = Dead::mount() else { return };
    let disk = format!("disk = \"path={}/web.img\"", dead.directory.path().display());
    let vms = [("gone", COUNTS, disk.as_str()), ("one", COUNTS, "")];
    let Some(mut host) = host("", &vms) else { return };
    // Dropped before the host, which cannot end otherwise.
    let mut dead = dead;
    dead.hangs();
    host.counts_on("one");
    let answer = Client::asks(&host, &json!({"do": "handover"})).is_answered();
    let said = answer["error"].to_string();
    assert!(said.contains("is still ") && said.contains("files of VM `gone`"), "{answer}");
    assert_eq!(answer["outcome"], "running", "{answer}");
    host.counts_on("one");
    drop(dead);
    host.hands_over(&[]);
    host.counts_on("one");
}

#[test]
fn an_image_that_is_named_as_lock_or_watchdog_stays_as_it_is() {
    let (mut command, directory) = Host::command(|_| String::new());
    let image = directory.path().join("lock");
    fs::write(&image, "an image").unwrap();
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let named = format!("{} is no lock of a host", image.display());
    assert!(!output.status.success() && said.contains(&named), "{said}");
    assert_eq!(fs::read_to_string(&image).unwrap(), "an image");

    let image = directory.path().join("web.img");
    fs::write(&image, "an image").unwrap();
    let mut host = {
        let (command, directory) = Host::command(|_| format!("watchdog = {image:?}\n"));
        Host::run(command, directory)
    };
    let said = host.wait_for_line("cannot use the watchdog");
    assert!(said.contains("web.img") && said.contains("not a character device"), "{said}");
    host.wait_until_ready("boot cold");
    assert_eq!(fs::read_to_string(&image).unwrap(), "an image");
}

#[test]
fn a_document_for_which_there_is_no_room_leaves_nothing_behind() {
    let Some(host) = host("", &[("one", COUNTS, "")]) else { return };
    let pid = Some(Pid::from_child(&host.child));
    let limit = |current| {
        let maximum = getrlimit(Resource::Fsize).maximum;
        prlimit(pid, Resource::Fsize, Rlimit { current, maximum }).unwrap();
    };
    let path = host.directory.path().join("state");
    let dump = || ctl_there(&host, &["dump", "one", "state"]);
    limit(Some(1 << 10));
    let output = dump();
    let said = String::from_utf8(output.stderr).unwrap();
    let shown = path.display().to_string();
    assert!(!output.status.success() && said.contains(&shown), "{said}");
    assert!(!Path::new(&path).exists(), "it would stand in the way of the next attempt");
    host.counts_on("one");
    limit(None);
    assert!(dump().status.success());
}

#[test]
fn a_kernel_that_is_none_is_named() {
    let Some(host) = host("", &[("one", COUNTS, "")]) else { return };
    let kernel = host.directory.path().join("one.elf");
    fs::write(&kernel, "no kernel").unwrap();
    assert!(host.ctl(&["stop", "one", "--now"]).status.success());
    let said = String::from_utf8(host.ctl(&["boot", "one"]).stderr).unwrap();
    assert!(
        said.contains(&format!("cannot load the guest's kernel {}: ", kernel.display())),
        "{said}"
    );
}
