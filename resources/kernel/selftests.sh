#!/usr/bin/env bash
#
# Builds Linux's unchanged selftests of the Live Update Orchestrator and prints their
# directory, which has `liveupdate` and the tests in two stages.
#
# The sources are from the same package as the kernels (see build.sh). They are built as
# kselftest builds them, but static, so that the tests depend on no shared library. They
# are GPL-2.0 and no part of this project.
#
# The directory's name has a hash of the build's inputs; an existing directory is used as
# it is. Its path goes to stdout, everything else to stderr.
#
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/
#       selftests/liveupdate-<hash>/
#
# Environment: CC (a C compiler, with a static C library); as for build.sh.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

say() { printf 'selftests: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# shellcheck source=resources/kernel/source.sh
. "$here/source.sh"

tests=(liveupdate luo_kexec_simple luo_multi_session luo_stress_files luo_stress_sessions)
selftests=tools/testing/selftests
cc=${CC:-cc}
flags=(-static -O2 -Wall -Wno-unused-function -D_GNU_SOURCE=)

command -v "$cc" >/dev/null || die "no C compiler found ($cc; Debian: gcc)"

trap apt_close EXIT
find_source
hash=$(printf '%s\n' "$version" "$("$cc" --version | head -n 1)" "${flags[@]}" "${tests[@]}" | sha256sum)
directory=$cache/selftests/liveupdate-${hash:0:12}

if [[ ! -d $directory ]]; then
    fetch_source
    work=$(mktemp -d "$kernels/selftests.XXXXXX")
    trap 'rm -rf "$work"; apt_close' EXIT
    say "building Linux $version's tests (15 seconds; most of it is unpacking)"
    unpack_source "$work" "*/$selftests/liveupdate" "*/$selftests/kselftest*.h" \
        '*/include/uapi/linux/liveupdate.h'
    # Only this header is the kernel source's; all others are the system's.
    mkdir -p "$work/headers/linux" "$work/bin"
    mv "$work/include/uapi/linux/liveupdate.h" "$work/headers/linux/"
    cd "$work/$selftests/liveupdate"
    for test in "${tests[@]}"; do
        "$cc" "${flags[@]}" -I "$work/headers" -I lib/include -I .. \
            "$test.c" lib/lu_utils.c -o "$work/bin/$test" >&2 ||
            die "$test could not be built (a static C library is needed; Debian: libc6-dev)"
    done
    mkdir -p "${directory%/*}"
    # The directory gets its final name only when it is complete. Another run may have made it
    # meanwhile.
    mv -T "$work/bin" "$directory" 2>/dev/null || [[ -d $directory ]]
fi
echo "$directory"
