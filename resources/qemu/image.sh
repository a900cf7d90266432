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
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/qemu/<version>-<recipe>-<hash>/
#
# The hash is of the list of packages with their versions.
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

say() { printf 'qemu: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/apt.sh
. "$here/../apt.sh"

recipe=$(sha256sum <"$0")
recipe=${recipe:0:8}
mkdir -p "$cache"

find_tree() {
    local found
    for found in "$cache"/*-"$recipe"-*; do
        if [[ -d $found ]]; then
            echo "$found"
            return
        fi
    done
    return 1
}

if find_tree; then exit; fi
# One at a time; a second one waits and then finds the work done.
exec 9>"$cache/lock"
flock 9
if find_tree; then exit; fi

log=$cache/apt.log
work=$cache/work
trap 'rm -rf "$work"; apt_close' EXIT
rm -rf "$work"
mkdir -p "$work"/{packages,all,tree/root}
: >"$work/status"

say "looking for QEMU in Debian's $suite"
apt_open "$suite" >"$log" 2>&1 || die "apt could not be prepared; see $log"
# As if nothing were installed: all that is needed is named, with its version.
mapfile -t packages < <(apt-get "${apt_options[@]}" --simulate --no-install-recommends \
    -o "Dir::State::status=$work/status" install "qemu-system-x86/$suite" 2>>"$log" |
    sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1=\2/p' | LC_ALL=C sort)
version=$(printf '%s\n' "${packages[@]}" | sed -n 's/^qemu-system-x86=//p')
if [[ -z $version ]]; then die "$suite has no qemu-system-x86 that can be had; see $log"; fi

say "downloading QEMU $version and what it needs (${#packages[@]} packages)"
(cd "$work/packages" && apt-get "${apt_options[@]}" -q download "${packages[@]}") >>"$log" 2>&1 ||
    die "the download failed; see $log"

# On a merged /usr, as the packages expect it.
merge_usr() {
    local directory
    mkdir -p "$1/usr"/{bin,lib,lib64,sbin}
    for directory in bin lib lib64 sbin; do ln -s "usr/$directory" "$1/$directory"; done
}
merge_usr "$work/all"
for package in "$work"/packages/*.deb; do
    # Through the links above, should a package still use them.
    dpkg-deb --fsys-tarfile "$package" |
        tar --extract --keep-directory-symlink --no-same-owner --directory "$work/all"
done

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

printf '%s\n' "${packages[@]}" >"$work/tree/packages"
printf '%s\n' "$version" >"$work/tree/version"
hash=$(sha256sum <"$work/tree/packages")
target=$cache/${version//[:\/]/_}-$recipe-${hash:0:8}
# A directory under its final name is a finished one.
mv "$work/tree" "$target"
say "unpacked QEMU $version"
echo "$target"
