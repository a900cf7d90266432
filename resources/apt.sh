# shellcheck shell=bash
#
# Runs apt with a private configuration. To be sourced.
#
# A recent QEMU on Debian 12 and the kernel's source, for example, come from Debian's
# backports. A suite that a script added to the computer's apt would stay there and
# surprise its owner. So apt runs with a temporary directory, which has the computer's
# sources plus the one suite, and is removed afterwards. apt still checks signatures.
#
#   apt_open SUITE    make the configuration; sets apt_dir, apt_options and apt_mirror
#   apt_close         remove it
#
# Then: apt-get "${apt_options[@]}" ...
#
# Environment: PERENNIAL_DEBIAN_MIRROR, the mirror for SUITE; by default the mirror of
# this computer's Debian packages.

debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

apt_open() {
    local suite=$1 source

    apt_mirror=${PERENNIAL_DEBIAN_MIRROR:-}
    apt_dir=$(mktemp -d "${TMPDIR:-/tmp}/perennial-apt.XXXXXX")
    mkdir -p "$apt_dir"/{sources.list.d,lists/partial,cache/archives/partial}
    # Not the user `_apt`, who may not enter this temporary directory.
    apt_options=(
        -o "Dir::Etc::sourcelist=$apt_dir/sources.list"
        -o "Dir::Etc::sourceparts=$apt_dir/sources.list.d"
        -o "Dir::State::lists=$apt_dir/lists"
        -o "Dir::Cache=$apt_dir/cache"
        -o "APT::Sandbox::User=root"
        -o "Acquire::Languages=none"
        -o "Acquire::Retries=3"
        -o "Acquire::http::Timeout=20"
        -o "Acquire::https::Timeout=20"
    )
    : >"$apt_dir/sources.list"
    if [[ -e /etc/apt/sources.list ]]; then
        cp /etc/apt/sources.list "$apt_dir/sources.list.d/system.list"
    fi
    for source in /etc/apt/sources.list.d/*.{list,sources}; do
        if [[ -e $source ]]; then cp "$source" "$apt_dir/sources.list.d/"; fi
    done

    # Ignores errors: a broken source, for example a third party's, must not stop the
    # others. If a package is not available, a later step fails.
    apt-get "${apt_options[@]}" -q update || true

    if [[ -z $apt_mirror ]]; then
        # Read to the end rather than with `head`: apt-get must not see a closed pipe.
        # shellcheck disable=SC2016 # apt-get expands it
        apt_mirror=$(apt-get "${apt_options[@]}" indextargets --format '$(REPO_URI)' \
            'Origin: Debian' 'Label: Debian' 'Created-By: Packages' | sed -n 1p)
    fi
    if [[ -z $apt_mirror ]]; then
        echo "apt knows no reachable Debian mirror; name one in PERENNIAL_DEBIAN_MIRROR" >&2
        return 1
    fi
    if [[ ! -e $debian_keyring ]]; then
        echo "$debian_keyring is missing; install the package debian-archive-keyring" >&2
        return 1
    fi

    # apt refuses a suite with two different Signed-By, so the suite is added only if the
    # computer's sources do not have it.
    if [[ -z $(apt-get "${apt_options[@]}" indextargets "Release: $suite") ]]; then
        echo "deb [signed-by=$debian_keyring] $apt_mirror $suite main" >"$apt_dir/sources.list"
        apt-get "${apt_options[@]}" -q update || true
    fi
}

apt_close() {
    if [[ -n ${apt_dir:-} ]]; then rm -rf "$apt_dir"; fi
}
