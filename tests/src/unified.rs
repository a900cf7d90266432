//! A disk with a unified kernel image on its EFI system partition, made of the tools' own formats: objcopy adds the
//! sections to systemd's stub for EFI, sfdisk makes the partition table, and dosfstools and mtools the file system.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use crate::image::raw_disk;

/// systemd's stub, a program for EFI. Perennial does not run it.
const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";

const OS_RELEASE: &str =
    "ID=perennial-test\nPRETTY_NAME=\"Perennial's test guest\"\nVERSION_ID=1\n";

/// Size of the disk, on which FAT32 just fits. It takes no more space than the image in it.
const DISK: u64 = 40 << 20;

/// Why no unified kernel image can be made on this computer. `None` if it can.
pub fn missing() -> Option<String> {
    let missing = !Path::new(STUB).exists();
    missing.then(|| format!("{STUB} is not installed (Debian: systemd-boot-efi)"))
}

/// Makes a disk with the image of this kernel, initramfs and command line. Works in `directory`.
pub(crate) fn disk(
    disk: &Path,
    (kernel, initramfs, cmdline): (&Path, &Path, &str),
    directory: &Path,
) -> io::Result<()> {
    let directory = tempfile::tempdir_in(directory)?;
    let [osrel_file, cmdline_file, image, table] =
        ["os-release", "cmdline", "guest.efi", "table"].map(|name| directory.path().join(name));
    fs::write(&osrel_file, OS_RELEASE)?;
    fs::write(&cmdline_file, cmdline)?;
    let mut objcopy = Command::new("objcopy");
    // Behind the stub's own sections, each behind the one before.
    let sections = [
        (".osrel", osrel_file.as_path(), 0x20000),
        (".cmdline", cmdline_file.as_path(), 0x30000),
        (".linux", kernel, 0x200_0000),
        (".initrd", initramfs, 0x800_0000),
    ];
    for (name, file, address) in sections {
        objcopy.arg("--add-section").arg(format!("{name}={}", file.display()));
        objcopy.arg("--change-section-vma").arg(format!("{name}={address:#x}"));
    }
    run(objcopy.arg(STUB).arg(&image))?;
    raw_disk(disk, DISK)?;
    fs::write(&table, "label: gpt\nstart=2048, type=uefi\n")?;
    run(tool("sfdisk").arg("--quiet").arg(disk).stdin(fs::File::open(&table)?))?;
    // The partition begins at 1 MiB; the last MiB has the copy of the table.
    let kib = ((DISK >> 10) - 2048).to_string();
    run(tool("mkfs.vfat").args(["-F", "32", "-s", "1", "--offset", "2048"]).arg(disk).arg(kib))?;
    let partition = format!("{}@@1M", disk.display());
    run(tool("mmd").args(["-i", &partition, "::EFI", "::EFI/Linux"]))?;
    run(tool("mcopy").args(["-i", &partition]).arg(&image).arg("::EFI/Linux/guest.efi"))
}

/// A tool for file systems. Tools for root are not in the path of every user.
fn tool(name: &str) -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(name);
    command.env("PATH", path);
    command
}

fn run(command: &mut Command) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output();
    let output = output.map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("{program}: {}: {}", output.status, said.trim()))),
    }
}
