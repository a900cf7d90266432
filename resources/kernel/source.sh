# shellcheck shell=bash
#
# Debian's kernel source, to be sourced: which series, where it is kept, what is in it.
#
#   find_source                   sets `package`, which may not exist yet, and `version`
#   fetch_source                  downloads it unless it is there
#   unpack_source DIR [PATTERN]   unpacks all of it, or what matches, to DIR
#
# Before: `here` is this directory, `say` and `die` report to a person. Sets `series`, `cache`,
# `downloads` and `kernels`, and makes the last two.

# The one place that says which kernel. LUO's interface is young: another series is
# a change to be tested, not a matter of course.
series=${PERENNIAL_LINUX_SERIES:-7.3}
suite=trixie-backports

# shellcheck source=resources/apt.sh
. "$here/../apt.sh"

cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}
downloads=$cache/downloads
kernels=$cache/kernels
mkdir -p "$downloads" "$kernels"

# What was downloaded once stays in use, so that a point release does not rebuild
# everything.
find_source() {
    local found=("$downloads/linux-source-${series}"_*.deb)
    if [[ -e ${found[-1]} ]]; then
        package=${found[-1]}
        version=$(dpkg-deb --field "$package" Version)
        return
    fi
    say "looking for Linux $series in Debian's $suite"
    apt_open "$suite" >"$kernels/apt.log" 2>&1 || die "apt could not be prepared; see $kernels/apt.log"
    # The whole output is read each time: apt-cache must not see a closed pipe.
    # For a package it does not know apt-cache fails, and `version` stays empty.
    version=$(apt-cache "${apt_options[@]}" show --no-all-versions "linux-source-$series" 2>/dev/null |
        sed -n 's/^Version: //p') || true
    if [[ -z $version ]]; then
        say "$suite has no linux-source-$series (apt's log: $kernels/apt.log). It has:"
        apt-cache "${apt_options[@]}" search --names-only '^linux-source-[0-9]' | sed 's/ .*//; s/^/kernel:   /' >&2
        say "Debian keeps one series at a time there. Try its newest with PERENNIAL_LINUX_SERIES=<n.n>,"
        die "or put the wanted linux-source-${series}_<version>_all.deb into $downloads."
    fi
    package=$downloads/linux-source-${series}_${version//:/%3a}_all.deb
}

fetch_source() {
    local part=$downloads/part.$$
    if [[ -e $package ]]; then return; fi
    say "downloading linux-source-$series $version (170 MB)"
    mkdir -p "$part"
    (cd "$part" && apt-get "${apt_options[@]}" -q download "linux-source-$series=$version") \
        >>"$kernels/apt.log" 2>&1 || {
        rm -rf "$part"
        die "the download failed; see $kernels/apt.log"
    }
    # apt has checked it by now; only a whole file gets the name.
    mv "$part"/linux-source-*.deb "$package"
    rmdir "$part"
}

unpack_source() {
    local directory=$1
    shift
    mkdir -p "$directory"
    dpkg-deb --fsys-tarfile "$package" |
        tar --extract --to-stdout "./usr/src/linux-source-$series.tar.xz" |
        tar --extract --xz --strip-components=1 --directory "$directory" --wildcards "$@"
}
