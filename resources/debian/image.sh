#!/usr/bin/env bash
#
# Makes a disk image of Debian as Debian's own images for clouds are laid out, for guests that boot from their
# disk, and prints where it is.
#
#   image.sh [SUITE]     bookworm (Debian 12, the default) or trixie (Debian 13)
#
# stdout is one directory with `disk.img` (sparse), `packages` (with versions) and `root.offset`, the first
# byte of the root file system in the image; all else goes to stderr. The image has a GPT with an ext4 root
# (partition 1), an unused BIOS partition (14) and an ESP (15); Debian's cloud kernel with the initramfs and the
# /boot/grub/grub.cfg that its packages write; systemd and cloud-init, with what cloud-init sets up networks and grows disks
# with; and the programs of the suites' work, whose
# services do not start by themselves. No boot loader is installed. It has no users besides root and no
# passwords.
#
# What is there stays in use until it is removed, as with the kernels' source (../kernel/source.sh):
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/debian/<suite>-<recipe>-<hash>/ (see ../artefact.sh)
#
# Needs mmdebstrap, and root or unprivileged user namespaces. Environment: PERENNIAL_CACHE,
# PERENNIAL_DEBIAN_MIRROR (see ../apt.sh).

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}/debian
# Besides what is essential: a system that boots, logs in and mounts its disks; cloud-init; the work of the suites.
wanted=(
    systemd-sysv udev dbus kmod netbase iproute2 e2fsprogs
    linux-image-cloud-amd64 grub2-common cloud-init cloud-guest-utils netplan.io
    fio postgresql redis-server stress-ng iperf3
)
uuid=70657265-6e6e-4961-8c64-656269616e21
# Where partitions are, in MiB, as in Debian's images: the ESP is in front of the root file system.
bios_at=1 bios_mib=3
esp_at=4 esp_mib=124
root_at=128 root_mib=1536

PATH=$PATH:/usr/sbin:/sbin

artefact=debian
# shellcheck source=resources/artefact.sh
. "$here/../artefact.sh"

# Runs a command as root, or as what looks like root to it.
as_root() {
    if ((EUID == 0)); then "$@"; else mmdebstrap --unshare-helper "$@"; fi
}

# Writes what Debian's images have and its packages do not make. In the root directory.
configure() {
    printf 'UUID=%s / ext4 rw,discard,errors=remount-ro 0 1\n' "$uuid" >"$1/etc/fstab"
    printf 'LABEL=ESP /boot/efi vfat umask=0077 0 0\n' >>"$1/etc/fstab"
    echo debian >"$1/etc/hostname"
    mkdir -p "$1/boot/efi" "$1/boot/grub" "$1/etc/default/grub.d"
    cat >"$1/etc/default/grub.d/cloud.cfg" <<'END'
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200"
END
    : >"$1/etc/machine-id"
    # As in Debian's images. Nothing waits for a network that the seed does not set up.
    chroot "$1" systemctl enable systemd-networkd
    chroot "$1" systemctl disable systemd-networkd-wait-online
    # The tests start what they need. The name of iperf3's service differs between releases, or it has none.
    chroot "$1" systemctl disable postgresql redis-server
    chroot "$1" systemctl disable iperf3 || true
}

# Runs update-grub in the root directory. grub-probe looks at the devices of the running system; for this
# run, a script answers for the machine that the image is for.
write_grub_cfg() {
    local probe=$1/usr/sbin/grub-probe disk=$1/dev/disk
    mv "$probe" "$probe.real"
    cat >"$probe" <<END
#!/bin/sh
case "\$*" in
*--target=device*) echo /dev/vda1 ;;
*--target=fs_uuid*) echo $uuid ;;
*--target=fs*) echo ext2 ;;
*--target=partmap*) echo gpt ;;
*--target=compatibility_hint*) echo hd0,gpt1 ;;
*--target=hints_string*) echo --hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1 ;;
esac
END
    chmod 755 "$probe"
    # A root device with a link here is named by its UUID.
    mkdir -p "$disk/by-uuid"
    : >"$disk/by-uuid/$uuid"
    chroot "$1" update-grub
    rm -r "$disk"
    mv "$probe.real" "$probe"
}

# Called by mmdebstrap below, and for the file system.
case ${1:-} in
--customize)
    configure "$2"
    write_grub_cfg "$2"
    chroot "$2" dpkg-query -W -f '${Package}=${Version}\n' >"$2/packages"
    exit
    ;;
--root-file-system)
    mkdir "$2/root"
    tar --extract --file "$2/root.tar" --directory "$2/root" --numeric-owner --xattrs
    mv "$2/root/packages" "$2/tree/packages"
    mke2fs -q -t ext4 -U "$uuid" -L root -d "$2/root" "$2/root.img" "${root_mib}M"
    rm -rf "$2/root"
    exit
    ;;
esac

suite=${1:-bookworm}
case $suite in
bookworm | trixie) ;;
*) die "\`$suite\` is no suite that this recipe knows: bookworm, trixie" ;;
esac

artefact_begin "$suite" "$suite"
for tool in mmdebstrap sfdisk mke2fs mkfs.vfat mcopy; do
    command -v "$tool" >/dev/null || die "$tool is missing: see ../setup.sh"
done

apt_open "$suite" >"$log" 2>&1 || die "apt could not be prepared; see $log"
say "installing Debian's $suite (one to three minutes; 200 MB)"
# LLVM, a hundred megabytes, is for queries that PostgreSQL compiles; without it PostgreSQL does not.
packages=$(IFS=,; echo "${wanted[*]}")
mmdebstrap --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/lib/*/libLLVM*' \
    --dpkgopt='path-exclude=/usr/lib/llvm-*' --aptopt='Acquire::Languages "none"' \
    --customize-hook="'$here/image.sh' --customize \"\$1\"" \
    "$suite" "$work/root.tar" \
    "deb [signed-by=$debian_keyring] $apt_mirror $suite main" >>"$log" 2>&1 ||
    die "mmdebstrap failed; see $log"

say "laying out the disk"
{
    as_root "$here/image.sh" --root-file-system "$work"
    mkfs.vfat -C -n ESP "$work/esp.img" $((esp_mib << 10))
    mmd -i "$work/esp.img" ::EFI ::EFI/debian
    printf 'search.fs_uuid %s root hd0,gpt1\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n' \
        "$uuid" | mcopy -i "$work/esp.img" - ::EFI/debian/grub.cfg
    disk=$work/tree/disk.img
    truncate -s "$((root_at + root_mib + 1))M" "$disk"
    sfdisk --no-reread --no-tell-kernel "$disk" <<END
label: gpt
1 : start=${root_at}MiB, size=${root_mib}MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709
14 : start=${bios_at}MiB, size=${bios_mib}MiB, type=21686148-6449-6E6F-744E-656564454649
15 : start=${esp_at}MiB, size=${esp_mib}MiB, type=U
END
    put() { dd if="$1" of="$disk" bs=1M seek="$2" conv=notrunc,sparse status=none; }
    put "$work/root.img" "$root_at"
    put "$work/esp.img" "$esp_at"
} >>"$log" 2>&1 || die "the disk could not be made; see $log"
echo "$((root_at << 20))" >"$work/tree/root.offset"

artefact_finish "$suite"
