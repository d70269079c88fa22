#!/usr/bin/env bash
# Provides the tools of QEMU 7.2, for the tests that are done with them and with those of
# the system: what they leave of an image differs.
#
# 7.2 is that of Debian 12. Where the system's archive has another one only, the system's
# is tested alone, as it is where the system's is that one.
. "$(dirname -- "$0")/common.sh"
. "$root/packaging/debs.sh"

version=7.2
place=$(target_dir)/qemu-$version

is_it() { [[ $("$1" --version 2>/dev/null) == "qemu-img version $version."* ]]; }
if have qemu-img && is_it qemu-img; then
    exit 0
fi
! runs "$place" is_it usr/bin/qemu-img || exit 0

found=
if have apt-cache && have dpkg-deb; then
    found=$(apt-cache madison qemu-utils | sed -n "s/^ *qemu-utils *| *\(1:${version}[.+][^ ]*\) .*/\1/p")
fi
if [ -z "$found" ]; then
    say "There is no QEMU $version to be had here: the tests use the system's only."
    exit 0
fi
found=${found%%$'\n'*}
say "Fetching the tools of QEMU $version, to be run by the tests only."
mapfile -t missing < <(missing_packages "qemu-utils=$found" | grep -v -x qemu-utils)
unpack_packages "$place" "qemu-utils=$found" "${missing[@]}"
runs "$place" is_it usr/bin/qemu-img || die "$place/usr/bin/qemu-img does not run."
