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
#   ${PERENNIAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/perennial}/systemd/<version>-<recipe>-<hash>/ (see ../artefact.sh)
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

artefact=systemd
# shellcheck source=resources/artefact.sh
. "$here/../artefact.sh"

artefact_begin '*'
find_packages "${wanted[@]}"
if ((${version%%[!0-9]*} < first_version)); then
    die "$suite has systemd $version; fd stores survive a kexec from $first_version on"
fi
unpack_packages "$work/tree/root"
(cd "$work/tree/root" && rm -rf "${unused[@]}")
artefact_finish "$version"
