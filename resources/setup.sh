#!/usr/bin/env bash
#
# Installs what a Debian 12 or 13 computer lacks to build and test Perennial.
#
# The script installs only missing packages, so it can be run again at any time and
# is fast if nothing is missing. It needs root or sudo only to install. On another
# distribution it prints what to install by hand.
#
# The computer's apt configuration stays unchanged; see apt.sh.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=resources/apt.sh
. "$here/apt.sh"

# The Rust version that the workspace needs.
rust_needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$here/../Cargo.toml")
# The first QEMU whose emulation suffices for the tests: it has x2APIC for the host,
# and SVM with nested paging that is complete enough for KVM.
qemu_needed=8

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# Each package, and a command or file that shows whether it is installed.
required='
gcc             gcc
make            make
libc6-dev       /usr/include/stdio.h
flex            flex
bison           bison
bc              bc
libelf-dev      /usr/include/gelf.h
xz-utils        xz
zstd            zstd
cpio            cpio
e2fsprogs       mkfs.ext4
mmdebstrap      mmdebstrap
fdisk           sfdisk
dosfstools      mkfs.vfat
mtools          mcopy
binutils        objcopy
systemd-boot-efi /usr/lib/systemd/boot/efi/linuxx64.efi.stub
device-tree-compiler dtc
pkg-config      pkg-config
git             git
ca-certificates /etc/ssl/certs/ca-certificates.crt
util-linux      flock
iperf3          iperf3
'

have() {
    # mkfs.ext4 and other tools for root are not in an ordinary user's PATH.
    case $1 in
    /*) [[ -e $1 ]] ;;
    *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

have_qemu() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null) || return 1
    [[ $version =~ version\ ([0-9]+)\. ]] && ((BASH_REMATCH[1] >= qemu_needed))
}

check_rust() {
    local version
    version=$(cargo --version 2>/dev/null) ||
        die "cargo is missing. Install Rust $rust_needed or newer, best with rustup (https://rustup.rs)."
    version=${version#cargo }
    version=${version%% *}
    [[ $(printf '%s\n' "$rust_needed" "$version" | sort -V | sed -n 1p) == "$rust_needed" ]] ||
        die "cargo is $version, but $rust_needed is needed. With rustup: rustup update stable"
}

missing=()
while read -r package proof; do
    if [[ -n $package ]] && ! have "$proof"; then missing+=("$package"); fi
done <<<"$required"
qemu_missing=false
have_qemu || qemu_missing=true

if ((${#missing[@]} == 0)) && [[ $qemu_missing == false ]]; then
    check_rust
    exit 0
fi

codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-unknown}") || codename=unknown
wanted=("${missing[@]}")
# bookworm's QEMU is 7.2.
qemu_from=()
if [[ $qemu_missing == true ]]; then
    wanted+=(qemu-system-x86)
    if [[ $codename == bookworm ]]; then qemu_from=(-t bookworm-backports); fi
fi
say "missing: ${wanted[*]}${qemu_from[*]:+ (QEMU $qemu_needed or newer, from bookworm-backports)}"

case $codename in
bookworm | trixie) ;;
*) die "this is neither Debian 12 nor 13: install these packages, or their equivalents, by hand" ;;
esac

as_root=()
if ((EUID != 0)); then
    if command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; then
        as_root=(sudo)
    else
        say "this needs root. As root, run:"
        if ((${#missing[@]} > 0)); then
            say "  apt-get install --no-install-recommends ${missing[*]}"
        fi
        if [[ $qemu_missing == true ]]; then
            say "  apt-get install --no-install-recommends ${qemu_from[*]:+${qemu_from[*]} }qemu-system-x86"
        fi
        say "or this script, which adds the sources for apt that it needs."
        exit 1
    fi
fi

cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}
mkdir -p "$cache"
log=$cache/setup.log
: >"$log"

install_packages() {
    local attempt
    for attempt in 1 2 3; do
        if "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "${apt_options[@]}" \
            -o DPkg::Lock::Timeout=120 -y --no-install-recommends "$@" >>"$log" 2>&1; then
            return 0
        fi
        # The mirror may be in an update, or the network may have failed for a moment.
        say "apt failed (attempt $attempt of 3)"
        sleep "$((attempt * 3))"
    done
    tail -n 5 "$log" >&2
    die "the packages could not be installed; apt's output is in $log"
}

say "reading the package lists (some seconds)"
# `sudo apt-get` leaves root's files in the directory, so its removal needs sudo as well.
trap '"${as_root[@]}" rm -rf "${apt_dir:-}"' EXIT
apt_open "$codename-backports" >>"$log" 2>&1 || die "apt could not be prepared; see $log"

if ((${#missing[@]} > 0)); then
    say "installing ${#missing[@]} packages (up to a minute)"
    install_packages install "${missing[@]}"
fi
if [[ $qemu_missing == true ]]; then
    say "installing QEMU (up to a minute)"
    install_packages install "${qemu_from[@]}" qemu-system-x86
    have_qemu || die "qemu-system-x86_64 is older than $qemu_needed even after the installation; see $log"
fi
say "done"
check_rust
