//! A host under systemd: Debian's systemd in an initramfs, with `perennial.service` as it is shipped.
//!
//! The recipe in `resources/systemd/image.sh` unpacks systemd; `PERENNIAL_SYSTEMD` may name a directory
//! that the recipe printed before. This module adds the files of a minimal system: systemd starts the
//! units below and no others, no udev and no journal. A shell runs commands from a virtio port, one on
//! each line.

use std::env;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::binaries::{self, Binaries};
use crate::image::Initramfs;
use crate::{paths, recipe};

/// Name of the virtio port that takes commands for the shell.
pub const ORDERS_PORT: &str = "systemd.orders";

/// Files of the system that are not from packages.
const FILES: [(&str, u32, &str); 12] = [
    ("etc/os-release", 0o644, "ID=perennial-test\nNAME=\"Perennial's test host\"\n"),
    // If the file exists, systemd neither generates it nor mounts over it.
    ("etc/machine-id", 0o444, "65726e6e69616c2d746573742d686f73\n"),
    ("etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    // The output of services goes to the console. (It cannot go to the kernel's log, because it
    // would pass through the journal, which does not run.)
    (
        "etc/systemd/system.conf",
        0o644,
        "[Manager]\nLogTarget=kmsg\nDefaultStandardOutput=tty\nDefaultStandardError=tty\n",
    ),
    (
        "etc/systemd/system/default.target",
        0o644,
        "[Unit]\nWants=perennial.service orders.service sys-kernel-debug.mount\nAfter=perennial.service\n",
    ),
    // Not a mount unit: without udev, systemd has no device units, and a mount unit needs one.
    (
        "etc/systemd/system/data.service",
        0o644,
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/mount -t ext4 /dev/vda /data\n\
         ExecStop=/usr/bin/umount /data\n",
    ),
    (
        "etc/systemd/system/orders.service",
        0o644,
        "[Service]\nExecStart=/usr/bin/take-orders\nRestart=always\n",
    ),
    ("usr/bin/take-orders", 0o755, TAKE_ORDERS),
    // Not started again if it ends, and not stopped with the host.
    ("etc/systemd/system/console@.service", 0o644, "[Service]\nExecStart=/usr/bin/attach %i\n"),
    ("usr/bin/attach", 0o755, ATTACH),
    // What is started after the host is stopped before it: another kernel is loaded between the request for a kexec and the
    // stop of the host.
    (
        "etc/systemd/system/load-over@.service",
        0o644,
        "[Unit]\nAfter=perennial.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
         ExecStart=/bin/sh -c \"echo load-over is active\"\nExecStop=/usr/bin/load-over /data/%i/bzImage\n",
    ),
];

/// Drop-in for `perennial.service`: what the service needs on these machines.
const DROP_IN: &str = "[Unit]\nRequires=data.service\nAfter=data.service sys-kernel-debug.mount\n";

const TAKE_ORDERS: &str = r#"#!/bin/sh
for port in /sys/class/virtio-ports/*; do
    read -r name <"$port/name" && [ "$name" = systemd.orders ] && break
done
exec <"/dev/${port##*/}"
while read -r order; do
    echo "order: $order"
    $order
done
"#;

/// Brings the console of a VM to the VM's virtio port.
const ATTACH: &str = r#"#!/bin/sh
for port in /sys/class/virtio-ports/*; do
    read -r name <"$port/name" && [ "$name" = "vm.$1" ] && break
done
exec perennial console "$1" <>"/dev/${port##*/}" >&0
"#;

/// The directory into which the recipe unpacked systemd.
pub fn tree() -> Result<PathBuf, String> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| match env::var_os("PERENNIAL_SYSTEMD") {
            Some(directory) => Ok(PathBuf::from(directory).join("root")),
            None => recipe::run("resources/systemd/image.sh", &[])
                .map(|directory| directory.join("root"))
                .map_err(|error| format!("no systemd: {error}")),
        })
        .clone()
}

/// Why the tests have no systemd on this computer. `None` if they have one.
pub fn missing() -> Option<String> {
    tree().err()
}

/// The host's initramfs.
pub fn initramfs(binaries: &Binaries, config: &str) -> io::Result<Initramfs> {
    let mut archive = Initramfs::new()?;
    archive.tree(&tree().map_err(io::Error::other)?, &|path| {
        // Leaves out the units and generators that systemd would start by default.
        let name = path.to_string_lossy();
        name.ends_with(".wants") || name.ends_with("system-generators")
    })?;
    archive.symlink("init", "usr/lib/systemd/systemd")?;
    archive.directory("var")?;
    for (name, mode, contents) in FILES {
        archive.file(name, mode, contents.as_bytes())?;
    }
    let unit = paths::workspace().join("resources/systemd/perennial.service");
    archive.file("etc/systemd/system/perennial.service", 0o644, &binaries::contents(&unit)?)?;
    archive.directory("etc/systemd/system/perennial.service.d")?;
    archive.file("etc/systemd/system/perennial.service.d/test.conf", 0o644, DROP_IN.as_bytes())?;
    archive.file("usr/bin/perennial", 0o755, &binaries::contents(&binaries.perennial())?)?;
    archive.file("usr/bin/load-over", 0o755, &binaries::contents(&binaries.load_over())?)?;
    archive.file("etc/perennial.toml", 0o644, config.as_bytes())?;
    Ok(archive)
}
