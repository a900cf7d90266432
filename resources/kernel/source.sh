# shellcheck shell=bash
#
# Finds, downloads and unpacks Debian's kernel source. To be sourced.
#
#   find_source                   sets `version`, and `package`, the file, which may not exist yet
#   fetch_source                  downloads the package unless the file exists
#   unpack_source DIR [PATTERN]   unpacks the source, or the matching files, to DIR
#
# The sourcing script must set `here` to this directory and define `say` and `die` for messages.
# Sets `series`, `cache`, `downloads` and `kernels`, and makes the last two directories.

# The only place with the kernel's series. LUO's interface is young, so a change to another
# series needs tests.
series=${PERENNIAL_LINUX_SERIES:-7.3}
suite=trixie-backports

# shellcheck source=resources/apt.sh
. "$here/../apt.sh"

cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}
downloads=$cache/downloads
kernels=$cache/kernels
mkdir -p "$downloads" "$kernels"

# A downloaded package stays in use, so that a new point release does not rebuild everything.
find_source() {
    local found=("$downloads/linux-source-${series}"_*.deb)
    if [[ -e ${found[-1]} ]]; then
        package=${found[-1]}
        version=$(dpkg-deb --field "$package" Version)
        return
    fi
    say "looking for Linux $series in Debian's $suite"
    apt_open "$suite" >"$kernels/apt.log" 2>&1 || die "apt could not be prepared; see $kernels/apt.log"
    # Reads the whole output, because apt-cache fails on a closed pipe. It also fails for an
    # unknown package, and `version` is then empty.
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
    # apt has checked the file. It gets its final name only when it is complete.
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
