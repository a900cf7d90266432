# shellcheck shell=bash
#
# Keeps what a recipe makes of Debian's packages in a cache outside the checkout. To be sourced by the recipe,
# which has set `here` (its directory), `cache` and `artefact` (the name that its messages begin with).
#
# A finished artefact is a directory in the cache, PREFIX-<recipe>-<hash>: <recipe> is a hash of the recipe and of
# this file, <hash> one of the list of packages with their versions. What is there stays in use until it is removed.
#
#   say, die                       print to stderr; `die` ends the recipe
#   artefact_begin PREFIX [NAME]   print the artefact's directory and end the recipe, if there is one; PREFIX may
#                                  have wildcards. Else wait until no other recipe works under NAME (`apt` by
#                                  default; see alone.sh), and set `work`, a directory with an empty `tree`, and `log`
#   artefact_finish PREFIX         move $work/tree, which has the list `packages`, into the cache, and print where
#                                  it is
#
# For recipes that unpack packages instead of installing them, so that no privileges are needed and none of the
# packages' scripts run:
#
#   find_packages, unpack_packages, merge_usr   see below

say() { printf '%s: %s\n' "$artefact" "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/apt.sh
. "$here/../apt.sh"
# shellcheck source=resources/alone.sh
. "$here/../alone.sh"

recipe=$(cat "$0" "$here/../artefact.sh" | sha256sum)
recipe=${recipe:0:8}
mkdir -p "$cache"

artefact_find() {
    local found
    # shellcheck disable=SC2086 # the wildcards are meant
    for found in "$cache"/$1-"$recipe"-*; do
        if [[ -d $found ]]; then
            echo "$found"
            return
        fi
    done
    return 1
}

artefact_begin() {
    local name=${2:-apt}
    if artefact_find "$1"; then exit; fi
    # A second recipe waits and then finds the work done.
    work_alone "$cache/$name.lock" "$cache/work-$name" apt_close
    if artefact_find "$1"; then exit; fi
    log=$cache/$name.log
    mkdir "$work/tree"
}

artefact_finish() {
    local hash target
    hash=$(sha256sum <"$work/tree/packages")
    target=$cache/$1-$recipe-${hash:0:8}
    # A directory under its final name is a finished one.
    mv "$work/tree" "$target"
    say "made $target"
    echo "$target"
}

# Finds PACKAGE... of $suite and what they need. Sets `packages`, each with its version, and `version`, that of the
# first PACKAGE.
find_packages() {
    : >"$work/status"
    say "looking for $1 in Debian's $suite"
    apt_open "$suite" >"$log" 2>&1 || die "apt could not be prepared; see $log"
    # As if nothing were installed: all that is needed is named, with its version.
    mapfile -t packages < <(apt-get "${apt_options[@]}" --simulate --no-install-recommends \
        -o "Dir::State::status=$work/status" install "${@/%//$suite}" 2>>"$log" |
        sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1=\2/p' | LC_ALL=C sort)
    version=$(printf '%s\n' "${packages[@]}" | sed -n "s/^$1=//p")
    if [[ -z $version ]]; then die "$suite has no $1 that can be had; see $log"; fi
}

# Downloads what was found, and unpacks it into DIRECTORY.
unpack_packages() {
    local package
    say "downloading ${#packages[@]} packages"
    mkdir "$work/packages"
    (cd "$work/packages" && apt-get "${apt_options[@]}" -q download "${packages[@]}") >>"$log" 2>&1 ||
        die "the download failed; see $log"
    merge_usr "$1"
    for package in "$work"/packages/*.deb; do
        # Through the links of the merged /usr, should a package still use them.
        dpkg-deb --fsys-tarfile "$package" |
            tar --extract --keep-directory-symlink --no-same-owner --directory "$1"
    done
    printf '%s\n' "${packages[@]}" >"$work/tree/packages"
    printf '%s\n' "$version" >"$work/tree/version"
}

# Makes the directories of a merged /usr in DIRECTORY, as the packages expect them.
merge_usr() {
    local directory
    mkdir -p "$1/usr"/{bin,lib,lib64,sbin}
    for directory in bin lib lib64 sbin; do ln -s "usr/$directory" "$1/$directory"; done
}
