//! Guests that are Debian as people have it: a disk image with a partition table, Debian's kernel, systemd and
//! cloud-init, which boots from its own disk.
//!
//! The recipe in `resources/debian/image.sh` makes the image; `PERENNIAL_DEBIAN` may name a directory that
//! the recipe printed before. A seed for cloud-init starts the work of the tests in the guest: `fio` writes
//! a second disk and reads it back with checksums, round after round, and a note on the serial port reports
//! each round.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::paths;

/// The image, in the directory that the recipe prints.
const IMAGE: &str = "disk.img";

/// Sent with the kernel's parameters of the disk: the serial port is for the work's notes, without a login.
pub const CMDLINE: &str = "quiet systemd.mask=serial-getty@ttyS0.service systemd.show_status=0";

/// Reports with notes (see `workload::heartbeat`), takes orders, and runs the work. gzip's trailer has the
/// checksum that a note needs.
const WORK: &str = r#"#!/bin/sh
exec 3<>/dev/ttyS0
note() {
    sum=$(printf %s "$1" | gzip -c | tail -c 8 | od -An -tx4 -N4 --endian=little | tr -d ' ')
    printf '@perennial-note %s %s\n' "$1" "$sum" >&3
}
round=0
echo >>/var/lib/boots
sync /var/lib/boots
note "{\"note\":\"boot\",\"vcpus\":$(nproc),\"release\":\"$(uname -r)\",\"boots\":$(wc -l </var/lib/boots),\"cmdline\":\"$(cat /proc/cmdline)\"}"
work() {
    while fio --name=work --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=4 --rw=randwrite \
        --bs=4k --size=2m --verify=crc32c --verify_fatal=1 --output=/run/fio; do
        round=$((round + 1))
        sync -f /var/log
        note "{\"note\":\"round\",\"round\":$round}"
    done
    note "{\"note\":\"failed\",\"why\":\"$(tr -cd 'a-zA-Z0-9 :=' </run/fio | tail -c 300)\"}"
}
work &
while read -r order <&3; do
    case $order in
    reboot)
        update-grub && note '{"note":"reboot"}'
        systemctl reboot
        ;;
    esac
done
"#;

/// The directory that the recipe printed.
fn directory() -> Result<PathBuf, String> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| match env::var_os("PERENNIAL_DEBIAN") {
            Some(directory) => Ok(PathBuf::from(directory)),
            None => make().map_err(|error| format!("no image of Debian: {error}")),
        })
        .clone()
}

/// Why the tests have no image on this computer. `None` if they have one.
pub fn missing() -> Option<String> {
    directory().err()
}

/// Runs the recipe, whose last line on stdout is the directory.
fn make() -> io::Result<PathBuf> {
    let script = paths::workspace().join("resources/debian/image.sh");
    let output = Command::new(&script).stderr(Stdio::inherit()).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    match stdout.lines().last() {
        Some(directory) if output.status.success() => Ok(directory.into()),
        _ => Err(io::Error::other(format!("{}: {}", script.display(), output.status))),
    }
}

/// Makes a copy of the image for one guest.
pub fn copy(to: &Path) -> io::Result<()> {
    let image = directory().map_err(io::Error::other)?.join(IMAGE);
    // Not fs::copy, which would write all of the holes.
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(image).arg(to), 0)
}

/// The `user-data` of the seed.
pub fn user_data() -> String {
    let indented: String = WORK.lines().map(|line| format!("      {line}\n")).collect();
    format!(
        "#cloud-config\nwrite_files:\n  - path: /usr/local/bin/work\n    permissions: '0755'\n    \
         content: |\n{indented}  - path: /etc/systemd/system/work.service\n    content: |\n      \
         [Service]\n      ExecStart=/usr/local/bin/work\n      [Install]\n      \
         WantedBy=multi-user.target\nruncmd:\n  - [systemctl, enable, --now, work.service]\n"
    )
}

/// Checks the root file system in the image of a guest that was cut off from power: the journal is replayed, and
/// then nothing may be wrong.
pub fn check_file_system(image: &Path) -> io::Result<()> {
    let offset = fs::read_to_string(directory().map_err(io::Error::other)?.join("root.offset"))?;
    // e2fsck loses the place of a file system in an image when it opens it again after the journal.
    let file_system = image.with_extension("ext4");
    let options = ["conv=sparse", "status=none", "bs=1M", "iflag=skip_bytes"];
    let mut dd = Command::new("dd");
    dd.args(options).arg(format!("skip={}", offset.trim()));
    dd.arg(format!("if={}", image.display())).arg(format!("of={}", file_system.display()));
    run(&mut dd, 0)?;
    // 1 is: errors were corrected, which the journal counts as.
    run(Command::new("e2fsck").arg("-fp").arg(&file_system), 1)?;
    run(Command::new("e2fsck").arg("-fn").arg(&file_system), 0)
}

/// Runs a command. Errors if its exit status is greater than `most`.
fn run(command: &mut Command, most: i32) -> io::Result<()> {
    let output = command.output()?;
    if output.status.code().is_some_and(|code| code <= most) {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Err(io::Error::other(format!("{command:?}: {}: {said}", output.status)))
}
