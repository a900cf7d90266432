#!/usr/bin/env bash
#
# Builds Linux's own tests of the Live Update Orchestrator, as they are, and prints
# where they are: one directory, with `liveupdate` and the tests in two stages.
#
# They come from the same source package as the kernels (see build.sh) and are built
# like kselftest builds them, but static, so that nothing stands between them and the
# system calls. They are GPL-2.0 and no part of this project.
#
# The directory's name has a hash of what went into it; one that is there is used as
# it is. stdout is its path; all else goes to stderr.
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

command -v "$cc" >/dev/null || die "there is no C compiler ($cc; Debian: gcc)"

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
    # Of the kernel's interface only the header in question: the rest is the system's.
    mkdir -p "$work/headers/linux" "$work/bin"
    mv "$work/include/uapi/linux/liveupdate.h" "$work/headers/linux/"
    cd "$work/$selftests/liveupdate"
    for test in "${tests[@]}"; do
        "$cc" "${flags[@]}" -I "$work/headers" -I lib/include -I .. \
            "$test.c" lib/lu_utils.c -o "$work/bin/$test" >&2 ||
            die "$test could not be built (a static C library is needed; Debian: libc6-dev)"
    done
    mkdir -p "${directory%/*}"
    # A directory under its final name is a finished one. Another run may have been faster.
    mv -T "$work/bin" "$directory" 2>/dev/null || [[ -d $directory ]]
fi
echo "$directory"
