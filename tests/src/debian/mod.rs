//! Guests that are Debian as people have it: a disk image with a partition table, Debian's kernel, systemd and
//! cloud-init, which boots from its own disk.
//!
//! The recipe in `resources/debian/image.sh` makes the images; `PERENNIAL_DEBIAN` and `PERENNIAL_DEBIAN_13` may
//! name directories that the recipe printed before. A seed for cloud-init brings `work.py`, which does and
//! checks the work of the tests in the guest, and reports with notes on the serial port; [`Progress`]
//! is what the notes say.

mod progress;

use std::env;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub use progress::Progress;

use crate::recipe;

/// The image, in the directory that the recipe prints.
const IMAGE: &str = "disk.img";

/// Sent with the kernel's parameters of the disk: the serial port is for the work's notes, without a login.
pub const CMDLINE: &str = "quiet systemd.mask=serial-getty@ttyS0.service systemd.show_status=0";

/// The port on which iperf3 serves its measurements.
pub const IPERF3_PORT: u16 = 5201;

/// The name that the seed gives the guest.
pub const HOSTNAME: &str = "a-debian-guest";
/// The password that the seed gives the guest's user `debian`, as in the README.
pub const PASSWORD: &str = "secret";

/// By how much the disk is larger than the image, so that cloud-init grows the root file system.
pub const GROWTH: u64 = 256 << 20;

/// What the guest runs.
const WORK: &str = include_str!("work.py");

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl Release {
    /// The directory that the recipe printed.
    fn directory(self) -> Result<PathBuf, String> {
        static FOUND: [OnceLock<Result<PathBuf, String>>; 2] = [OnceLock::new(), OnceLock::new()];
        let (suite, variable, found) = match self {
            Self::Bookworm => ("bookworm", "PERENNIAL_DEBIAN", &FOUND[0]),
            Self::Trixie => ("trixie", "PERENNIAL_DEBIAN_13", &FOUND[1]),
        };
        found
            .get_or_init(|| match env::var_os(variable) {
                Some(directory) => Ok(PathBuf::from(directory)),
                None => recipe::run("resources/debian/image.sh", &[suite])
                    .map_err(|error| format!("no image of Debian: {error}")),
            })
            .clone()
    }

    /// Makes a copy of the image for one guest, on a disk that is larger by [`GROWTH`].
    pub fn copy(self, to: &Path) -> io::Result<()> {
        let image = self.directory().map_err(io::Error::other)?.join(IMAGE);
        // Not fs::copy, which would write all of the holes.
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(image).arg(to), 0)?;
        let disk = File::options().write(true).open(to)?;
        disk.set_len(disk.metadata()?.len() + GROWTH)
    }

    /// Checks the root file system in the image of a guest that was cut off from power: the journal is replayed, and
    /// then nothing may be wrong.
    pub fn check_file_system(self, image: &Path) -> io::Result<()> {
        let directory = self.directory().map_err(io::Error::other)?;
        let offset = fs::read_to_string(directory.join("root.offset"))?;
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
}

/// Why the tests have no image of Debian 12 on this computer. `None` if they have one.
pub fn missing() -> Option<String> {
    Release::Bookworm.directory().err()
}

/// Why the tests have no image of Debian 13 on this computer. `None` if they have one.
pub fn trixie_missing() -> Option<String> {
    Release::Trixie.directory().err()
}

/// The `network-config` of the seed: the guest's address on the device with this Ethernet address, or that cloud-init
/// leaves the network alone.
pub fn network_config(network: Option<(&str, Ipv4Addr, Ipv4Addr)>) -> String {
    let Some((mac, address, gateway)) = network else {
        return "network:\n  config: disabled\n".to_owned();
    };
    format!(
        "version: 2\nethernets:\n  lan:\n    match: {{macaddress: '{mac}'}}\n    \
         addresses: [{address}/24]\n    routes: [{{to: default, via: {gateway}}}]\n"
    )
}

/// The `user-data` of the seed. Of cloud-init's modules only those run that it needs, and cloud-init only in the first
/// boot: each takes seconds on an emulated CPU.
pub fn user_data() -> String {
    let indented: String = WORK.lines().map(|line| format!("      {line}\n")).collect();
    format!(
        "#cloud-config\n\
         cloud_init_modules: [write-files, growpart, resizefs, set_hostname, users-groups]\n\
         cloud_config_modules: [set-passwords, runcmd]\n\
         cloud_final_modules: [scripts-user]\n\
         hostname: {HOSTNAME}\npassword: {PASSWORD}\nchpasswd: {{expire: false}}\n\
         write_files:\n  \
         - path: /usr/local/bin/work\n    permissions: '0755'\n    content: |\n{indented}  \
         - path: /etc/systemd/system/work.service\n    content: |\n      \
         [Service]\n      ExecStart=/usr/local/bin/work\n      \
         [Install]\n      WantedBy=multi-user.target\n\
         runcmd:\n  \
         - [touch, /etc/cloud/cloud-init.disabled]\n  \
         - [systemctl, enable, --now, work.service]\n"
    )
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
