#!/usr/bin/env bash
#
# Builds the kernels of the tests and the demo, and prints where they are.
#
#   build.sh host-a     the host before a live update
#   build.sh host-b     the host after it: the same kernel with another release name
#   build.sh guest      the kernel inside the VMs
#   build.sh all        all three, in this order
#
# No distribution ships a kernel with the Live Update Orchestrator enabled yet. So these
# kernels are built from Debian's kernel source, whose signature apt checks, and from the
# two configuration fragments beside this file.
#
# Prints one directory a line on stdout, each with bzImage, vmlinux (ELF, for PVH boot),
# config and release; everything else goes to stderr. The directory's name has a hash of
# the build's inputs, so a kernel in the cache is used without a build. The cache is
# outside the checkout and outlives it:
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/
#       downloads/                   the source package
#       kernels/<name>-<hash>/       the kernels
#       kernels/<name>.log           the last build of each
#
# Environment: PERENNIAL_CACHE; PERENNIAL_LINUX_SERIES and PERENNIAL_DEBIAN_MIRROR
# (see source.sh and ../apt.sh).

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

say() { printf 'kernel: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/kernel/source.sh
. "$here/source.sh"
# shellcheck source=resources/alone.sh
. "$here/../alone.sh"

# Fixed values, so that the same input gives the same kernel on every computer.
make_flags=(
    KBUILD_BUILD_USER=perennial
    KBUILD_BUILD_HOST=perennial
    KBUILD_BUILD_VERSION=1
    KBUILD_BUILD_TIMESTAMP=2026-01-01
)

case ${1:-} in
host-a | host-b | guest) wanted=("$1") ;;
all) wanted=(host-a host-b guest) ;;
*)
    echo "usage: $0 host-a|host-b|guest|all" >&2
    exit 2
    ;;
esac

# The lines of a fragment without its comments, which may change without a rebuild.
options() { grep -E '^CONFIG_[A-Za-z0-9_]+=' "$1"; }

fragment() { echo "$here/${1%-[ab]}.config"; }

local_version() {
    case $1 in
    host-*) echo "-perennial-${1#host-}" ;;
    guest) echo "-perennial-guest" ;;
    esac
}

# --- The kernels ------------------------------------------------------------------

directory() {
    local hash
    hash=$({
        printf '%s\n' "$version" "$(local_version "$1")" "${make_flags[@]}"
        options "$(fragment "$1")"
    } | sha256sum)
    echo "$kernels/$1-${hash:0:12}"
}

# Errors if Kconfig silently dropped an option, because of unmet dependencies.
check_config() {
    local option lost=()
    while read -r option; do
        case $option in
        *=n) if grep -q "^${option%=n}=" "$2"; then lost+=("$option"); fi ;;
        *) if ! grep -qxF -- "$option" "$2"; then lost+=("$option"); fi ;;
        esac
    done < <(options "$1")
    if ((${#lost[@]} > 0)); then
        die "Linux $version did not accept these lines of $1: ${lost[*]}"
    fi
}

build() {
    local name=$1 target log tree image
    target=$(directory "$name")
    log=$kernels/$name.log
    # The two hosts share a build tree: the second is the first one linked again.
    tree=$work/${name%-[ab]}
    image=$work/image

    if [[ -d $target ]]; then return; fi
    if [[ ! -d $work/source ]]; then
        fetch_source
        say "unpacking the source (15 seconds; 2 GB until the build is over)"
        unpack_source "$work/source"
    fi

    # `nice` gives other work on this computer precedence.
    local make=(nice -n 5 make -C "$work/source" "O=$tree" "LOCALVERSION=$(local_version "$name")"
        "${make_flags[@]}")

    if [[ ! -d $tree ]]; then
        mkdir -p "$tree"
        say "building $name (3 to 8 minutes on 2 cores; the log is $log)"
        "${make[@]}" -s "KCONFIG_ALLCONFIG=$(fragment "$name")" allnoconfig >"$log" 2>&1 ||
            die "the configuration failed; see $log"
        check_config "$(fragment "$name")" "$tree/.config"
    else
        say "building $name (a relink: some seconds)"
    fi
    if ! "${make[@]}" "-j$(nproc)" bzImage 2>&1 | tee "$log" |
        awk 'NR % 250 == 0 { printf "kernel:   %d steps\n", NR; fflush() }' >&2; then
        grep -E -A 5 'error|Error' "$log" | sed -n '1,20p' >&2
        die "$name could not be built; see $log"
    fi

    mkdir -p "$image"
    cp "$tree/arch/x86/boot/bzImage" "$image/bzImage"
    strip --strip-debug -o "$image/vmlinux" "$tree/vmlinux"
    cp "$tree/.config" "$image/config"
    cp "$tree/include/config/kernel.release" "$image/release"
    # The directory gets its final name only when it is complete.
    mv "$image" "$target"
    say "built $name: $(cat "$target/release")"
}

all_there() {
    local name
    for name in "${wanted[@]}"; do
        [[ -d $(directory "$name") ]] || return 1
    done
}

trap apt_close EXIT
find_source
if ! all_there; then
    # A second build waits and then finds the kernels in the cache.
    work_alone "$kernels/lock" "$kernels/work" apt_close
    for name in "${wanted[@]}"; do
        case $name in
        # Tests need both hosts, and the second is quickly built in the first one's tree.
        host-*)
            build host-a
            build host-b
            ;;
        *) build "$name" ;;
        esac
    done
fi
for name in "${wanted[@]}"; do
    directory "$name"
done
