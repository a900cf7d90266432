#!/usr/bin/env bash
#
# Runs the fuzz targets under libFuzzer, one after the other: fuzz.sh [CRATE [TARGET]]
#
# Every target runs for PERENNIAL_FUZZ_SECONDS (default 60). It starts from the seeds in
# the repository and from target/fuzz/corpus, to which it adds new inputs. A failing
# input ends the run and is left in target/fuzz/failures. When the failure is
# understood, add the input to the seeds of its target.
#
# Needs a C++ compiler, for libFuzzer. Installs cargo-fuzz if it is missing. Needs no
# nightly compiler: RUSTC_BOOTSTRAP lets the stable one accept the flags.

set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
cache=${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/perennial}
seconds=${PERENNIAL_FUZZ_SECONDS:-60}
target=${CARGO_TARGET_DIR:-$here/target}/fuzz
version=0.13.1
# The largest seeds are documents of 18 KiB.
longest=20000

say() { printf 'fuzz: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

PATH=$PATH:$cache/tools/bin
command -v c++ >/dev/null || die "no C++ compiler found (c++; Debian: g++)"
if ! command -v cargo-fuzz >/dev/null; then
    say "installing cargo-fuzz $version into $cache/tools (once; a minute or two)"
    cargo install --quiet --locked --root "$cache/tools" "cargo-fuzz@$version"
fi
export RUSTC_BOOTSTRAP=1

# fuzz CRATE TARGET
fuzz() {
    local corpus=$target/corpus/$1-$2 failures=$target/failures/$1-$2 log=$target/$1-$2.log
    mkdir -p "$corpus" "$failures"
    if ! (cd "$here" && CARGO_TARGET_DIR=$target cargo fuzz run --fuzz-dir "$1/fuzz" "$2" \
        "$corpus" "$here/$1/fuzz/seeds/$2" -- -max_total_time="$seconds" -max_len="$longest" \
        -timeout=20 -print_final_stats=1 -artifact_prefix="$failures/") >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "$1 $2 failed; the input is in $failures, the whole output in $log"
    fi
    awk -v name="$1 $2" '
        /^stat::number_of_executed_units/ { executed = $2 }
        / cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") covered = $(i + 1) }
        END { printf "%-24s %12d inputs  %6d edges\n", name, executed, covered }' "$log"
}

for crate in ${1:-luo kexec vmm}; do
    [[ -d $here/$crate/fuzz ]] || die "$crate has no fuzz targets"
    # The fuzz package uses the same versions of dependencies as the workspace.
    cp "$here/Cargo.lock" "$here/$crate/fuzz/Cargo.lock"
    for source in "$here/$crate/fuzz/targets/"${2:-*}.rs; do
        [[ -f $source ]] || die "$crate has no fuzz target called $2"
        name=${source##*/}
        fuzz "$crate" "${name%.rs}"
    done
done
