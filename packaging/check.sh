#!/usr/bin/env bash
# check.sh [clients|packages|reliability]
#
# Runs every test but those of the other parts. clients: only those against nbdkit and its
# clients. packages: those of Debian and RPM packages. reliability: what takes minutes, of
# docs/reliability.md.
. "$(dirname -- "$0")/common.sh"
need_cargo
cd -- "$root"

# The tests under nbdkit load the library that cargo builds for them, so nothing has to
# be built before.
case ${1:-all} in
all)
    cargo test --no-fail-fast -- --skip reliability::
    tests/packaging/headers.sh
    tests/packaging/install.sh
    tests/packaging/doctor.sh
    # The systems of make check-versions have no checkout, from which tarballs are made.
    [ ! -e .git ] || tests/packaging/dist.sh tarballs
    packaging/model-check.sh
    packaging/fuzz.sh 45
    ;;
clients)
    cargo test --no-fail-fast --test nbdkit -- --skip reliability::
    tests/packaging/headers.sh
    tests/packaging/install.sh
    tests/packaging/doctor.sh
    ;;
packages)
    for kind in deb rpm; do
        say
        say "--- $kind"
        "tests/packaging/$kind.sh"
    done
    ;;
reliability) cargo test --no-fail-fast --test nbdkit -- reliability:: ;;
*) die "check.sh: unknown part '$1': clients, packages or reliability" ;;
esac
