# shellcheck shell=bash
# Read by the scripts that provide programs of Debian's for the tests only, without
# installing them: what is installed could start a service, touch the boot loader, or
# take the place of what the user has.

# The packages among these, and of what they need, that are not installed here.
missing_packages() {
    # A simulation, which any user may run. With an old version in brackets it is one that
    # would be upgraded.
    apt-get -s -o Debug::NoLocking=1 --no-install-recommends install "$@" 2>/dev/null |
        sed -n 's/^Inst \([^ ]*\) (.*/\1/p'
}

# Fetches packages (NAME or NAME=VERSION) and unpacks all of them below a directory:
# unpack_packages DIRECTORY PACKAGE...
unpack_packages() {
    local place=$1 work
    shift
    work=$place/debs
    rm -rf -- "$work"
    mkdir -p -- "$work"
    if ! fetch_packages "$work" "$@"; then
        # The package lists may be older than the archive.
        [ "$(id -u)" -ne 0 ] || apt-get -q update </dev/null || :
        fetch_packages "$work" "$@" ||
            die "Could not fetch: $*
Run apt-get update as root, then try again."
    fi
    local deb
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$place"
    done
    rm -rf -- "$work"
}

# As root apt would become another user, who can't write here.
fetch_packages() (
    cd -- "$1" || exit
    shift
    apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$@" </dev/null
)

# Runs a test of a program that was unpacked: runs DIRECTORY TEST PROGRAM
runs() (
    libraries=("$1"/usr/lib/*-linux-gnu "$1"/lib/*-linux-gnu)
    IFS=:
    export LD_LIBRARY_PATH="${libraries[*]}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    "$2" "$1/$3"
)
