#!/usr/bin/env bash
#
# Unpacks a systemd of Debian that knows LUO, for the machines of the tests, and prints where it is.
#
# stdout is one directory, holding `root`, the file tree of systemd and what it needs, and `version`;
# all else goes to stderr. It is no system yet: there is no configuration, and no unit is enabled.
# The packages are unpacked, not installed, so that no privileges are needed and none of their scripts
# run.
#
# What is there stays in use until it is removed, as with the kernels' source (../kernel/source.sh):
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/systemd/<version>-<hash>/
#
# The hash is of the list of packages with their versions, and of this recipe.
#
# Environment: PERENNIAL_CACHE, PERENNIAL_DEBIAN_MIRROR (see ../apt.sh), and PERENNIAL_SYSTEMD_SUITE,
# the Debian suite to take it from.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}/systemd
suite=${PERENNIAL_SYSTEMD_SUITE:-forky}
# The first that carries fd stores over a kexec.
first_version=261
# What is asked for by name: systemd, mount(8) for its mount units, and a shell.
wanted=(systemd mount dash)
# Of the packages, what the machines have no use for.
unused=(usr/share/{bash-completion,doc,i18n,info,lintian,locale,man,zsh} usr/lib/x86_64-linux-gnu/gconv)

say() { printf 'systemd: %s\n' "$*" >&2; }
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
mkdir -p "$work"/{packages,tree/root}
: >"$work/status"

say "looking for systemd in Debian's $suite"
apt_open "$suite" >"$log" 2>&1 || die "apt could not be prepared; see $log"
# As if nothing were installed: all that is needed is named, with its version.
mapfile -t packages < <(apt-get "${apt_options[@]}" --simulate --no-install-recommends \
    -o "Dir::State::status=$work/status" install "${wanted[@]/%//$suite}" 2>>"$log" |
    sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1=\2/p' | LC_ALL=C sort)
version=$(printf '%s\n' "${packages[@]}" | sed -n 's/^systemd=//p')
if [[ -z $version ]]; then die "$suite has no systemd that can be had; see $log"; fi
if ((${version%%[!0-9]*} < first_version)); then
    die "$suite has systemd $version; fd stores survive a kexec from $first_version on"
fi

say "downloading systemd $version and what it needs (${#packages[@]} packages, 15 MB)"
(cd "$work/packages" && apt-get "${apt_options[@]}" -q download "${packages[@]}") >>"$log" 2>&1 ||
    die "the download failed; see $log"
# On a merged /usr, as the packages expect it.
mkdir -p "$work/tree/root/usr"/{bin,lib,lib64,sbin}
for directory in bin lib lib64 sbin; do
    ln -s "usr/$directory" "$work/tree/root/$directory"
done
for package in "$work"/packages/*.deb; do
    # Through the links above, should a package still use them.
    dpkg-deb --fsys-tarfile "$package" |
        tar --extract --keep-directory-symlink --no-same-owner --directory "$work/tree/root"
done
(cd "$work/tree/root" && rm -rf "${unused[@]}")
printf '%s\n' "${packages[@]}" >"$work/tree/packages"
printf '%s\n' "$version" >"$work/tree/version"

hash=$(sha256sum <"$work/tree/packages")
target=$cache/$version-$recipe-${hash:0:8}
# A directory under its final name is a finished one.
mv "$work/tree" "$target"
say "unpacked systemd $version"
echo "$target"
