#!/usr/bin/env bash
#
# Unpacks Debian's QEMU, for the machine in which it is measured beside `perennial`, and prints where it is.
#
# stdout is one directory, holding `root`, a file tree with qemu-system-x86_64, its libraries and the
# firmware of the boards `microvm` and `q35`, to be entered by chroot; `version`; and `packages` (with
# versions). All else goes to stderr. The packages are unpacked, not installed, so that no privileges are
# needed and none of their scripts run.
#
# What is there stays in use until it is removed, as with the kernels' source (../kernel/source.sh):
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/qemu/<version>-<recipe>-<hash>/ (see ../artefact.sh)
#
# Environment: PERENNIAL_CACHE, PERENNIAL_DEBIAN_MIRROR (see ../apt.sh), and PERENNIAL_QEMU_SUITE, the Debian
# suite to take it from.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}/qemu
suite=${PERENNIAL_QEMU_SUITE:-trixie}
program=usr/bin/qemu-system-x86_64
# What the two boards load at start: the BIOS, and the option ROMs that start a kernel given by -kernel.
firmware=(
    usr/share/seabios/{bios-256k,bios-microvm}.bin
    usr/share/qemu/{kvmvapic,linuxboot_dma,pvh}.bin
)

artefact=qemu
# shellcheck source=resources/artefact.sh
. "$here/../artefact.sh"

artefact_begin '*'
find_packages qemu-system-x86
unpack_packages "$work/all"

# Of all that, the program, the libraries that the dynamic linker finds for it, and the firmware.
root=$work/tree/root
merge_usr "$root"
keep() {
    mkdir -p "$root/$(dirname "$1")"
    cp --dereference "$work/all/$1" "$root/$1"
}
libraries=usr/lib/x86_64-linux-gnu
keep "$program"
keep usr/lib64/ld-linux-x86-64.so.2
# The last two are where an installed system would have links to, or a line in ld.so.conf.
paths=$work/all/$libraries:$work/all/$libraries/blas:$work/all/$libraries/lapack
listed=$("$work/all/usr/lib64/ld-linux-x86-64.so.2" --library-path "$paths" \
    --list "$work/all/$program" 2>>"$log") || die "the dynamic linker cannot load QEMU; see $log"
if missing=$(grep 'not found' <<<"$listed"); then die "libraries are missing: $missing"; fi
mkdir -p "$root/$libraries"
sed -n "s|.* => \($work/all/[^ ]*\) .*|\1|p" <<<"$listed" |
    while read -r library; do cp --dereference "$library" "$root/$libraries/"; done
for file in "${firmware[@]}"; do keep "$file"; done

# In a version, `:` and `/` can be.
artefact_finish "${version//[:\/]/_}"
