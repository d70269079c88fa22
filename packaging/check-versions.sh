#!/usr/bin/env bash
# Tests the filter with the nbdkit and the compiler of each suite of Debian that SUITES
# names: all that it is known to work with, if not set. Builds it there from the
# tarballs of make dist, without a network, as a distribution does.
#
# The systems stay where cargo builds, in roots/, with what they have built.
. "$(dirname -- "$0")/common.sh"
[ "$(id -u)" -eq 0 ] || die 'make check-versions needs root, to make and enter systems of other versions of Debian.'

"$root/packaging/dist.sh"
dist=$(target_dir)/dist
name=nbdkit-cow-filter-$(version)

failed=()
for suite in ${SUITES:-bookworm trixie sid}; do
    say
    say "--- Debian $suite ($(date -u '+%H:%M:%S'))"
    system=$("$root/packaging/root.sh" "$suite")
    tree=$system/src/nbdkit-cow-filter
    mkdir -p -- "$tree"
    find "$tree" -mindepth 1 -maxdepth 1 ! -name target -exec rm -r -- {} +
    # With the time of this moment: cargo takes what is older than its last build for
    # unchanged.
    for part in "$name" "$name-vendor"; do
        tar -x --touch --strip-components=1 -C "$tree" -f "$dist/$part.tar.xz"
    done
    mkdir -p -- "$tree/target/dist"
    cp -- "$dist/$name"*.tar.xz "$tree/target/dist/"

    # The compiler that Debian 12 has for its browsers is the one that is new enough.
    toolchain='rustc cargo'
    [ "$suite" != bookworm ] || toolchain='rustc-web cargo-web'
    "$root/packaging/root.sh" "$suite" sh -ec "
        apt-get update -q
        apt-get install -y -q --no-install-recommends make $toolchain
        cd /src/nbdkit-cow-filter
        make deps build check-clients check-packages THROW_AWAY_SYSTEM=yes
    " </dev/null || failed+=("$suite")
done

say
[ "${#failed[@]}" -eq 0 ] || die "Failed in Debian ${failed[*]}."
say "Passed with the nbdkit of Debian: ${SUITES:-bookworm trixie sid}"
