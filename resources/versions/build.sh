#!/usr/bin/env bash
#
# Builds the static `perennial` of earlier commits, and prints where they are.
#
#   build.sh NAME       that of the commit called NAME in the file `commits` beside this script
#   build.sh all        all of that file, in its order
#
# Prints one directory a line on stdout, each with `perennial`; everything else goes to stderr. A program is built
# from the commit's own sources and its own Cargo.lock, as the tests build that of the checkout
# (tests/src/binaries.rs). The directory's name has the commit and a hash of how it is built, so a program in the
# cache is used without a build. The cache is outside the checkout and outlives it:
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/
#       programs/<commit>-<hash>/    the programs
#       programs/<name>.log          the last build of each
#
# Exit status 3: a program is not in the cache, and this repository does not have its commit, as in a shallow clone.
#
# Environment: PERENNIAL_CACHE.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
programs=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}/programs
target=x86_64-unknown-linux-gnu
build=(cargo build --release --locked --target "$target" --package vmm --no-default-features --bin perennial)
flags="-C target-feature=+crt-static"

say() { printf 'versions: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/alone.sh
. "$here/../alone.sh"

mapfile -t known < <(sed -nE 's/^([a-z]+) ([0-9a-f]{40})$/\1/p' "$here/commits")
case ${1:-} in
all) wanted=("${known[@]}") ;;
*)
    if [[ $# != 1 || " ${known[*]} " != *" $1 "* ]]; then
        echo "usage: $0 all|$(IFS='|' && echo "${known[*]}")" >&2
        exit 2
    fi
    wanted=("$1")
    ;;
esac

commit() { sed -nE "s/^$1 ([0-9a-f]{40})\$/\1/p" "$here/commits"; }

directory() {
    local commit hash
    commit=$(commit "$1")
    hash=$(printf '%s\n' "$commit" "${build[@]}" "$flags" | sha256sum)
    echo "$programs/${commit:0:12}-${hash:0:8}"
}

all_there() {
    local name
    for name in "${wanted[@]}"; do
        [[ -d $(directory "$name") ]] || return 1
    done
}

build() {
    local name=$1 commit destination log source
    commit=$(commit "$name")
    destination=$(directory "$name")
    log=$programs/$name.log
    source=$work/source
    if [[ -d $destination ]]; then return; fi
    if ! git -C "$here" cat-file -e "$commit^{commit}" 2>"$log"; then
        say "this repository does not have the commit $commit, from which \`$name\` is built ($(cat "$log")). In a" \
            "shallow clone, \`git fetch --unshallow\` gets it"
        exit 3
    fi
    say "building $name, the program of ${commit:0:12} (one to two minutes on 2 cores; the log is $log)"
    rm -rf "$source"
    mkdir -p "$source" "$work/image"
    git -C "$(git -C "$here" rev-parse --show-toplevel)" archive "$commit" | tar --extract --directory "$source"
    # `nice` gives other work on this computer precedence. What two commits have in common is compiled once.
    if ! (cd "$source" && env --unset=CARGO_ENCODED_RUSTFLAGS "CARGO_TARGET_DIR=$work/target" "RUSTFLAGS=$flags" \
        nice -n 5 "${build[@]}") >"$log" 2>&1; then
        grep -E -A 5 '^error' "$log" | sed -n '1,20p' >&2
        die "$name could not be built; see $log"
    fi
    cp "$work/target/$target/release/perennial" "$work/image/perennial"
    # The directory gets its final name only when it is complete.
    mv "$work/image" "$destination"
    say "built $name: $("$destination/perennial" --version)"
}

mkdir -p "$programs"
if ! all_there; then
    # A second build waits and then finds the programs in the cache.
    work_alone "$programs/lock" "$programs/work"
    for name in "${wanted[@]}"; do build "$name"; done
fi
for name in "${wanted[@]}"; do directory "$name"; done
