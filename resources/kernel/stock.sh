#!/usr/bin/env bash
#
# Fetches kernels of Debian as they are, and prints where they are.
#
#   stock.sh stock-a    the host before a live update: 6.1, of Debian 12
#   stock.sh stock-b    the host after it: 7.3, of Debian 13's backports
#   stock.sh all        both, in this order
#
# None of them has the Live Update Orchestrator: their VMs live in a pool. apt checks
# the packages' signatures.
#
# stdout is one directory a line; all else goes to stderr. In it:
#
#   bzImage            the kernel
#   release            what it calls itself
#   modules/NAME.ko    the modules that a host needs, and those that they need
#   order              their names, each after those that it needs
#   modules.builtin    the list of what is built into the kernel and so in neither
#
# The directory's name has a hash of what went into it, and packages that were downloaded
# once stay in use:
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/
#       downloads/stock-<a|b>/            the packages
#       kernels/stock-<a|b>-<hash>/       the kernels
#
# Environment: PERENNIAL_CACHE; PERENNIAL_DEBIAN_MIRROR (see ../apt.sh).

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=resources/apt.sh
. "$here/../apt.sh"

say() { printf 'kernel: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/alone.sh
. "$here/../alone.sh"

cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}
downloads=$cache/downloads
kernels=$cache/kernels
mkdir -p "$downloads" "$kernels"

# What a host has to load: its devices, the pool, KVM. Both vendors' KVM, of which a
# host loads its own.
wanted_modules=(
    virtio_pci virtio_blk virtio_console virtio_rng virtio_net
    tun bridge
    libnvdimm nd_btt nd_e820 nd_pmem ext4
    irqbypass kvm kvm-amd kvm-intel
)
# What only some kernels have: the watchdog of QEMU's machines.
optional_modules=(i6300esb)

case ${1:-} in
stock-a | stock-b) wanted=("$1") ;;
all) wanted=(stock-a stock-b) ;;
*)
    echo "usage: $0 stock-a|stock-b|all" >&2
    exit 2
    ;;
esac

suite() {
    case $1 in
    stock-a) echo bookworm ;;
    stock-b) echo trixie-backports ;;
    esac
}

# The names of the versioned packages. One series each: another is a change to be tested.
image_pattern() {
    case $1 in
    stock-a) echo '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' ;;
    stock-b) echo '^linux-image-7\.3\.[0-9]+\+deb13-cloud-amd64$' ;;
    esac
}

# --- Packages ---------------------------------------------------------------------

fetch() {
    local name=$1 log=$kernels/apt.log part=$downloads/part.$$ image parts
    if [[ -d $downloads/$name ]]; then return; fi
    say "looking for a stock kernel in Debian's $(suite "$name")"
    apt_open "$(suite "$name")" >"$log" 2>&1 || die "apt could not be prepared; see $log"
    image=$(apt-cache "${apt_options[@]}" search --names-only "$(image_pattern "$name")" |
        sed 's/ .*//' | sort -V | sed -n '$p')
    if [[ -z $image ]]; then
        say "$(suite "$name") has no package $(image_pattern "$name") (apt's log: $log)."
        die "Put the packages of one into $downloads/$name."
    fi
    # Newer packages are in parts, which belong together by their version.
    parts=$(apt-cache "${apt_options[@]}" show --no-all-versions "$image" | sed -n 's/^Depends: //p' |
        tr ',' '\n' | sed 's/(.*//; s/|.*//; s/ //g' |
        grep -xF -e "linux-base-${image#linux-image-}" -e "linux-binary-${image#linux-image-}" \
            -e "linux-modules-${image#linux-image-}" || true)
    say "downloading ${image#linux-} (about 30 MB)"
    rm -rf "$part"
    mkdir -p "$part"
    # shellcheck disable=SC2086 # names without blanks
    (cd "$part" && apt-get "${apt_options[@]}" -q download "$image" $parts) >>"$log" 2>&1 || {
        rm -rf "$part"
        die "the download failed; see $log"
    }
    apt_close
    # apt has checked them by now; only whole files get the name.
    mv "$part" "$downloads/$name"
}

# --- Modules ----------------------------------------------------------------------

# A module's file; nothing if the kernel has it built in. File names have - or _ as it
# pleased their authors.
module_file() {
    local pattern=${1//[-_]/[-_]}
    find "$unpacked" -path '*/kernel/*' \( -name "$pattern.ko" -o -name "$pattern.ko.xz" \) | sed -n 1p
}

is_builtin() {
    local pattern=${1//[-_]/[-_]}
    grep -qE "/$pattern\.ko\$" "$image/modules.builtin"
}

# Copies a module after those that it needs, and notes its name in `order`.
add_module() {
    local name=$1 file target needs need
    if [[ -n ${added[${name//-/_}]:-} ]]; then return; fi
    added[${name//-/_}]=yes
    file=$(module_file "$name")
    if [[ -z $file ]]; then
        is_builtin "$name" || die "$release has no module $name, neither built in nor as a file"
        return
    fi
    target=$(basename "$file" .xz)
    case $file in
    *.xz) xz --decompress --stdout "$file" >"$image/modules/$target" ;;
    *) cp "$file" "$image/modules/$target" ;;
    esac
    needs=$(objcopy -O binary --only-section=.modinfo "$image/modules/$target" /dev/stdout |
        tr '\0' '\n' | sed -n 's/^depends=//p')
    for need in ${needs//,/ }; do add_module "$need"; done
    echo "${target%.ko}" >>"$image/order"
}

directory() {
    local hash
    hash=$({
        printf '%s\n' "${wanted_modules[@]}" "${optional_modules[@]}"
        (cd "$downloads/$1" && printf '%s\n' *.deb)
        cat "$0"
    } | sha256sum)
    echo "$kernels/$1-${hash:0:12}"
}

unpack() {
    local name=$1 target package module
    fetch "$name"
    target=$(directory "$name")
    if [[ -d $target ]]; then return; fi
    unpacked=$work/unpacked
    image=$work/image
    mkdir -p "$unpacked" "$image/modules"
    for package in "$downloads/$name"/*.deb; do dpkg-deb --extract "$package" "$unpacked"; done
    cp "$(find "$unpacked" \( -name vmlinuz -o -name 'vmlinuz-*' \) | sed -n 1p)" "$image/bzImage"
    release=$(basename "$(find "$unpacked" -type d -path '*/lib/modules/*' -prune | sed -n 1p)")
    echo "$release" >"$image/release"
    cp "$(find "$unpacked" -name modules.builtin | sed -n 1p)" "$image/modules.builtin"
    : >"$image/order"
    declare -gA added=()
    for module in "${wanted_modules[@]}"; do add_module "$module"; done
    for module in "${optional_modules[@]}"; do
        if [[ -n $(module_file "$module") ]]; then add_module "$module"; fi
    done
    # A directory under its final name is a finished one.
    mv "$image" "$target"
    rm -rf "$unpacked"
    say "unpacked $release"
}

work_alone "$kernels/stock.lock" "$kernels/stock-work" apt_close
for name in "${wanted[@]}"; do
    unpack "$name"
    directory "$name"
done
