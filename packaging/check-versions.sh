#!/usr/bin/env bash
# Tests the filter with the nbdkit and the compiler of each suite of Debian that SUITES
# names: all that it is known to work with, if not set. Builds it there from the
# tarballs of make dist, without a network, as a distribution does.
#
# The systems stay where cargo builds, in roots/, with what they have built. One in which
# a test has failed is made again by the next run.
. "$(dirname -- "$0")/common.sh"
[ "$(id -u)" -eq 0 ] || die 'make check-versions needs root, to make and enter systems of other versions of Debian.'

# Others than root have to read the tree in there: tests become other users.
umask 022

need_cargo_deb
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
    mkdir -p -- "$tree/target/dist" "$tree/target/tools/bin"
    cp -- "$dist/$name"*.tar.xz "$tree/target/dist/"
    # Not built again in each system, unless it does not run there.
    cp -- "$(type -P cargo-deb)" "$tree/target/tools/bin/"
    chroot "$system" /src/nbdkit-cow-filter/target/tools/bin/cargo-deb --version >/dev/null 2>&1 ||
        rm -- "$tree/target/tools/bin/cargo-deb"

    # The compiler that Debian 12 has for its browsers is the one that is new enough.
    toolchain='rustc cargo'
    [ "$suite" != bookworm ] || toolchain='rustc-web cargo-web'
    # The tarballs have to build with the oldest compiler that the filter is for.
    targets='deps build check-clients check-packages'
    [ "$suite" != trixie ] || targets+=' check-dist'
    "$root/packaging/root.sh" "$suite" sh -ec "
        apt-get update -q
        apt-get install -y -q --no-install-recommends make $toolchain
        cd /src/nbdkit-cow-filter
        make $targets THROW_AWAY_SYSTEM=yes
    " </dev/null || {
        failed+=("$suite")
        # What a test has left half-way would make the next run fail as well.
        rm -f -- "$system.made"
    }
done

say
[ "${#failed[@]}" -eq 0 ] || die "Failed in Debian ${failed[*]}."
say "Passed with the nbdkit of Debian: ${SUITES:-bookworm trixie sid}"
